"""Checkpoint folders: shards there and back, damage, and params placed on a mesh as they come."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from fusion_jax.errors import UserError
from fusion_jax.pretrained import load as loading
from fusion_jax.pretrained.load import family_of, load, read_config
from fusion_jax.pretrained.save import save
from fusion_jax.pretrained.shards import Shards, read_header
from fusion_jax.transformer import stack_layers

CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "eos_token_id": 3,
}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def params():
    family = family_of(CONFIG)
    module = family.build(CONFIG)
    return jax.jit(module.init)(jax.random.key(0), *family.inputs(CONFIG))["params"]


@pytest.fixture
def folder(tmp_path, params):
    save(tmp_path / "model", params, CONFIG, shard_bytes=20_000)
    return tmp_path / "model"


def equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_shards_there_and_back(folder, params):
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 26_000 for file in files)
    equal(load(folder).params, params)


def test_layers_of_experts_are_stacked_as_they_are_read(folder, params, monkeypatch):
    monkeypatch.setattr(loading, "_computing", loading.Computing(scan=True))
    equal(load(folder).params["transformer"], stack_layers(params["transformer"]))


def test_bfloat16_is_stored_rounded_once(tmp_path, params):
    save(tmp_path / "model", params, CONFIG, dtype=jnp.bfloat16)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), params)
    equal(load(tmp_path / "model").params, rounded)


def test_params_go_straight_to_their_shards(folder, params):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    largest = 0

    def place(path, array):
        nonlocal largest
        largest = max(largest, array.nbytes)
        axes = [None] * array.ndim
        axes[int(np.argmax(array.shape))] = "fsdp"
        return jax.device_put(array, NamedSharding(mesh, P(*axes)))

    placed = load(folder, place=place).params
    equal(jax.tree.map(np.asarray, placed), params)
    assert all(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed))
    assert largest == max(leaf.nbytes for leaf in jax.tree.leaves(params))


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_transformers_opens_tokenizer_and_template_too(tmp_path, params):
    transformers = pytest.importorskip("transformers")
    vocabulary = {"[UNK]": 0, "cat": 1, "dog": 2, "</s>": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    save(tmp_path / "model", params, CONFIG, tokenizer=tokenizer, chat_template=TEMPLATE)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert theirs("dog cat fish").input_ids == tokenizer.encode("dog cat fish").ids == [2, 1, 0]
    assert theirs.eos_token == "</s>"
    assert theirs.chat_template == load(tmp_path / "model").chat_template == TEMPLATE
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_saving_needs_a_new_folder_and_the_configs_params(tmp_path, folder, params):
    with pytest.raises(UserError, match="exists already"):
        save(folder, params, CONFIG)
    with pytest.raises(UserError, match="layer_1/attention/key/kernel"):
        save(tmp_path / "other", params, CONFIG | {"num_hidden_layers": 1})
    assert not (tmp_path / "other").exists()


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": ["llama"]}, r"unknown model_type \['llama'\]"),
        ({"model_type": "mamba"}, r"unknown model_type 'mamba': known are .*llama.*whisper"),
        ({"vocab_size": 41}, r"embed_tokens\.weight: expected shape \(41, 32\), found \(40, 32\)"),
        ({"num_hidden_layers": 3}, r"missing layers\.2\..* more, left over nothing"),
        ({"hidden_size": None}, "describes no model"),
        ({"hidden_act": "softplus"}, "'softplus' is not known; known: .*silu"),
        ({"rope_parameters": {"rope_type": "x"}}, "rope_type 'x' is not known; known: default"),
    ],
)
def test_a_config_that_does_not_fit_is_told(folder, changes, told):
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=told):
        load(folder)


def test_all_tokens_that_end_an_answer_are_known(folder):
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [7, 3]}))
    assert load(folder).config["eos_token_id"] == [3, 7]
    file.write_text(json.dumps({"eos_token_id": 3}))
    assert read_config(folder)["eos_token_id"] == 3
    file.write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(UserError, match="'</s>' is not the id of a token"):
        read_config(folder)
    file.write_text("[")
    with pytest.raises(UserError, match=r"no readable generation_config\.json"):
        read_config(folder)


@pytest.mark.parametrize(
    ("stored", "named", "id"),
    [(None, {"content": "</s>"}, 1), ("<pad>", "</s>", 1), ("<pad>", None, 0), (None, None, 5)],
)
def test_siglip_texts_are_filled_up_as_the_tokenizer_does(tmp_path, stored, named, id):
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "owl": 2}, unk_token="</s>"))
    words.enable_truncation(1)
    if stored:
        words.enable_padding(pad_token=stored, length=4)
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": named}))
    config = {"model_type": "siglip", "text_config": {"pad_token_id": 5}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"logit_scale": np.zeros(1)}, tmp_path / "model.safetensors")
    opened = loading.open_folder(tmp_path, "text", loading.Computing())
    assert opened.module.padding == id
    assert opened.tokenizer.padding is None and opened.tokenizer.truncation is None


def test_a_missing_shard_is_told(folder):
    (folder / "model-00002-of-00005.safetensors").rename(folder / "elsewhere")
    with pytest.raises(UserError, match=r"00002-of-00005\.safetensors, which is not in the folder"):
        load(folder)


def test_an_index_that_points_elsewhere_is_told(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for name in list(index["weight_map"])[:1]:
        index["weight_map"][name] = "../model-00001-of-00005.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match="not in the folder"):
        load(folder)


@pytest.mark.parametrize("seed", range(30))
def test_a_damaged_header_never_gives_a_tensor_of_another_size(folder, seed):
    """Cut off, or with some bytes of the header changed."""
    rng = np.random.default_rng(seed)
    file = sorted(folder.glob("*.safetensors"))[0]
    expected = {name: entry.shape for name, entry in read_header(file).items()}
    data = bytearray(file.read_bytes())
    if seed % 2:
        data = data[: rng.integers(0, len(data) - 1)]
    else:
        place = rng.integers(0, 600)
        data[place : place + 3] = rng.bytes(3)
    file.write_bytes(data)
    try:
        stored = Shards(folder)
        shapes = {name: stored[name].shape for name in expected}
    except UserError as error:
        assert str(folder) in str(error)
    else:
        assert seed % 2 == 0
        sizes = [int(np.prod(shape)) for shape in shapes.values()]
        assert sizes == [int(np.prod(shape)) for shape in expected.values()]


@pytest.mark.parametrize("start", [0, 10**12, -8])
def test_a_tensor_larger_than_its_file_is_told_before_it_is_read(tmp_path, start):
    each = {"dtype": "F32", "shape": [10**12 // 4], "data_offsets": [start, start + 10**12]}
    text = json.dumps({"a": each}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(UserError, match=r"damaged: tensor a of shape \(250000000000,\)"):
        Shards(tmp_path)

"""GGUF: the header against the reference reader, models and tokenizer against `transformers`."""

import contextlib
import struct
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusion_jax.attention import self_mask
from fusion_jax.errors import UserError
from fusion_jax.language.chat import Chat
from fusion_jax.pretrained.fetch import fetch
from fusion_jax.pretrained.gguf import GGUF
from fusion_jax.pretrained.gguf_tokenizer import read_tokenizer
from fusion_jax.pretrained.load import load

KINDS = [kind for kind in gguf.quants._type_traits if kind.name not in ("F32", "F16")]
WIDTH, HEADS, KV, HEAD_DIM, VOCABULARY = 32, 4, 2, 8, 40


def test_header_and_every_quantization_equal_the_reference_reader(tmp_path):
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_uint32("one", 7)
    writer.add_float32("two", 0.1)
    writer.add_array("three", ["é", "", "x y"])
    writer.add_array("four", [1, -2, 3])
    writer.add_bool("five", True)
    for kind in KINDS:
        _, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 60, (3, 2 * size), np.uint8)  # scales are small and finite
        writer.add_tensor(kind.name, blocks, raw_dtype=kind)
    writer.add_tensor("plain", rng.normal(size=(3, 5)).astype(np.float32))
    writer.add_tensor("half", rng.normal(size=(3, 5)).astype(np.float16))
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file"):
        getattr(writer, step)()
    writer.close()
    file, reference = GGUF(tmp_path / "a.gguf"), gguf.GGUFReader(tmp_path / "a.gguf")
    for key, value in file.metadata.items():
        assert value == reference.fields[key].contents()
    assert set(file.entries) == {tensor.name for tensor in reference.tensors}
    for tensor in reference.tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(file.tensor(tensor.name), expected)
        np.testing.assert_array_equal(file.tensor(tensor.name, row=1), expected[1])


def write(path, architecture, kind=gguf.GGMLQuantizationType.Q8_0, layers=3):
    """A small random model as llama.cpp's converter writes it."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("small")
    gemma, gpt2 = architecture.startswith("gemma"), architecture == "gpt2"
    settings = {"block_count": layers, "context_length": 64, "embedding_length": WIDTH}
    settings |= {"attention.head_count": HEADS, "feed_forward_length": 64}
    reals = {"attention.layer_norm_epsilon": 1e-5}
    if not gpt2:
        settings |= {"attention.head_count_kv": KV, "vocab_size": VOCABULARY}
        settings |= {"attention.key_length": HEAD_DIM, "attention.value_length": HEAD_DIM}
        settings |= {"rope.dimension_count": HEAD_DIM}
        reals = {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 5000.0}
    if gemma:
        settings["attention.sliding_window"] = 4
    if architecture == "gemma2":
        reals |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    if architecture == "qwen3moe":
        settings |= {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 64}
    for key, value in settings.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    for key, value in reals.items():
        writer.add_float32(f"{architecture}.{key}", value)

    def put(name, *shape, shift=0.0):
        tensor = (0.3 * rng.normal(size=shape) + shift).astype(np.float32)
        if len(shape) > 1:
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)

    put("token_embd.weight", VOCABULARY, WIDTH)
    put("output_norm.weight", WIDTH, shift=1)
    if gpt2:
        put("position_embd.weight", 64, WIDTH)
        put("output_norm.bias", WIDTH)
    elif not gemma:
        put("output.weight", VOCABULARY, WIDTH)
    q, kv = HEADS * HEAD_DIM, KV * HEAD_DIM
    for index in range(layers):
        layer = f"blk.{index}"
        norms = ["attn_norm", "ffn_norm"]
        dense = {"attn_q": (q, WIDTH), "attn_k": (kv, WIDTH), "attn_v": (kv, WIDTH)}
        dense |= {"attn_output": (WIDTH, q)}
        dense |= {"ffn_gate": (64, WIDTH), "ffn_up": (64, WIDTH), "ffn_down": (WIDTH, 64)}
        biases = {"attn_q": q, "attn_k": kv, "attn_v": kv} if architecture == "qwen2" else {}
        if gpt2:
            dense = {"attn_qkv": (3 * WIDTH, WIDTH), "attn_output": (WIDTH, WIDTH)}
            dense |= {"ffn_up": (64, WIDTH), "ffn_down": (WIDTH, 64)}
            biases = {name: shape[0] for name, shape in dense.items()}
            biases |= {"attn_norm": WIDTH, "ffn_norm": WIDTH}
        if gemma:
            norms += ["post_attention_norm", "post_ffw_norm"]
        if architecture == "qwen3moe":
            for name in ("ffn_gate", "ffn_up", "ffn_down"):
                put(f"{layer}.{name}_exps.weight", 4, *dense.pop(name))
            put(f"{layer}.ffn_gate_inp.weight", 4, WIDTH)
        for name in norms:
            put(f"{layer}.{name}.weight", WIDTH, shift=1)
        for name, shape in dense.items():
            put(f"{layer}.{name}.weight", *shape)
        for name, size in biases.items():
            put(f"{layer}.{name}.bias", size)
        if architecture in ("qwen3", "qwen3moe", "gemma3"):
            put(f"{layer}.attn_q_norm.weight", HEAD_DIM, shift=1)
            put(f"{layer}.attn_k_norm.weight", HEAD_DIM, shift=1)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{index}" for index in range(VOCABULARY)])
    writer.add_token_merges([])
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file"):
        getattr(writer, step)()
    writer.close()


def logits(opened, ids):
    @jax.jit
    def run(params, ids):
        mask = self_mask(jnp.ones(ids.shape, bool), causal=True)
        hidden, _ = opened.module.apply({"params": params}, ids, mask)
        return opened.module.apply({"params": params}, hidden, method="logits")

    return np.asarray(run(opened.params, jnp.asarray(ids, jnp.int32)))


@pytest.mark.filterwarnings("ignore")  # torch's own
@pytest.mark.parametrize(
    "architecture", ["llama", "qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3", "gpt2"]
)
def test_architectures_equal_transformers_on_the_same_file(tmp_path, architecture):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")  # without it transformers opens no GGUF
    write(tmp_path / "small.gguf", architecture)
    opened = load(tmp_path / "small.gguf")
    config = transformers.AutoConfig.for_model(**opened.config)  # it reads less than we do itself
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        config=config,
        gguf_file="small.gguf",
        dtype=torch.float32,
        attn_implementation="eager",
    )
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (2, 9))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(logits(opened, ids), expected, atol=1e-4)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    path = tmp_path_factory.mktemp("mixture") / "a.gguf"
    write(path, "qwen3moe", layers=1)
    return path


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_file_is_told_or_read_but_never_believed(tmp_path, mixture, seed):
    """Cut off, or with some bytes of the header changed, among them counts and offsets."""
    rng = np.random.default_rng(seed)
    data = bytearray(mixture.read_bytes())
    if seed % 4 == 0:
        data = data[: rng.integers(0, len(data) - 64)]
    else:
        start = rng.integers(0, 3000)
        data[start : start + 8] = struct.pack("<Q", int(rng.integers(1, 2**63)))
    (tmp_path / "b.gguf").write_bytes(data)
    try:
        file = GGUF(tmp_path / "b.gguf")
        for name in file.entries:
            file.tensor(name)
    except UserError as error:
        assert "b.gguf" in str(error)
        return
    assert seed % 4
    with contextlib.suppress(UserError):
        load(tmp_path / "b.gguf")


@pytest.fixture
def described(tmp_path_factory, mixture, monkeypatch):
    """Makes files say other things: the path of one whose metadata are changed so."""

    def describe(metadata):
        read = GGUF._read_header

        def changed(self):
            found, entries = read(self)
            return found | metadata, entries

        monkeypatch.setattr(GGUF, "_read_header", changed)
        return mixture

    return describe


AS_LLAMA = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.bos_token_id": 1}


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({"general.architecture": ["llama"]}, r"unknown architecture \['llama'\]"),
        ({"qwen3moe.block_count": 2**31}, "block_count is 2147483648, and its tensors allow 1 to"),
        ({"qwen3moe.attention.key_length": 2**31}, "key_length is 2147483648"),
        ({"qwen3moe.embedding_length": "wide"}, "embedding_length is 'wide'"),
        ({"qwen3moe.rope.freq_base": "low"}, "describes no model"),
        ({"tokenizer.ggml.bos_token_id": 40}, "bos_token_id is 40, of 40 tokens"),
        ({"tokenizer.ggml.eot_token_id": [1]}, r"eot_token_id is \[1\], of 40 tokens"),
        ({"tokenizer.ggml.model": "llama"}, "bos_token_id is None: expected one of 40 tokens"),
        (AS_LLAMA | {"tokenizer.ggml.unknown_token_id": 99}, "unknown_token_id is 99"),
        ({"tokenizer.ggml.merges": ["t1t2"]}, "'t1t2' is among the merges"),
        ({"tokenizer.ggml.merges": ["t1 x"]}, "holds a damaged tokenizer"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "holds a damaged tokenizer"),
        ({"tokenizer.chat_template": 3}, "chat_template is 3, expected a text"),
    ],
)
def test_what_is_said_wrong_is_told_with_the_file(described, metadata, told):
    with pytest.raises(UserError, match=rf"a\.gguf.*{told}"):
        load(described(metadata))


@pytest.mark.parametrize(
    ("pre", "told", "tokens"),
    [
        ("llama-bpe", {}, ["<s>", "the"]),
        ("llama3", {"tokenizer.ggml.add_bos_token": False}, ["the"]),
        ("tekken", {}, ["<s>", "the"]),
        ("qwen2", {}, ["th", "e"]),
    ],
)
def test_a_word_that_is_a_token_and_the_start_are_as_llama_cpp_has_them(pre, told, tokens):
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": ["<s>", "t", "h", "e", "th", "the"],
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.bos_token_id": 0,
    }
    found = read_tokenizer(metadata | told, Path("a.gguf"))
    assert found.encode("the").tokens == tokens


def test_all_tokens_that_end_an_answer_are_known(described):
    ends = {"tokenizer.ggml.eos_token_id": 3, "tokenizer.ggml.eom_token_id": 3}
    opened = load(described(ends | {"tokenizer.ggml.eot_token_id": 5}))
    assert Chat.of(opened).stop_ids == (3, 5)


def test_counts_larger_than_the_file_are_told_before_memory_is_taken(tmp_path):
    string, array, number = 8, 9, 0
    key = struct.pack("<Q", 1) + b"k"
    headers = {
        "tensors": struct.pack("<QQ", 2**60, 0),
        "keys": struct.pack("<QQ", 0, 2**60),
        "letters": struct.pack("<QQ", 0, 1) + key + struct.pack("<IQ", string, 2**60),
        "numbers": struct.pack("<QQ", 0, 1) + key + struct.pack("<IIQ", array, number, 2**60),
    }
    for name, header in headers.items():
        (tmp_path / name).write_bytes(b"GGUF" + struct.pack("<I", 3) + header + bytes(64))
        with pytest.raises(UserError, match="do not fit the file"):
            GGUF(tmp_path / name)


def test_what_is_wrong_is_named(tmp_path):
    write(tmp_path / "a.gguf", "llama")
    data = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "b.gguf").write_bytes(data.replace(b"llama", b"mamba"))
    with pytest.raises(UserError, match=r"unknown architecture 'mamba'; known are .*gemma2"):
        load(tmp_path / "b.gguf")
    (tmp_path / "b.gguf").write_bytes(data.replace(b"blk.1.attn_q.", b"blk.1.attn_x."))
    with pytest.raises(UserError, match=r"missing layers\.1\.self_attn\.q_proj\.weight"):
        load(tmp_path / "b.gguf")
    (tmp_path / "b.gguf").write_bytes(data.replace(b"token_embd.", b"token_embx."))
    with pytest.raises(UserError, match=r"b\.gguf lacks the tensor token_embd\.weight"):
        load(tmp_path / "b.gguf")
    (tmp_path / "b.gguf").write_bytes(b"no" + data[2:])
    with pytest.raises(UserError, match="not a GGUF file"):
        load(tmp_path / "b.gguf")


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_smollm2_equals_transformers_on_the_same_file(pretrained, stamps):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    opened = pretrained("smollm2-135m-instruct")
    folder = fetch("smollm2-135m-instruct")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    captions = {caption for stamp in stamps for caption in stamp.captions.values()}
    captions = sorted(captions)[::20]
    differ = [
        text for text in captions if opened.tokenizer.encode(text).ids != tokenizer(text).input_ids
    ]
    # SmolLM2 cuts digits off first, as its own tokenizer.json and llama.cpp do; transformers does
    # not read that from a GGUF, which shows where several spaces precede a digit
    assert all(any(letter.isdigit() for letter in text) for text in differ)
    assert len(differ) < len(captions) / 500
    assert opened.chat_template == tokenizer.chat_template
    talk = [{"role": "user", "content": "What is a badger?"}]
    prompt = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    ids = np.array([tokenizer(prompt).input_ids])
    assert opened.tokenizer.encode(prompt).ids == ids[0].tolist()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", dtype=torch.float32
    )
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    found = logits(opened, ids)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))

"""What a recipe made small is exported small, and says what it says here."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fusion_jax.__main__ import main
from fusion_jax.compression import storage
from fusion_jax.compression.quantization import is_compressed, is_table, kernels, rounded_rest
from fusion_jax.compression.recipes import Calibration, parse
from fusion_jax.compression.running import running
from fusion_jax.deployment import decoders as folders
from fusion_jax.deployment import export, stablehlo
from fusion_jax.deployment.runtime.artifact import Artifact
from fusion_jax.deployment.runtime.generation import Generator
from fusion_jax.errors import UserError
from fusion_jax.language.prompt import text_mask
from fusion_jax.pretrained.load import family_of, load
from fusion_jax.pretrained.save import save
from fusion_jax.tokens import Tokens
from fusion_jax.training import experiment as experiments
from fusion_jax.training import loop, state
from fusion_jax.training.sharding import make_mesh

FUSED = Path(__file__).parents[1] / "compression" / "fused.py"
CONFIG = {
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": [1],
    "tie_word_embeddings": True,
}
IDS = np.array([[5, 9, 2, 40, 7]], np.int32)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir after a step, and its experiment's module, settings and params."""
    folder = tmp_path_factory.mktemp("runs")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    family = family_of(CONFIG)
    init = jax.jit(family.build(CONFIG).init)
    params = init(jax.random.key(0), *family.inputs(CONFIG))["params"]
    save(folder / "lm", params, CONFIG, tokenizer=tokenizer, chat_template="{{ messages }}")
    module = experiments.load_file(FUSED)
    settings = module.Settings(steps=1, language_model=str(folder / "lm"))
    with experiments.open_workdir(folder / "run", FUSED, settings):
        loop.train(module.build(settings), settings, folder / "run")
    experiment = module.build(settings)
    params = loop.restore_params(experiment, settings, folder / "run")
    # Adapters that change what is said; after one step they would hardly.
    for layer in params["lora"]["decoder"]["transformer"]["layer_0"]["attention"].values():
        layer["lora_b"] = 0.1 * jax.random.normal(jax.random.key(1), layer["lora_b"].shape)
    return folder / "run", module, settings, params


def small_assistant(run, recipe):
    _, module, settings, params = run
    experiment = module.build(settings)
    calibration = Calibration(experiment.objective, [experiment.data[0]])
    return module.assistant(settings, parse(recipe)(params, calibration))


def logits(model, params):
    with running():
        hidden, _ = model.apply({"params": params}, IDS, text_mask(IDS >= 0))
        return model.apply({"params": params}, hidden[:, -1:], method="logits")[:, 0]


def test_an_int8_run_is_exported_at_most_0_30_as_large(run, capsys):
    workdir, *_ = run
    small = workdir.with_name("small")
    how = ["--batches", "1", "--recipe", "int8", "--output", str(small)]
    assert main(["compress", "--workdir", str(workdir), *how]) == 0
    sizes = {}
    for place in (workdir, small):
        artifact = place.with_name(f"{place.name}-artifact")
        assert main(["export", "--workdir", str(place), str(artifact)]) == 0
        sizes[place] = (artifact / "weights.safetensors").stat().st_size
    assert sizes[small] <= 0.30 * sizes[workdir]
    card = json.loads((small.with_name("small-artifact") / "card.json").read_text())
    assert card["compressed"]["recipes"] == ["int8"]


@pytest.mark.parametrize(
    ("recipe", "format"),
    [
        ("int8-activations", "gguf"),
        ("int4", "transformers"),
        ("fp8", "transformers"),
        ("low-rank-0.5", "gguf"),
    ],
)
def test_every_kind_of_kernel_is_served_and_written_for_others(
    run, recipe, format, tmp_path, monkeypatch
):
    monkeypatch.setattr(stablehlo, "PLATFORMS", ("cpu",))  # the others are tested, and take long
    assistant = small_assistant(run, recipe)
    expected = logits(assistant.model, assistant.params)
    with running():
        stablehlo.write(tmp_path / "artifact", "small", assistant, {})
    artifact = Artifact(tmp_path / "artifact")
    empty = Generator(artifact, rows=1, slots=8)._empty(1, 8)
    media = np.zeros((1, 1, CONFIG["hidden_size"]), np.float32)
    mask = np.ones(IDS.shape, bool)
    found, _ = artifact.functions["prefill"](artifact.params("prefill"), IDS, mask, media, empty)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    place = tmp_path / f"other.{format}"
    folders.write(place, assistant, format, "float32")
    other = load(place)
    tolerance = 0.1 if recipe == "int8-activations" else 1e-4  # others round no activations
    np.testing.assert_allclose(logits(other.module, other.params), expected, atol=tolerance)


def test_adapters_are_trained_on_a_base_of_few_bits_by_one_setting(run, tmp_path, capsys):
    _, module, settings, _ = run
    flags = ["--language-model", settings.language_model, "--steps", "2", "--no-tensorboard"]
    train = ["train", str(FUSED), *flags, "--workdir"]
    assert main([*train, str(tmp_path / "run"), "--base", "nf4"]) == 0
    _, own = experiments.reopen(tmp_path / "run")
    params = loop.restore_params(module.build(own), own, tmp_path / "run")
    base = params["base"]["decoder"]
    assert {leaf.kind for leaf in kernels(base).values()} == {"nf4"}
    assert len(kernels(base)) == 8 and storage.size(base) < 0.2 * 4 * sum(
        np.prod(leaf.shape) for leaf in flatten_dict(base).values()
    )
    assert main(["export", "--workdir", str(tmp_path / "run"), str(tmp_path / "artifact")]) == 0
    with pytest.raises(UserError, match="attention/query/kernel is trained, and kept in few bits"):
        state.plan_state(dataclasses.replace(module.build(own), trainable="query"), make_mesh())
    capsys.readouterr()
    assert main([*train, str(tmp_path / "other"), "--base", "stored"]) == 2
    assert "only a GGUF file has them" in capsys.readouterr().err
    how = ["--workdir", str(tmp_path / "run"), "--recipe", "structured-0.5"]
    assert main(["compress", *how]) == 2 and "full numbers" in capsys.readouterr().err


def test_towers_that_the_export_brings_along_are_rounded_as_the_rest(classifier, tmp_path):
    """Nothing of this classifier was rounded by a recipe; its answers are nearly the same."""
    small = export._as_compressed(classifier, ["prune-0.5", "int8"])
    kept = flatten_dict(small.params, sep="/")
    rounded = [path for path, leaf in kept.items() if is_compressed(leaf)]
    assert "encoders_image/patch_embedding/kernel" in rounded
    assert [path for path in rounded if path.startswith("encoders_text") and is_table(path)]
    assert export._as_compressed(classifier, ["prune-0.5"]) is classifier
    stablehlo.write(tmp_path / "small", "small", small, {})
    artifact, rng = Artifact(tmp_path / "small"), np.random.default_rng(0)
    raw = {
        "image": (rng.random((2, 8, 8, 3), np.float32), np.ones(2, bool)),
        "audio": (rng.normal(size=(2, 2000)).astype(np.float32), np.ones((2, 2000), bool)),
        "text": (rng.integers(3, 259, (2, 9)).astype(np.int32), np.ones((2, 9), bool)),
    }
    given = {name: {"values": values, "mask": mask} for name, (values, mask) in raw.items()}
    found = artifact.functions["predict"](artifact.params("predict"), given)
    here = classifier.apply(classifier.params, {n: Tokens(*each) for n, each in raw.items()})
    for name, expected in here.items():
        assert 0 < np.abs(found[name] - expected).max() < 0.02 * np.abs(expected).max() + 0.02


def test_kernels_of_convolutions_are_rounded_and_slim_ones_are_not():
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(3, 3, 32, 8)).astype(np.float32)
    params = {"wide": {"kernel": wide, "bias": wide[0, 0, 0]}, "slim": {"kernel": wide[:, :, :1]}}
    small = rounded_rest(params, "int8")
    assert is_compressed(small["wide"]["kernel"]) and small["slim"] is not None
    assert not is_compressed(small["slim"]["kernel"]) and not is_compressed(small["wide"]["bias"])
    step = np.abs(wide).max(axis=2, keepdims=True) / 127
    assert (np.abs(np.asarray(small["wide"]["kernel"]) - wide) <= 0.51 * step).all()

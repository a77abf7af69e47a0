"""The main job from its command, on a table of one's own, from reading files to plots."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from experiments import trimodal
from fusion_jax.__main__ import main
from fusion_jax.tokens import Tokens
from fusion_jax.training.partition import paths


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Forty things of two kinds; a third lack a picture, a recording or a text."""
    folder, rng = tmp_path_factory.mktemp("table"), np.random.default_rng(0)
    rows = []
    for index in range(40):
        kind = index % 2
        pixels = rng.integers(0, 80, (24, 30, 3)) + 150 * kind
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
        pitch = np.sin(np.arange(4000) * (0.1 + 0.2 * kind)) + 0.1 * rng.normal(size=4000)
        soundfile.write(folder / f"{index}.wav", pitch * 0.5, 16_000)
        row = {
            "image": f"{index}.png",
            "audio": f"{index}.wav",
            "text": f"thing {index} " + ("dark", "light")[kind],
            "label": ("night", "day")[kind],
        }
        if index % 3 == 0:
            row.pop(("image", "audio", "text")[index // 3 % 3])
        rows.append(row)
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_trains_on_a_table_with_absent_modalities(table, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FUSION_JAX_HOME", str(tmp_path / "home"))
    flags = ["--towers", "scratch", "--width", "16", "--steps", "2", "--batch-size", "8"]
    flags += ["--layers", "1", "--no-tensorboard"]
    flags += ["--table", str(table), "--workdir", str(tmp_path / "run")]
    assert main(["train", "experiments/trimodal.py", *flags]) == 0
    said = capsys.readouterr().out
    assert "audio+image+text" in said and "image->text" in said and "mine.jsonl" in said
    report = tmp_path / "run" / "report"
    numbers = json.loads((report / "metrics.json").read_text())
    assert len([name for name in numbers if name.startswith("gated/accuracy/")]) == 7
    assert all(0 <= numbers[name] <= 1 for name in numbers if "/accuracy/" in name)
    for plot in ("accuracy", "retrieval", "calibration", "shared_space"):
        with Image.open(report / f"{plot}.png") as picture:
            assert picture.width > 200

    broken = table.with_name("broken.jsonl")
    broken.write_text(table.read_text() + '{"image": "nowhere.png", "label": "day"}\n')
    flags = [*flags[:-3], str(broken), "--workdir", str(tmp_path / "other")]
    assert main(["train", "experiments/trimodal.py", *flags]) == 2
    assert "nowhere.png" in capsys.readouterr().err.splitlines()[-1]


def test_alike_tokens_are_merged_before_fusion_reads_them(table):
    s = trimodal.Settings(towers="scratch", width=16, layers=1, table=table, merge_to=3)
    source, _, _ = trimodal.read_data(s)
    _, encoders, transforms, _ = trimodal.build_towers(s, source, [0])
    for name, encoder in encoders.items():
        shape = transforms[name].shape
        mask = (1,) if name == "image" else (1, *shape)
        raw = Tokens(jnp.zeros((1, *shape), transforms[name].dtype), jnp.ones(mask, bool))
        tokens, _ = jax.eval_shape(encoder.init_with_output, jax.random.key(0), raw)
        assert tokens.mask.shape == (1, 3)


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_other_published_towers_by_one_setting_each(table, tmp_path, monkeypatch, capsys):
    """CLIP for pictures and text, Whisper for sound, as folders that transformers wrote."""
    pytest.importorskip("transformers")
    from experiments.benchmarks.parity_cases import CASES, VOCABULARY

    monkeypatch.setenv("FUSION_JAX_HOME", str(tmp_path / "home"))
    for name in ("clip", "whisper"):
        case = CASES[name]()
        case.model(case.config).save_pretrained(tmp_path / name)
    words = {"[UNK]": 0, **{f"word {i}": i for i in range(1, VOCABULARY)}}
    Tokenizer(WordLevel(words, "[UNK]")).save(str(tmp_path / "clip" / "tokenizer.json"))
    flags = ["--image-tower", str(tmp_path / "clip"), "--text-tower", str(tmp_path / "clip")]
    flags += ["--audio-tower", str(tmp_path / "whisper"), "--views", "1", "--width", "16"]
    flags += ["--table", str(table), "--workdir", str(tmp_path / "run"), "--no-tensorboard"]
    flags += ["--steps", "2", "--batch-size", "8"]
    assert main(["train", "experiments/trimodal.py", *flags]) == 0
    said = capsys.readouterr().out
    assert "linear probe" in said and "image->text" in said
    fine = trimodal.Settings(
        towers="finetune",
        image_tower=str(tmp_path / "clip"),
        text_tower=str(tmp_path / "clip"),
        audio_tower=str(tmp_path / "whisper"),
        table=table,
        merge_to=4,
    )
    source, _, _ = trimodal.read_data(fine)
    _, encoders, transforms, published = trimodal.build_towers(fine, source, [0])
    raw = Tokens(jnp.zeros((1, *transforms["image"].shape)), jnp.ones(1, bool))
    params = jax.eval_shape(encoders["image"].init, jax.random.key(0), raw)["params"]
    assert paths(published["encoders_image"]).keys() < paths(params).keys()
    wrong = [*flags[:4], "--audio-tower", str(tmp_path / "clip"), *flags[6:]]
    assert main(["train", "experiments/trimodal.py", *wrong, "--overwrite"]) == 2
    assert "audio" in capsys.readouterr().err.splitlines()[-1]

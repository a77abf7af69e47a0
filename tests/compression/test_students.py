"""Recipes that make another model: fewer heads, channels and layers, taught by the trained run."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from tokenizers import Tokenizer, models, pre_tokenizers

from fusion_jax.__main__ import main
from fusion_jax.compression import imitation, storage, students
from fusion_jax.compression.students import Run
from fusion_jax.deployment import export
from fusion_jax.errors import UserError
from fusion_jax.pretrained.load import family_of, load
from fusion_jax.pretrained.save import save
from fusion_jax.training import experiment as experiments
from fusion_jax.training import loop

FUSED = Path(__file__).with_name("fused.py")
TINY = Path(__file__).parents[1] / "training" / "tiny.py"
CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": [1, 2, 5, 6],
    "tie_word_embeddings": True,
}


def make(folder: Path, config: dict) -> Path:
    words = {f"w{i}": i for i in range(config["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    family = family_of(config)
    init = jax.jit(family.build(config).init)
    params = init(jax.random.key(0), *family.inputs(config))["params"]
    save(folder, params, config, tokenizer=tokenizer, chat_template="{{ messages[0].content }}")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir whose adapters were trained."""
    folder = tmp_path_factory.mktemp("runs")
    made = make(folder / "lm", CONFIG)
    module = experiments.load_file(FUSED)
    settings = module.Settings(language_model=str(made))
    with experiments.open_workdir(folder / "run", FUSED, settings):
        loop.train(module.build(settings), settings, folder / "run")
    return folder / "run"


def opened(workdir: Path) -> Run:
    module, settings = experiments.reopen(workdir)
    run = Run(module, settings, None)
    return Run(module, settings, loop.restore_params(run.experiment, settings, workdir))


def test_narrowed_and_distilled_workdirs_open_and_answer(trained, capsys):
    arguments = ["--workdir", str(trained), "--batches", "1"]
    both = ["--recipe", "structured-0.5", "--recipe", "distil-0.5", "--recipe", "int8"]
    student = ["--student", "steps=60", "learning-rate=1e-2"]
    small = trained.with_name("small")
    assert main(["compress", *arguments, *both, *student, "--output", str(small)]) == 0
    rows = json.loads((small / "compression.json").read_text())["rows"]
    before, after = rows.values()
    assert after["file MB"] < 0.6 * before["file MB"]
    assert not trained.with_name("small-unfinished").exists()

    config = json.loads((small / "model" / "config.json").read_text())
    expected = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    expected |= {"intermediate_size": 16, "head_dim": 4, "eos_token_id": [1, 2, 5, 6]}
    assert {name: config[name] for name in expected} == expected
    params = storage.read(small / storage.FILE)
    layers = params["base"]["decoder"]["transformer"]
    assert set(layers) == {"layer_0", "layer_1", "final_norm"}
    assert layers["layer_0"]["attention"]["query"]["kernel"].shape == (16, 8)
    assert params["lora"]["decoder"]["transformer"]["layer_1"]["attention"]["out"][
        "lora_a"
    ].shape == (8, 2)

    moved = small.rename(small.with_name("moved"))  # nothing in it says where it was made
    assert main(["evaluate", "--workdir", str(moved)]) == 0
    again = json.loads((moved / "report" / "metrics.json").read_text())
    assert again["accuracy"] == after["accuracy"] > 0.9  # counting is learned by the student
    capsys.readouterr()
    assert main(["ask", "--workdir", str(moved), "--max-tokens", "3", "w9 w10 w11"]) == 0
    assert capsys.readouterr().out.split() == ["w12", "w13", "w14"]
    question = ["ask", "--workdir", str(trained), "--max-tokens", "9", "w30 w31 w32"]
    assert main(question) == 0  # the teacher, and the same with the student's guesses
    alone = capsys.readouterr().out
    assert main([*question, "--draft", str(moved)]) == 0
    assert capsys.readouterr().out == alone
    assert main([*question, "--draft", str(moved), "--temperature", "1"]) == 2
    assert "a draft guesses the likeliest words" in capsys.readouterr().err
    more = moved.with_name("more")  # of one whose model is its own, and nothing is taken away
    again = ["compress", "--workdir", str(moved), "--batches", "1", "--output", str(more)]
    assert main([*again, "--recipe", "structured-1", "--recipe", "distil-1"]) == 0
    jax.tree.map(np.testing.assert_array_equal, storage.read(more / storage.FILE), params)
    _, card = export.opened(more)
    assert card["compressed"]["recipes"][-1] == "distil-1" and card["metrics"]["accuracy"] > 0.9


def test_what_is_left_computes_as_before_with_its_adapters(trained, tmp_path):
    run = opened(trained)
    flat = flatten_dict(run.params, sep="/")
    for path in flat:  # what is about to be removed writes nothing
        if "attention/out/kernel" in path or "mlp/down/kernel" in path:
            flat[path] = flat[path].at[: flat[path].shape[0] // 2].set(0)
        if path.endswith("out/lora_a"):
            flat[path] = flat[path].at[: flat[path].shape[0] // 2].set(0)
    params = unflatten_dict(flat, sep="/")
    run = Run(run.module, run.settings, params)
    calibration = students.Calibration(run.experiment.objective, [run.experiment.data[0]])
    small = students.narrowed(run, 0.5, tmp_path / "model", calibration)
    sizes = [sum(x.size for x in jax.tree.leaves(r.params)) for r in (run, small)]
    assert sizes[1] < 0.8 * sizes[0]
    before = run.experiment.report(run.params, tmp_path)
    after = small.experiment.report(small.params, tmp_path)
    np.testing.assert_allclose(before["perplexity"], after["perplexity"], rtol=1e-5)
    assert load(str(tmp_path / "model")).params  # as published


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(trained):
    run = opened(trained)
    objective = imitation.imitate(run.experiment.objective, run.experiment.objective)
    maps = imitation._maps(run, run, jax.random.key(0))
    batch = {**run.experiment.data[0], "step": np.int32(0)}

    def parts(params):
        return objective({**params, imitation.TEACHER: run.params} | maps, batch, jax.random.key(0))

    _, metrics = jax.jit(parts)(run.params)
    assert abs(metrics["soft_targets"]) < 1e-6 and metrics["hidden_states"] < 1e-9
    np.testing.assert_allclose(metrics["own"], np.log(metrics["perplexity"]), rtol=1e-5)
    flat = flatten_dict(run.params, sep="/")
    path = "base/decoder/transformer/layer_2/mlp/down/kernel"
    other = unflatten_dict(flat | {path: flat[path] * 2}, sep="/")
    _, metrics = jax.jit(parts)(other)
    assert metrics["soft_targets"] > 1e-4 and metrics["hidden_states"] > 1e-4

    def every_word(params):  # the same in one piece
        both = []
        for each in (params, run.params):
            (_, _), (seen,) = imitation.watched(run.experiment.objective)(
                each, batch, jax.random.key(0)
            )
            both.append(seen.logits(seen.outputs.hidden)[:, :-1])
        weights = batch["weight"].values[:, 1:]
        return imitation.soft_targets(*both, weights, temperature=imitation.TEMPERATURE)

    np.testing.assert_allclose(jax.jit(every_word)(other), metrics["soft_targets"], rtol=1e-5)


def test_a_model_without_words_is_taught_too_and_resumes(tmp_path, monkeypatch, capsys):
    run = tmp_path / "tiny"
    flags = ["--steps", "20", "--no-tensorboard", "--checkpoint-every", "5"]
    assert main(["train", str(TINY), "--workdir", str(run), *flags]) == 0
    command = ["compress", "--workdir", str(run), "--recipe", "distil-0.5", "--batches", "1"]
    command += ["--quality", "fit", "--student", "checkpoint-every=5"]
    steps = []
    put = loop.put_batch

    def killed(batch, mesh):
        steps.append(len(steps))
        if len(steps) == 13:
            raise KeyboardInterrupt
        return put(batch, mesh)

    monkeypatch.setattr(loop, "put_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        main(command)
    assert main([*command, "steps=7"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert f"{tmp_path}/tiny-distil-0.5-unfinished holds a student" in told
    assert "--overwrite" not in told
    assert main(command) == 0
    assert 20 < len(steps) < 33  # it did not start over
    small = storage.read(tmp_path / "tiny-distil-0.5" / storage.FILE)
    assert small["hidden"]["kernel"].shape == (4, 4) and set(small) == {"hidden", "out"}
    settings = json.loads((tmp_path / "tiny-distil-0.5" / "run.json").read_text())["settings"]
    assert settings["width"] == 4


def test_bad_input_is_one_line(trained, tmp_path, capsys):
    cases = {
        "come before": ["--recipe", "int8", "--recipe", "distil-0.5"],
        "expected a share": ["--recipe", "structured-1.5"],
    }
    for message, arguments in cases.items():
        output = ["--output", str(tmp_path / "no")]
        assert main(["compress", "--workdir", str(trained), *arguments, *output]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
    gpt2 = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4}
    gpt2 |= {"n_positions": 64}
    module = experiments.load_file(FUSED)
    settings = module.Settings(language_model=str(make(tmp_path / "gpt2", gpt2)))
    run = Run(module, settings, None)
    run = Run(module, settings, jax.jit(run.experiment.init)(jax.random.key(0)))
    calibration = students.Calibration(run.experiment.objective, [run.experiment.data[0]])
    with pytest.raises(UserError, match="no words for"):
        students.narrowed(run, 0.5, tmp_path / "small", calibration)
    assert students.shallower(run, 0.5, tmp_path / "half").experiment.init

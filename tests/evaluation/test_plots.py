import numpy as np
import pytest
from PIL import Image

from fusion_jax.errors import UserError
from fusion_jax.evaluation import plots
from fusion_jax.evaluation.calibration import reliability
from fusion_jax.evaluation.retrieval import retrieval

RNG = np.random.default_rng(0)
THINGS = RNG.normal(size=(40, 6))
EMBEDDINGS = {name: THINGS + RNG.normal(size=(40, 6)) for name in ("audio", "image", "text")}
PRESENT = {name: RNG.uniform(size=40) < 0.8 for name in EMBEDDINGS}
LABELS = RNG.integers(-1, 10, 40)
ROWS = [{"step": step, "loss": 1 / step} for step in range(1, 50)]
ROWS[9]["accuracy"] = ROWS[30]["accuracy"] = 0.5

DRAW = {
    "bars": lambda path: plots.bars(
        path,
        {"image": [0.7, 0.75], "text": [0.8, 0.81]},
        "Accuracy",
        "accuracy",
        ("majority", 0.3),
    ),
    "retrieval": lambda path: plots.retrieval_bars(
        path, retrieval(EMBEDDINGS, PRESENT, np.arange(40)), "Retrieval"
    ),
    "reliability": lambda path: plots.reliability_diagram(
        path, reliability(RNG.normal(size=(200, 4)), RNG.integers(0, 4, 200)), "All"
    ),
    "map": lambda path: plots.embedding_map(
        path, EMBEDDINGS, PRESENT, LABELS, [f"class {n}" for n in range(10)], "Shared space"
    ),
    "curves": lambda path: plots.training_curves(path, ROWS),
}


@pytest.mark.parametrize("name", DRAW)
def test_draws_a_whole_png(name, tmp_path):
    path = tmp_path / "plots" / f"{name}.png"
    DRAW[name](path)
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("L"))
    assert min(pixels.shape) > 100 and (pixels < 128).sum() > 200
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_failing_save_keeps_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    plots.training_curves(path, ROWS)
    before = path.read_bytes()

    def full_disk(self, file, **settings):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(plots.FigureCanvasAgg, "print_figure", full_disk)
    with pytest.raises(OSError, match="no space"):
        plots.training_curves(path, ROWS[:5])
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_principal_axes_find_a_tilted_plane():
    flat = RNG.normal(size=(100, 2)) * [5, 2]
    turn = np.linalg.qr(RNG.normal(size=(7, 7)))[0][:2]
    found = plots.principal_axes(flat @ turn + 3)
    distances = lambda x: np.linalg.norm(x[:, None] - x[None], axis=-1)  # noqa: E731
    np.testing.assert_allclose(distances(found), distances(flat), atol=1e-9)
    assert found.var(axis=0)[0] > found.var(axis=0)[1]


def test_nothing_to_draw_is_an_error():
    with pytest.raises(UserError, match=r"\['acc'\].*\['loss', 'accuracy'\]"):
        plots.training_curves("x.png", ROWS, ["acc"])
    with pytest.raises(UserError, match="no values"):
        plots.bars("x.png", {}, "Accuracy", "accuracy")

"""Pictures of results, drawn without a display and saved as PNG in one move."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fusion_jax.errors import UserError
from fusion_jax.evaluation.calibration import Reliability
from fusion_jax.evaluation.retrieval import unit
from fusion_jax.paths import replacing

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#444444"]
MARKERS = "os^Dv*PX"


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG that is either whole or not there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft:
        FigureCanvasAgg(figure).print_figure(draft, format="png", dpi=120)


def panel(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot(title=title)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def bars(
    path: Path,
    values: Mapping[str, float | Sequence[float]],
    title: str,
    measure: str,
    baseline: tuple[str, float] | None = None,
) -> None:
    """One bar for each name: its value, or the mean and deviation of one value a seed.

    `baseline` (name, value) is drawn as a line. Raises UserError if there is nothing to draw.
    """
    if not values:
        raise UserError(f"the plot {title!r} was given no values")
    figure, axes = panel(6.5, 1.2 + 0.4 * len(values), title)
    seeds = [np.atleast_1d(np.asarray(value, np.float64)) for value in values.values()]
    means = [value.mean() for value in seeds]
    spread = [value.std(ddof=1) if len(value) > 1 else 0.0 for value in seeds]
    drawn = axes.barh(list(values), means, xerr=spread if any(spread) else None, color=COLOURS[0])
    labels = [
        f"{mean:.3f}" + (f" ± {deviation:.3f}" if deviation else "")
        for mean, deviation in zip(means, spread, strict=True)
    ]
    axes.bar_label(drawn, labels, padding=4, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel(measure)
    if baseline is not None:
        axes.axvline(baseline[1], color=COLOURS[5], linestyle="--", label=baseline[0])
        figure.legend(loc="outside lower right", fontsize=8, frameon=False)
    save(figure, path)


def intervals(
    path: Path,
    values: Mapping[str, Mapping[str, tuple[float, float, float]]],
    title: str,
    measure: str,
) -> None:
    """{row: {series: (value, low, high)}}: a line a row, and a point with its interval a series.

    Raises UserError if there is nothing to draw.
    """
    series = list(dict.fromkeys(name for row in values.values() for name in row))
    if not series:
        raise UserError(f"the plot {title!r} was given no values")
    figure, axes = panel(6.5, 1.2 + 0.18 * len(values) * (1 + len(series)), title)
    looks = zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS), series, strict=False)
    for index, (colour, marker, name) in enumerate(looks):
        rows = [place for place, row in enumerate(values.values()) if name in row]
        bounds = np.asarray([row[name] for row in values.values() if name in row], np.float64)
        middle, low, high = bounds.T
        heights = np.asarray(rows) + (index - (len(series) - 1) / 2) * 0.6 / len(series)
        error = np.stack([middle - low, high - middle]).clip(0)
        axes.errorbar(middle, heights, xerr=error, fmt=marker, color=colour, label=name, ms=4, lw=1)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.set_xlabel(measure)
    figure.legend(loc="outside lower right", fontsize=8, frameon=False, ncols=len(series))
    save(figure, path)


def retrieval_bars(path: Path, results: Mapping[str, Mapping[str, float]], title: str) -> None:
    """R@k of every direction side by side, from `evaluation.retrieval.retrieval`."""
    if not results:
        raise UserError(f"the plot {title!r} was given no direction of retrieval")
    figure, axes = panel(2 + 1.3 * len(results), 3.6, title)
    ks = [name for name in next(iter(results.values())) if name.startswith("R@")]
    width = 0.8 / len(ks)
    for index, k in enumerate(ks):
        places = np.arange(len(results)) + (index - (len(ks) - 1) / 2) * width
        heights = [result[k] for result in results.values()]
        drawn = axes.bar(places, heights, width, label=k, color=COLOURS[index])
        axes.bar_label(drawn, [f"{height:.2f}" for height in heights], fontsize=7)
    names = [name.replace("->", "\n→ ") for name in results]
    axes.set_xticks(np.arange(len(results)), names)
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("share of queries")
    axes.legend(ncols=len(ks), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    save(figure, path)


def reliability_diagram(path: Path, reliability: Reliability, title: str) -> None:
    """Accuracy against confidence by bin, and how many rows each bin has."""
    figure, axes = panel(4.5, 4.5, f"{title}: calibration error {reliability.error:.3f}")
    bins = len(reliability.count)
    centres = (np.arange(bins) + 0.5) / bins
    share = reliability.count / max(reliability.count.sum(), 1)
    axes.bar(centres, share, 1 / bins, color="#DDDDDD", label="share of rows")
    axes.plot([0, 1], [0, 1], color=COLOURS[7], linestyle="--", linewidth=1, label="calibrated")
    axes.plot(
        reliability.confidence, reliability.accuracy, "o-", color=COLOURS[0], label="accuracy"
    )
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")
    axes.legend(loc="upper left", fontsize=8)
    save(figure, path)


def principal_axes(rows: np.ndarray) -> np.ndarray:
    """Rows [n, d] in their two directions of largest variance, [n, 2] (PCA)."""
    centred = rows - rows.mean(axis=0)
    left, scale, _ = np.linalg.svd(centred, full_matrices=False)
    flat = (left * scale)[:, :2]
    return np.pad(flat, [(0, 0), (0, 2 - flat.shape[1])])


def embedding_map(
    path: Path,
    embeddings: Mapping[str, np.ndarray],
    present: Mapping[str, np.ndarray],
    labels: np.ndarray,
    classes: Sequence[str],
    title: str,
) -> None:
    """The shared space in two dimensions: markers tell modalities, colours the commonest classes.

    embeddings {name: [n, d]}, present {name: bool [n]}, labels int [n] into `classes`. Where
    modalities of one thing are near each other, the space is shared.
    """
    names = sorted(embeddings)
    rows = {name: np.flatnonzero(np.asarray(present[name], bool)) for name in names}
    if sum(map(len, rows.values())) < 2:
        raise UserError(f"the plot {title!r} needs two embeddings or more")
    flat = principal_axes(np.concatenate([unit(embeddings[name][rows[name]]) for name in names]))
    parts = np.split(flat, np.cumsum([len(rows[name]) for name in names])[:-1])
    common = np.argsort(-np.bincount(labels[labels >= 0], minlength=len(classes)))
    common = common[: len(COLOURS) - 1]
    figure, axes = panel(7.5, 5, title)
    for marker, name, points in zip(itertools.cycle(MARKERS), names, parts, strict=False):
        kinds = labels[rows[name]]
        for colour, kind in [("#CCCCCC", None), *zip(COLOURS, common, strict=False)]:
            chosen = ~np.isin(kinds, common) if kind is None else kinds == kind
            axes.scatter(*points[chosen].T, s=14, marker=marker, color=colour, alpha=0.7, lw=0)
    for marker, name in zip(itertools.cycle(MARKERS), names, strict=False):
        axes.scatter([], [], marker=marker, color="#444444", s=24, label=name)
    for colour, kind in zip(COLOURS, common, strict=False):
        axes.scatter([], [], marker="s", color=colour, s=24, label=classes[kind])
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
    axes.set(xticks=[], yticks=[], xlabel="first principal axis", ylabel="second")
    save(figure, path)


def domain_maps(
    path: Path,
    panels: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]],
    classes: Sequence[str],
) -> None:
    """Two domains' features side by side, before and after adapting: {panel: {domain: both}}.

    Both are features [n, d] and labels int [n]. Markers tell the domains, colours the commonest
    classes; each panel has principal axes of its own.
    """
    figure = Figure(figsize=(1.5 + 4.5 * len(panels), 4.5), layout="constrained")
    every = np.concatenate([labels for row in panels.values() for _, labels in row.values()])
    common = np.argsort(-np.bincount(every[every >= 0], minlength=len(classes)))
    common = common[: len(COLOURS) - 1]
    domains = list(dict.fromkeys(name for row in panels.values() for name in row))
    panes = figure.subplots(1, len(panels), squeeze=False).flatten()
    for pane, (title, row) in zip(panes, panels.items(), strict=True):
        flat = principal_axes(np.concatenate([unit(features) for features, _ in row.values()]))
        start = 0
        for name, (features, labels) in row.items():
            points, start = flat[start : start + len(features)], start + len(features)
            marker = MARKERS[domains.index(name)]
            for colour, kind in [("#CCCCCC", None), *zip(COLOURS, common, strict=False)]:
                chosen = ~np.isin(labels, common) if kind is None else labels == kind
                pane.scatter(*points[chosen].T, s=12, marker=marker, color=colour, alpha=0.6, lw=0)
        pane.set(title=title, xticks=[], yticks=[])
        pane.spines[["top", "right"]].set_visible(False)
    for marker, name in zip(MARKERS, domains, strict=False):
        panes[-1].scatter([], [], marker=marker, color="#444444", s=24, label=name)
    for colour, kind in zip(COLOURS, common, strict=False):
        panes[-1].scatter([], [], marker="s", color=colour, s=24, label=classes[kind])
    panes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
    save(figure, path)


def training_curves(
    path: Path, rows: Sequence[Mapping[str, float]], names: Sequence[str] | None = None
) -> None:
    """One panel for each metric of `training.metrics.read_metrics`, or for those of `names`.

    Raises UserError if a name was never logged, naming those that were.
    """
    logged = list(dict.fromkeys(name for row in rows for name in row if name != "step"))
    names = logged if names is None else list(names)
    unknown = [name for name in names if name not in logged]
    if unknown or not names:
        raise UserError(f"no metric {unknown} to draw was logged; there are {logged}")
    columns = min(3, len(names))
    lines = math.ceil(len(names) / columns)
    figure = Figure(figsize=(4 * columns, 2.6 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel, name in zip(panels, names, strict=False):
        points = [(row["step"], row[name]) for row in rows if name in row]
        steps, values = zip(*points, strict=True)
        marker = "o" if len(points) < 30 else None
        panel.plot(steps, values, color=COLOURS[0], marker=marker, markersize=3, linewidth=1)
        panel.set_title(name, fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlabel("step", fontsize=8)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    save(figure, path)

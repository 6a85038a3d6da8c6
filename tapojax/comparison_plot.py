"""The picture of a comparison: every measure over sampled rows, one colour a variant, in small panels."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from tapojax import comparison
from tapojax.comparison import Run, Runs

Curve = tuple[Float[np.ndarray, "_"], Float[np.ndarray, "_"]]  # curves of several runs differ in length

# Okabe and Ito's colours, told apart by colour-blind readers; the baseline is black
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", ":", "-.")  # each for a round of colours
MAX_BANDS = 4  # with more variants only the first and the baseline have one
SMOOTHED = 20  # entropy is a running mean over a twentieth of the steps
LABELS = {"pass@1": "held-out pass@1", "mean_length": "completion length, tokens", "entropy": "entropy, nats a token"}


def evaluation_curve(run: Run, name: str) -> Curve:
    """(sampled rows, value) of a measure of the evaluations."""
    points = [(comparison.sampled_rows(run, e["step"]), e.get(name)) for e in run.evaluations]
    found = [(x, y["mean"] if isinstance(y, Mapping) else y) for x, y in points]
    return _curve([(x, y) for x, y in found if y is not None])


def entropy_curve(run: Run) -> Curve:
    """(sampled rows, running mean of the entropy) of the training steps."""
    rows = np.cumsum([record["sampled_rows"] for record in run.metrics])
    points = [(x, record["entropy"]) for x, record in zip(rows, run.metrics, strict=True)]
    x, y = _curve([(x, y) for x, y in points if y is not None])
    width = max(1, min(len(run.metrics) // SMOOTHED, len(y)))
    return x[width - 1 :], np.convolve(y, np.full(width, 1 / width), "valid") if len(y) else y


def _curve(points: Sequence[tuple]) -> Curve:
    return np.array([x for x, _ in points], float), np.array([y for _, y in points], float)


def mean_curve(
    curves: Sequence[Curve], until: float | int = np.inf
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "3 n"]]:
    """Mean over seeds with its 95 % t-interval, as far as all of them go and `until`; NaN intervals of a single seed.

    Seeds of a dynamic-sampling run are measured at different rows: each is interpolated linearly at the points of all.
    """
    curves = [curve for curve in curves if len(curve[0])]
    if not curves:
        return np.zeros(0), np.zeros((3, 0))
    low, high = max(x[0] for x, _ in curves), min([until, *(x[-1] for x, _ in curves)])
    grid = np.unique(np.concatenate([*(x for x, _ in curves), [high]]))
    grid = grid[(grid >= low) & (grid <= high)]
    values = np.stack([np.interp(grid, x, y) for x, y in curves])
    estimates = [comparison.interval(column.tolist()) for column in values.T]
    return grid, np.array([[e[key] for e in estimates] for key in ("mean", "low", "high")], float)


def draw(runs: Runs, results: Mapping, path: Path, title: str) -> Path:
    """Panels of pass@1, each further channel, length and entropy up to the budget; bands are 95 % t-intervals."""
    from matplotlib import layout_engine
    from matplotlib.figure import Figure

    names = ["pass@1", *comparison.channels(results), "mean_length", "entropy"]
    columns = 2 if len(names) == 4 else min(3, len(names))
    count = -(-len(names) // columns)
    layout = layout_engine.ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=(4.4 * columns, 3.3 * count + 0.9), layout=layout)
    grid = figure.subplots(count, columns)
    shown = [name for name, seeds in runs.items() if seeds]
    styles, banded = line_styles(shown, results["baseline"]), bands(shown, results["baseline"])
    for axes, name in zip(grid.flat, names, strict=False):
        for variant in shown:
            seeds = runs[variant].values()
            curves = [entropy_curve(run) if name == "entropy" else evaluation_curve(run, name) for run in seeds]
            x, (mean, low, high) = mean_curve(curves, results["budget_rows"])
            axes.plot(x, mean, **styles[variant], lw=1.8, label=variant)
            if variant in banded:
                axes.fill_between(x, low, high, color=styles[variant]["color"], alpha=0.15, lw=0)
        label = LABELS.get(name, f"held-out {name.removeprefix('mean_')}")
        axes.set(xlabel="sampled rows", ylabel=label, xlim=(0, results["budget_rows"]))
        axes.grid(alpha=0.25)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    whose = "" if len(banded) == len(shown) else f" ({' and '.join(banded)})"
    several = any(len(seeds) > 1 for seeds in runs.values())
    figure.suptitle(f"{title}: mean over seeds, band = 95 % t-interval{whose}" if several else title)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False)
    figure.savefig(path, dpi=130)
    return path


def line_styles(variants: Sequence[str], baseline: str) -> dict[str, dict]:
    """Colour and dashes of each variant."""
    others = [name for name in variants if name != baseline]
    turns = {name: divmod(i, len(COLOURS)) for i, name in enumerate(others)}
    styles = {
        name: {"color": COLOURS[i], "ls": DASHES[turn % len(DASHES)], "zorder": 2} for name, (turn, i) in turns.items()
    }
    return {name: styles.get(name, {"color": "black", "ls": "-", "zorder": 3}) for name in variants}


def bands(variants: Sequence[str], baseline: str) -> list[str]:
    """The variants whose interval is drawn: all where there are few."""
    few = len(variants) <= MAX_BANDS
    return [name for i, name in enumerate(variants) if few or i == 0 or name == baseline]

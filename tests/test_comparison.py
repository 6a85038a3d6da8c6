"""Variants x seeds: the intervals, the rule of equal cost, what is missing, and a picture that shows it."""

import json
import math

import numpy as np
import pytest
from matplotlib import image

from tapojax import comparison, comparison_plot
from tapojax.comparison import Run


def evaluation(step, rate, **more):
    return {"step": step, "pass@1": {"mean": rate, "low": 0.0, "high": 1.0}, "mean_length": 10.0 + step, **more}


def step(number, rows, **more):
    record = {"step": number, "sampled_rows": rows, "entropy": 1.0 - number / 10, "collapsed_groups": number / 10}
    return record | {"silent_rows": 0.5} | more


def run(rates, rows_per_step=100, every=2, **more):
    """A run that was evaluated after every second step."""
    evaluations = [evaluation(i * every, rate, **more) for i, rate in enumerate(rates)]
    return Run([step(i, rows_per_step) for i in range(every * (len(rates) - 1))], evaluations)


def write(workdir, variant, seed, made, finished=True):
    folder = comparison.run_folder(workdir, variant, seed)
    folder.mkdir(parents=True)
    for name in ("metrics", "evaluations"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in getattr(made, name)))
    if finished:
        (folder / "summary.json").write_text("{}")


def test_interval_by_hand():
    """mean ± t(.975, n-1) s / sqrt(n): .5, .6, .7 have s = .1, and t(.975, 2) = 4.302653."""
    got = comparison.interval([0.5, 0.7, 0.6, math.nan])
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert got["seeds"] == 3
    np.testing.assert_allclose([got[k] for k in ("mean", "low", "high")], [0.6, 0.6 - half, 0.6 + half], rtol=1e-6)
    five = comparison.interval([1.0, 2.0, 3.0, 4.0, 5.0])  # s = sqrt(2.5), t(.975, 4) = 2.776445
    assert five["high"] - five["mean"] == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)


def test_one_seed_has_no_interval_and_none_no_mean():
    assert comparison.interval([0.5]) == {"mean": 0.5, "low": None, "high": None, "seeds": 1}
    assert comparison.interval([math.nan]) == {"mean": None, "low": None, "high": None, "seeds": 0}
    assert comparison.estimate_text(comparison.interval([0.5])) == "0.500"
    assert comparison.estimate_text(comparison.interval([]), sign="+") == "-"
    assert comparison.estimate_text({"mean": 0.5, "low": -0.25, "high": 1.25}, sign="+") == "+0.500 [-0.250, +1.250]"


def test_a_run_counts_up_to_its_last_evaluation_within_the_budget():
    """Evaluations of `hungry` lie at 0, 300 and 600 rows; 599 rows pay for the second only."""
    hungry = run([0.2, 0.5, 0.9], rows_per_step=150, mean_process=0.25)
    assert comparison.sampled_rows(hungry, 2) == 300
    for budget, rate, rows in [(600, 0.9, 600), (599, 0.5, 300), (300, 0.5, 300), (299, 0.2, 0)]:
        got = comparison.outcome(hungry, budget)
        assert (got["pass@1"], got["sampled_rows"], got["total_rows"]) == (rate, rows, 600), budget
        assert got["before"] == 0.2
    got = comparison.outcome(hungry, 599)
    assert (got["mean_length"], got["mean_process"], got["silent_rows"]) == (12.0, 0.25, 0.5)
    assert got["entropy"] == 0.9, "of the last step before that evaluation"
    assert got["collapsed_groups"] == pytest.approx(0.05), "mean of the steps 0 and 1"
    assert math.isnan(comparison.outcome(hungry, 0)["entropy"]), "no step was paid for"


def test_what_was_not_measured_is_left_out_of_means():
    made = Run([step(0, 10, collapsed_groups=None), step(1, 10)], [evaluation(0, None), evaluation(2, 0.5)])
    got = comparison.outcome(made, 20)
    assert math.isnan(got["before"]) and got["pass@1"] == 0.5 and got["collapsed_groups"] == pytest.approx(0.1)
    made.metrics[1]["collapsed_groups"] = None
    assert math.isnan(comparison.outcome(made, 20)["collapsed_groups"])


@pytest.fixture
def runs():
    """Two seeds each; seed 1 of `new` has used 1.5 times the rows, so its last evaluation does not count."""
    return {
        "new": {0: run([0.2, 0.5, 0.7]), 1: run([0.3, 0.6, 0.9], rows_per_step=150)},
        "old": {0: run([0.2, 0.4, 0.4]), 1: run([0.3, 0.4, 0.5])},
    }


def test_differences_are_paired_by_seed(runs):
    """At 400 rows: new .7 and .6 (at 300 rows), old .4 and .5; differences .3 and .1; t(.975, 1) = 12.7062."""
    results = comparison.compare(runs, "old")
    assert results["budget_rows"] == 400
    new = results["variants"]["new"]
    assert new["pass@1"]["mean"] == pytest.approx(0.65)
    difference = new["difference"]
    half = 12.7062 * math.sqrt(0.02) / math.sqrt(2)
    np.testing.assert_allclose([difference["mean"], difference["high"]], [0.2, 0.2 + half], rtol=1e-5)
    assert new["sampled_rows"]["mean"] == 350 and new["total_rows"]["mean"] == 500
    assert results["variants"]["old"]["difference"]["mean"] is None, "the baseline has no difference to itself"
    assert json.dumps(results), "plain values"


def test_a_seed_without_the_baseline_has_no_difference(runs):
    del runs["old"][1]
    difference = comparison.compare(runs, "old")["variants"]["new"]["difference"]
    assert difference["seeds"] == 1 and difference["mean"] == pytest.approx(0.3) and difference["low"] is None
    runs["old"].clear()
    results = comparison.compare(runs, "old")
    assert results["variants"]["new"]["difference"]["seeds"] == 0
    runs["new"].clear()
    with pytest.raises(ValueError, match="no run is finished"):
        comparison.compare(runs, "old")


def test_folders_to_table(tmp_path):
    write(tmp_path, "new", 0, run([0.2, 0.5, 0.7], mean_process=0.5))
    write(tmp_path, "new", 1, run([0.2, 0.5, 0.7], mean_process=0.75), finished=False)
    write(tmp_path, "old", 0, run([0.2, 0.4, 0.4]))
    descriptions = {"new": "the method", "old": "its parent", "never": "was not begun"}
    runs, missing = comparison.read_runs(tmp_path, descriptions, [0, 1])
    assert list(runs["new"]) == list(runs["old"]) == [0] and not runs["never"]
    assert missing == [
        "new seed 1 (4 steps done)",
        "old seed 1 (0 steps done)",
        "never seed 0 (0 steps done)",
        "never seed 1 (0 steps done)",
    ]
    text = comparison.table(comparison.compare(runs, "old"), missing, descriptions).splitlines()
    assert text[:4] == [
        "| variant | seeds | pass@1 before | pass@1 after | after - old | process | length | entropy | collapsed | "
        "silent | rows | of |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        "| new | 1 | 0.200 | 0.700 | +0.300 | 0.500 | 14.0 | 0.700 | 0.150 | 0.500 | 400 | 400 |",
        "| old | 1 | 0.200 | 0.400 | - | - | 14.0 | 0.700 | 0.150 | 0.500 | 400 | 400 |",
    ]
    assert "within 400 sampled rows" in text[5]
    assert text[7:9] == ["- new: the method", "- old: its parent"]
    assert text[-1] == f"Not finished, left out: {', '.join(missing)}."


# ---- the picture


def test_mean_curve_interpolates_seeds_that_were_measured_elsewhere():
    """y = x and y = 3x, measured at different x: their mean is 2x, as far as both go, and s = x sqrt(2)."""
    one, two = np.array([0.0, 10, 20]), np.array([0.0, 15, 30])
    x, (mean, low, high) = comparison_plot.mean_curve([(one, one), (two, 3 * two)])
    np.testing.assert_array_equal(x, [0, 10, 15, 20])
    np.testing.assert_allclose(mean, 2 * x)
    np.testing.assert_allclose(high - mean, 12.7062 * x, rtol=1e-5)  # t(.975, 1) x sqrt(2) / sqrt(2)
    np.testing.assert_allclose(mean - low, high - mean, rtol=1e-6)
    x, (mean, _, _) = comparison_plot.mean_curve([(one, one), (two, 3 * two)], 12)
    assert x.tolist() == [0, 10, 12] and mean[-1] == 24, "drawn up to the budget"
    x, (mean, low, high) = comparison_plot.mean_curve([(one, one), (np.zeros(0), np.zeros(0))])
    np.testing.assert_array_equal(mean, one)
    assert np.isnan(low).all(), "a single seed has no interval"
    assert comparison_plot.mean_curve([])[1].shape == (3, 0)


def test_curves_leave_out_what_was_not_measured():
    made = Run(
        [step(0, 10), step(1, 20, entropy=None), step(2, 30)],
        [evaluation(0, None), evaluation(2, 0.5, mean_process=None), evaluation(3, 0.75, mean_process=0.5)],
    )
    x, y = comparison_plot.evaluation_curve(made, "pass@1")
    assert x.tolist() == [30, 60] and y.tolist() == [0.5, 0.75]
    x, y = comparison_plot.evaluation_curve(made, "mean_process")
    assert x.tolist() == [60] and y.tolist() == [0.5]
    x, y = comparison_plot.entropy_curve(made)
    assert x.tolist() == [10, 60] and y.tolist() == [1.0, 0.8]


def test_entropy_is_a_running_mean():
    """40 steps: over 2."""
    made = Run([step(i, 10, entropy=float(i % 2)) for i in range(40)], [])
    x, y = comparison_plot.entropy_curve(made)
    assert x[0] == 20 and x[-1] == 400 and (y == 0.5).all()


def test_every_variant_has_its_own_look():
    names = [f"v{i}" for i in range(13)]
    styles = comparison_plot.line_styles(names, "v3")
    assert len({tuple(style.values()) for style in styles.values()}) == 13
    assert list(styles) == names and styles["v3"]["color"] == "black"
    assert comparison_plot.bands(names, "v3") == ["v0", "v3"]
    assert comparison_plot.bands(names[:4], "v3") == names[:4]


def test_the_picture_shows_the_variants_that_ran(runs, tmp_path):
    """Blue, the first variant's colour, is there only when it has runs."""

    def blue(runs):
        results = comparison.compare(runs, "old")
        path = comparison_plot.draw(runs, results, tmp_path / "curves.png", "title")
        pixels = image.imread(path)[..., :3]
        assert 1500 < pixels.shape[1] < 2000 and 10_000 < path.stat().st_size < 300_000
        return int(np.all(np.abs(pixels - np.array([0, 114, 178]) / 255) < 0.02, axis=-1).sum())

    assert blue(runs) > blue(runs | {"new": {}}) + 300

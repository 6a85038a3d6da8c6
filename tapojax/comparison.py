"""Many runs beside each other: variants x seeds in one table and one picture, at equal cost in sampled rows.

A run is a folder that launch.train left. A step of dynamic sampling takes more rows than another, so runs are compared
at equal cumulative sampled rows (our choice): the budget is the smallest total of any finished run, and the value of a
run is its last evaluation within the budget. Intervals are 95 % t-intervals over seeds, mean ± t(.975, n-1) · std(ddof
1) / sqrt(n); differences to the baseline are taken seed by seed first.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import special

from tapojax import report


class Run(NamedTuple):
    """A finished run."""

    metrics: Sequence[Mapping]
    evaluations: Sequence[Mapping]


Runs = Mapping[str, Mapping[int, Run]]  # variant -> seed -> run

FROM_METRICS = ("collapsed_groups", "silent_rows")  # means over the steps that count


def run_folder(workdir: Path, variant: str, seed: int) -> Path:
    return workdir / variant / f"seed-{seed}"


def read_runs(workdir: Path, variants: Iterable[str], seeds: Sequence[int]) -> tuple[Runs, list[str]]:
    """The finished runs, and a text for each that is not."""
    runs: dict[str, dict[int, Run]] = {}
    missing = []
    for variant in variants:
        runs[variant] = {}
        for seed in seeds:
            folder = run_folder(workdir, variant, seed)
            run = Run(*(report.read_jsonl(folder / f"{name}.jsonl") for name in ("metrics", "evaluations")))
            if (folder / "summary.json").exists():
                runs[variant][seed] = run
            else:
                missing.append(f"{variant} seed {seed} ({len(run.metrics)} steps done)")
    return runs, missing


def sampled_rows(run: Run, step: int) -> int:
    """Rows sampled in the first `step` steps, those of discarded groups included."""
    return sum(record["sampled_rows"] for record in run.metrics if record["step"] < step)


def smallest_total(runs: Runs) -> int:
    return min(sampled_rows(run, len(run.metrics)) for seeds in runs.values() for run in seeds.values())


def outcome(run: Run, budget: int) -> dict[str, float]:
    """What a run reached within the budget; NaN where it was not measured."""
    last = [e for e in run.evaluations if sampled_rows(run, e["step"]) <= budget][-1]
    used = [record for record in run.metrics if record["step"] < last["step"]]
    series = {name: np.array([r.get(name) for r in used], float) for name in (*FROM_METRICS, "entropy")}
    return {
        "before": _rate(run.evaluations[0]),
        "pass@1": _rate(last),
        **{name: _number(value) for name, value in last.items() if name.startswith("mean_")},
        "entropy": float(series["entropy"][-1]) if used else np.nan,
        **{name: _mean(series[name]) for name in FROM_METRICS},
        "sampled_rows": float(sampled_rows(run, last["step"])),
        "total_rows": float(sampled_rows(run, len(run.metrics))),
    }


def _rate(evaluation: Mapping) -> float:
    return _number(evaluation["pass@1"]["mean"])


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else np.nan


def interval(values: Iterable[float]) -> dict:
    """Mean with its 95 % t-interval; NaN are left out. One value has no interval, none has no mean either: null."""
    found = np.array(list(values), float)
    found = found[~np.isnan(found)]
    mean = float(found.mean()) if found.size else None
    if mean is None or found.size < 2:
        return {"mean": mean, "low": None, "high": None, "seeds": int(found.size)}
    half = float(special.stdtrit(found.size - 1, 0.975) * found.std(ddof=1) / np.sqrt(found.size))
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": int(found.size)}


def compare(runs: Runs, baseline: str) -> dict:
    """Per variant the mean over seeds of every outcome, and pass@1's difference to the baseline, paired by seed.

    Raises:
      ValueError: no run is finished.
    """
    if not any(runs.values()):
        raise ValueError("no run is finished: there is nothing to compare yet")
    budget = smallest_total(runs)
    outcomes = {name: {seed: outcome(run, budget) for seed, run in seeds.items()} for name, seeds in runs.items()}
    reference, variants = outcomes[baseline], {}
    for name, seeds in outcomes.items():
        keys = dict.fromkeys(key for values in seeds.values() for key in values)
        paired = [seeds[s]["pass@1"] - reference[s]["pass@1"] for s in seeds if s in reference and name != baseline]
        variants[name] = {
            **{key: interval(values.get(key, np.nan) for values in seeds.values()) for key in keys},
            "difference": interval(paired),
            "runs": {
                seed: {k: None if np.isnan(v) else v for k, v in values.items()} for seed, values in seeds.items()
            },
        }
    return {"budget_rows": budget, "baseline": baseline, "variants": variants}


def channels(results: Mapping) -> list[str]:
    """Score channels of the evaluations, beside correctness."""
    found = [key for values in results["variants"].values() for key in values if key.startswith("mean_")]
    return [key for key in dict.fromkeys(found) if key != "mean_length"]


def table(results: Mapping, missing: Sequence[str], descriptions: Mapping[str, str]) -> str:
    """Markdown; what it says of cost and intervals stands below."""
    keys = {key: key.removeprefix("mean_") for key in channels(results)}
    keys |= {"mean_length": "length", "entropy": "entropy", "collapsed_groups": "collapsed", "silent_rows": "silent"}
    titles = ["variant", "seeds", "pass@1 before", "pass@1 after", f"after - {results['baseline']}", *keys.values()]
    lines = [f"| {' | '.join([*titles, 'rows', 'of'])} |", "|---" * (len(titles) + 2) + "|"]
    for name, values in results["variants"].items():
        if not values["runs"]:
            continue
        cells = [name, str(len(values["runs"])), estimate_text(values["before"]), estimate_text(values["pass@1"])]
        cells += [estimate_text(values["difference"], sign="+")]
        cells += [_mean_text(values.get(key), ".1f" if key == "mean_length" else ".3f") for key in keys]
        cells += [_mean_text(values[key], ",.0f") for key in ("sampled_rows", "total_rows")]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"Compared at equal cost: the last evaluation within {results['budget_rows']:,} sampled rows, the "]
    lines[-1] += (
        "smallest total of any run. Means over seeds with 95 % t-intervals; differences are paired by seed. Length in "
        "tokens; entropy of the last step, nats a token; collapsed: share of groups all right or all wrong; silent: "
        "share of rows without advantage, both over the steps that count."
    )
    lines += ["", *(f"- {name}: {descriptions[name]}" for name in results["variants"])]
    return "\n".join(lines + (["", f"Not finished, left out: {', '.join(missing)}."] if missing else []))


def estimate_text(value: Mapping, sign: str = "") -> str:
    """mean [low, high], or the mean alone of a single seed."""
    if value["low"] is None:
        return _mean_text(value, f"{sign}.3f")
    return "{mean:{form}} [{low:{form}}, {high:{form}}]".format(**value, form=f"{sign}.3f")


def _mean_text(value: Mapping | None, form: str) -> str:
    return "-" if value is None or value["mean"] is None else format(value["mean"], form)

"""The end of a run in one table and one picture."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


def finish(workdir: Path, *, steps: int, title: str, seconds: Mapping[str, float]) -> dict:
    """Writes summary.json and curve.png of a run that reached `steps`, and prints its table."""
    evaluations = {record["step"]: record for record in read_jsonl(workdir / "evaluations.jsonl")}
    before, after = evaluations[0], evaluations[steps]
    injected = Counter(record["source"] for record in read_jsonl(workdir / "injections.jsonl"))
    summary = {
        "pass_at_1": {"before": before["pass@1"], "after": after["pass@1"]},
        "before": before,
        "after": after,
        "steps": steps,
        "injected_rows_by_source": {str(source): injected[source] for source in sorted(injected)},
        "seconds": {stage: round(value, 2) for stage, value in seconds.items()},
    }
    (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    picture = draw_curve(workdir, title)
    print(f"\n{before_after_table(before, after)}\n")
    if injected:
        rows = ", ".join(f"{injected[source]} of source {source}" for source in sorted(injected))
        print(f"injected {rows}; each is in injections.jsonl")
    print("seconds  " + "  ".join(f"{stage} {value:.1f}" for stage, value in seconds.items()))
    print(f"written  {workdir / 'summary.json'}, {picture}, metrics.jsonl, rollouts.jsonl, checkpoints/")
    return summary


def before_after_table(before: Mapping, after: Mapping) -> str:
    """Markdown: every rate of the two evaluations, with its 95 % interval where it has one."""
    names = [name for name in after if isinstance(after[name], dict)]
    plain = [name for name in after if isinstance(after[name], float | None)]
    rows = [f"| {name} | {estimate_text(before[name])} | {estimate_text(after[name])} |" for name in names]
    rows += [f"| {name} | {_number(before[name])} | {_number(after[name])} |" for name in plain]
    title = f"| {after['problems']} held-out problems x {after['samples']} samples | before | after |"
    return "\n".join([title, "|---|---|---|", *rows])


def estimate_text(value: Mapping) -> str:
    """mean [low, high]."""
    return f"{_number(value['mean'])} [{_number(value['low'])}, {_number(value['high'])}]"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"  # a rate of which nothing could be scored


def read_jsonl(path: Path) -> list[dict]:
    """All records of a JSON lines file, or none where it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def draw_curve(workdir: Path, title: str) -> Path:
    """curve.png: held-out pass@1 with its interval, training accuracy, entropy and length over steps."""
    from matplotlib.figure import Figure  # without pyplot: no display is asked for, no notebook's backend switched

    steps, evaluations = read_jsonl(workdir / "metrics.jsonl"), read_jsonl(workdir / "evaluations.jsonl")
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(title)
    left.plot(*_series(steps, "accuracy"), color="tab:gray", alpha=0.6, lw=1.2, label="training accuracy")
    at = [e["step"] for e in evaluations]
    mean, low, high = (np.array([e["pass@1"][key] for e in evaluations], float) for key in ("mean", "low", "high"))
    left.plot(at, mean, color="tab:blue", marker="o", ms=4, lw=2, label="held-out pass@1")
    left.fill_between(at, low, high, color="tab:blue", alpha=0.15, lw=0, label="95 % interval")
    left.set(xlabel="step", ylabel="share of completions right", ylim=(0, 1.02))
    left.grid(alpha=0.25)
    left.legend(loc="lower right", frameon=False)
    right.plot(*_series(steps, "entropy"), color="tab:red", lw=1.5)
    right.set(xlabel="step", ylim=(0, None))
    right.set_ylabel("entropy, nats a token", color="tab:red")
    right.grid(alpha=0.25)
    lengths = right.twinx()
    lengths.plot(*_series(steps, "length_mean"), color="tab:green", lw=1.5)
    lengths.set_ylim(0, None)
    lengths.set_ylabel("completion length, tokens", color="tab:green")
    path = workdir / "curve.png"
    figure.savefig(path, dpi=130)
    return path


def _series(records: Sequence[Mapping], key: str) -> tuple[list, list]:
    points = [(r["step"] + 1, r[key]) for r in records if r.get(key) is not None]
    return [x for x, _ in points], [y for _, y in points]

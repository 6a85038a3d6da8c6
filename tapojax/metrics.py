"""What a run writes down: metrics.jsonl, TensorBoard events, sampled rollouts, a progress line."""

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tensorboardX import SummaryWriter

from tapojax import advantages, resumable
from tapojax.rollout.collect import Collected
from tapojax.types import Batch, Scores


class Log(NamedTuple):
    """Where a run writes."""

    workdir: Path
    tensorboard: SummaryWriter | None


def open_log(workdir: Path, *, start: int, tensorboard: bool) -> Log:
    """Opens the log of a run that goes on at step `start`: lines of later steps, left by a killed run, are dropped."""
    for name in ("metrics", "rollouts", "injections", "evaluations", "recorded/schedule"):
        _drop_from(workdir / f"{name}.jsonl", start + (name == "evaluations"))
    writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=start) if tensorboard else None
    return Log(workdir, writer)


def _drop_from(path: Path, step: int):
    if not path.exists():
        return
    kept = [line + "\n" for line in path.read_text().splitlines() if _step_of(line) < step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


def _step_of(line: str) -> int | float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # the kill came in the middle of this line
        return float("inf")


def append(log: Log, name: str, record: Mapping):
    """Adds one JSON line to `name`.jsonl and its numbers to TensorBoard. NaN and infinities become null."""
    clean = resumable.plain(record)
    with open(log.workdir / f"{name}.jsonl", "a") as file:
        file.write(json.dumps(clean) + "\n")
    if log.tensorboard is not None and name in ("metrics", "evaluations"):
        for key, value in clean.items():
            value = value.get("mean") if isinstance(value, dict) else value
            if isinstance(value, float | int) and key != "step":
                log.tensorboard.add_scalar(f"{name}/{key}", value, clean["step"])
        log.tensorboard.flush()


def rollout_metrics(part: Collected, group_size: int) -> dict:
    """What one rollout batch looked like; rates leave out what could not be scored."""
    correct = np.asarray(part.scores["correct"], float).reshape(-1, group_size)
    lengths = part.rollout.mask.sum(axis=1)
    mean = {
        name: float(np.nanmean(values)) if not np.all(np.isnan(values)) else np.nan
        for name, values in part.scores.items()
    }
    collapsed = np.nanmax(correct, axis=1, initial=-np.inf) == np.nanmin(correct, axis=1, initial=np.inf)
    return {
        "accuracy": mean.pop("correct"),
        **{f"score_{name}": value for name, value in mean.items()},
        "collapsed_groups": float(np.mean(collapsed)),
        **(process_metrics(part.scores, group_size) if "process" in part.scores else {}),
        "length_mean": float(lengths.mean()),
        "length_max": int(lengths.max()),
        "truncated": float(np.mean(part.rollout.truncated)),
        "prompt_tokens": float(part.rollout.prompt_lengths.mean()),
        "injected": float(np.mean(part.rollout.source > 0)),
        "score_errors": len(part.errors),
        "sampled_rows": part.sampled_rows,
        "sampled_tokens": part.sampled_tokens,
    }


def call_metrics(part: Collected) -> dict[str, float]:
    """Latency of the calls of the task's score function; calls overlap with sampling and with one another."""
    if not part.call_seconds:
        return {}
    mean, largest = np.mean(part.call_seconds), max(part.call_seconds)
    return {"seconds_per_score_call": float(mean), "seconds_per_score_call_max": largest}


def process_metrics(scores: Scores, group_size: int) -> dict:
    """How much the reasoning of right rows tells them apart (Tan et al., arXiv 2603.26535).

    process_active_groups: share of groups whose right rows differ in their process score. The standard deviations are
    over all rows (outcome) and over those with a process advantage; both means are 0 by construction.
    """
    process = np.asarray(advantages.correct_only(scores["process"], scores["correct"], group_size))
    active = process != 0
    return {
        "process_active_groups": float(active.reshape(-1, group_size).any(axis=1).mean()),
        "process_advantage_std": float(process[active].std(ddof=1)) if active.any() else float("nan"),
        "outcome_advantage_std": float(np.std(advantages.group_normalize(scores["correct"], group_size), ddof=1)),
    }


def batch_metrics(batch: Batch, correct) -> dict:
    """What the algorithm made of it: rows without any signal, rows left out, and advantages of right and wrong rows.

    `silent_rows` is the signal exhaustion of Tan et al. (PAPO), arXiv 2603.26535: the share of the rows in the mask
    whose advantage is 0 at every token. A row's advantage is its mean over tokens; within 1e-6 it counts as 0.
    Of sampled tokens, `importance_mean` is the mean weight for the train/rollout mismatch and `mismatch_masked` the
    share whose weight is 0, for they were rejected.
    """
    mask, correct = np.asarray(batch.mask), np.asarray(correct)
    active, per_token = np.any(mask, axis=1), np.where(mask, batch.advantages, 0)
    row = per_token.sum(axis=1) / np.maximum(mask.sum(axis=1), 1)
    rows_in_mask = max(active.sum(), 1)
    values = {
        "silent_rows": float(np.mean(np.abs(per_token[active]).max(axis=1) <= 1e-6)) if active.any() else 1.0,
        "masked_rows": float(np.mean(~active)),
        "advantage_max": float(np.abs(per_token).max()),
        "advantage_positive": float(np.sum(row > 1e-6) / rows_in_mask),
        "advantage_negative": float(np.sum(row < -1e-6) / rows_in_mask),
    }
    for name, rows in (("right", active & (correct >= 0.5)), ("wrong", active & (correct < 0.5))):
        if rows.any():
            values |= {
                f"advantage_{name}_mean": float(row[rows].mean()),
                f"advantage_{name}_std": float(row[rows].std(ddof=1)) if rows.sum() > 1 else float("nan"),
                f"advantage_{name}_min": float(row[rows].min()),
                f"advantage_{name}_max": float(row[rows].max()),
            }
    if batch.importance is not None:
        weights = np.asarray(batch.importance)[mask & (np.asarray(batch.source) == 0)[:, None]]
        if weights.size:
            values |= {"importance_mean": float(weights.mean()), "mismatch_masked": float(np.mean(weights == 0))}
    return values


def sample_records(part: Collected, step: int, count: int, group_size: int) -> list[dict]:
    """The first row of each of the first groups, in words."""
    return [
        {
            "step": step,
            "id": str(part.prompts.examples[i]["id"]),
            "problem": str(part.prompts.examples[i]["problem"]),
            "completion": part.completions[i * group_size],
            "source": int(part.rollout.source[i * group_size]),
            **{name: float(values[i * group_size]) for name, values in part.scores.items()},
        }
        for i in range(min(count, len(part.prompts.examples)))
    ]


def injection_records(part: Collected, step: int, group_size: int) -> list[dict]:
    """Every row that was not sampled from the policy, in words, with all that is known of where it came from."""
    return [
        {
            "step": step,
            "id": str(part.prompts.examples[i // group_size]["id"]),
            "row": i,
            "source": int(part.rollout.source[i]),
            "completion": part.completions[i],
            **{name: float(values[i]) for name, values in part.scores.items()},
        }
        for i in np.flatnonzero(part.rollout.source > 0).tolist()
    ]


@contextlib.contextmanager
def timed(seconds: dict[str, float], stage: str):
    """Adds the wall time of the block to seconds[stage]."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


PROGRESS = (
    ("reward", "reward", "{:.3f}"),
    ("accuracy", "acc", "{:.3f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("update_kl", "kl", "{:.1e}"),
    ("length_mean", "len", "{:.1f}"),
    ("clip_fraction", "clip", "{:.3f}"),
    ("collapsed_groups", "collapsed", "{:.2f}"),
    ("tokens_per_second", "tok/s", "{:.0f}"),
)


def progress_line(record: Mapping, steps: int) -> str:
    """One line a person can follow while it scrolls."""
    numbers = "  ".join(
        f"{label} {form.format(record[key])}" for key, label, form in PROGRESS if record.get(key) is not None
    )
    stages = [key for key in record if key.startswith("seconds_") and not key.startswith("seconds_per_")]
    times = " ".join(f"{key.removeprefix('seconds_')} {record[key]:.2f}" for key in stages)
    return f"step {record['step'] + 1:>{len(str(steps))}}/{steps}  {numbers}  | s: {times}"

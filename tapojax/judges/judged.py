"""A judge on top of a task: its verdicts become a score channel, for everything that scores. No jax.

A judge is a function of examples and completions, in the order of its rows; it may be called from several threads at a
time, each with a part of a batch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from tapojax.types import Example, Scores, Task


class Verdicts(NamedTuple):
    """What a judge says of B completions."""

    values: Float32[np.ndarray, "B"]  # NaN where there is no verdict
    errors: Sequence[str | None]  # why there is none
    # what each row took, by name, such as seconds and tokens; NaN where nothing was asked, {} where nothing is known
    costs: Mapping[str, Float32[np.ndarray, "B"]]


Judge = Callable[[Sequence[Example], Sequence[str]], Verdicts]


def judged(task: Task, judge: Judge, *, channel: str, only_right: bool = True) -> Task:
    """The same task with the judge's verdicts in `channel`, in the place of what the task says there itself.

    More channels tell what it takes: "<channel>_asked" is 1 for a row that the judge was given and 0 for others, and
    each of its costs is there as "<channel>_<cost>". A row that the task could not score is not judged and is NaN.
    Where the task has channel "flawed" of its own, exact, it stays as "flawed_exact", and the means of two more
    channels are the judge's precision and recall: "judge_precision" exists where the judge says flawed, "judge_recall"
    where the row is flawed.

    Args:
      only_right: wrong rows are not judged, their verdict is 0, as in FAPO (arXiv 2510.22543) and PAPO (2603.26535).
        A right row without verdict is NaN, so that training leaves it out (our choice); the published codes take it for
        flawless and for the worst reasoning.
    """

    def score(examples, completions):
        scores, errors = task.score(examples, completions)
        correct = np.asarray(scores["correct"], np.float32)
        given = correct == 1 if only_right else ~np.isnan(correct)
        rows = np.flatnonzero(given).tolist()
        said = judge([examples[row] for row in rows], [completions[row] for row in rows])
        values = spread(said.values, rows, np.where(np.isnan(correct), np.float32("nan"), np.float32(0)))
        reasons = dict(zip(rows, said.errors, strict=True))
        channels = {channel: values, f"{channel}_asked": given.astype(np.float32), **costs(channel, said, rows, given)}
        quality = _quality(values, scores["flawed"]) if channel == "flawed" and "flawed" in scores else {}
        errors = [error or reasons.get(row) for row, error in enumerate(errors)]
        return {**scores, **channels, **quality}, errors

    return task._replace(score=score)


def costs(channel: str, said: Verdicts, rows: Sequence[int], like) -> Scores:
    """The costs of the verdicts as channels of a batch, of which `rows` were judged; `like` has its length."""
    nowhere = np.full(len(like), np.nan, np.float32)
    return {f"{channel}_{name}": spread(values, rows, nowhere) for name, values in said.costs.items()}


def spread(values, rows: Sequence[int], elsewhere) -> Float32[np.ndarray, "B"]:
    """`values` at `rows`, and what `elsewhere` has at the others."""
    whole = np.array(elsewhere, np.float32)
    whole[list(rows)] = values
    return whole


def _quality(flawed, exact) -> Scores:
    return {
        "flawed_exact": exact,
        "judge_precision": np.where(flawed == 1, exact, np.nan).astype(np.float32),
        "judge_recall": np.where(exact == 1, flawed, np.nan).astype(np.float32),
    }

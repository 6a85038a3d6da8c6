"""The reward loop: rows are scored by threads while others are still being sampled. No jax.

Rows that came wait until they fill a chunk, or until the oldest has waited `linger_s`; each chunk is one call of the
score function. Every row is scored exactly once, and what comes out does not depend on how rows were cut into chunks.
A row that has no score in time is NaN with an error text, never 0. What a chunk raises ends the loop and is raised to
the caller, and so it ends when more rows are without a score than a run accepts.
"""

import contextlib
import dataclasses
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

PATIENCE_SECONDS = 10.0  # for calls under way when the loop ends early
Score = Callable[[Sequence[Any], Sequence[str]], tuple[Mapping[str, Any], Sequence[str | None]]]  # see types.Task


@dataclasses.dataclass(frozen=True)
class Options:
    """When and how rows are scored; all but linger_s are keys of the config section `reward`."""

    overlap: bool = True  # False: all rows in one call, after generation ended
    chunk_rows: int = 32  # of one call of the score function, at most
    threads: int = 8  # calls at a time
    linger_s: float = 0.2  # that a row waits for others to fill its chunk (our choice)
    wait_s: float = 1800.0  # for scores after generation ended; later rows go without one

    def __post_init__(self):
        if min(self.chunk_rows, self.threads) < 1 or self.linger_s < 0 or not 0 < self.wait_s < math.inf:
            raise ValueError(
                f"reward.chunk_rows={self.chunk_rows}, reward.threads={self.threads}, reward.linger_s={self.linger_s}, "
                f"reward.wait_s={self.wait_s}: the first two are 1 or more, the third 0 or more, the last positive and "
                "finite"
            )


class Limit(NamedTuple):
    """How many rows may go without a score before the run stops."""

    share: float = 0.2
    rows: int = 256  # that must have been scored before the share counts (our choice); fewer in the round: all of it


class Scored(NamedTuple):
    """What is known of all rows, in their order."""

    completions: list[str]
    scores: dict[str, np.ndarray]  # by channel, float32, NaN where there is none
    errors: list[str | None]
    call_seconds: list[float]  # that each call of the score function took


@dataclasses.dataclass
class Loop:
    """State shared by the threads; `changed` guards it."""

    score: Score
    decode: Callable[[Sequence[int]], str]
    examples: Sequence[Any]
    needs: frozenset[str]
    limit: Limit
    options: Options
    changed: threading.Condition = dataclasses.field(default_factory=threading.Condition)
    tokens: dict[int, Sequence[int]] = dataclasses.field(default_factory=dict)  # of all rows that came, by row
    waiting: deque[tuple[int, float]] = dataclasses.field(default_factory=deque)  # rows, and when they came
    completions: dict[int, str] = dataclasses.field(default_factory=dict)
    columns: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    errors: dict[int, str | None] = dataclasses.field(default_factory=dict)  # of the rows that were scored
    call_seconds: list[float] = dataclasses.field(default_factory=list)
    unscored: int = 0
    complete: bool = False  # all rows came
    over: bool = False  # nothing more is begun, and what comes is too late
    late: bool = False
    failure: BaseException | None = None


@contextlib.contextmanager
def scoring(
    score: Score,
    decode: Callable[[Sequence[int]], str],
    examples: Sequence[Any],
    *,
    needs: frozenset[str],
    limit: Limit,
    options: Options,
) -> Iterator[Loop]:
    """Threads that score the rows given to `add`, until `result` or the end of the block.

    Calls under way when the block ends early are awaited for PATIENCE_SECONDS; those that hang are left behind.

    Args:
      score: like Task.score, from several threads at a time.
      decode: a row's tokens as text.
      examples: one a row.
      needs: channels that must exist; a row with NaN in one of them has no score.
    """
    loop = Loop(score, decode, examples, needs, limit, options)
    count = min(options.threads, len(examples)) if options.overlap else 1
    threads = [threading.Thread(target=_work, args=(loop,), name="rewards", daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield loop
    finally:
        with loop.changed:
            loop.over = True
            loop.changed.notify_all()
        end = time.monotonic() + (0.0 if loop.late else PATIENCE_SECONDS)
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))


def add(loop: Loop, row: int, tokens: Sequence[int]):
    """Takes a row whose completion is known; returns at once. For any thread.

    Raises:
      Exception: what ended the loop, so that whoever samples stops.
      ValueError: the row came before, or is none.
    """
    with loop.changed:
        if loop.failure is not None:
            raise loop.failure
        if row in loop.tokens or not 0 <= row < len(loop.examples):
            raise ValueError(f"the engine finished row {row} of {len(loop.examples)} twice, or it is none")
        loop.tokens[row] = tokens
        loop.waiting.append((row, time.monotonic()))
        loop.changed.notify()


def result(loop: Loop) -> Scored:
    """What was said of all rows, once generation has ended; waits for it until the deadline.

    Raises:
      Exception: what score raised.
      ValueError: rows are missing; a needed channel is missing; too many rows have no score.
    """
    count, end = len(loop.examples), time.monotonic() + loop.options.wait_s
    with loop.changed:
        if missing := [row for row in range(count) if row not in loop.tokens and loop.failure is None]:
            raise ValueError(f"the engine did not say that it finished {len(missing)} rows, the first: {missing[:5]}")
        loop.complete = True
        loop.changed.notify_all()
        while loop.failure is None and len(loop.errors) < count and (left := end - time.monotonic()) > 0:
            loop.changed.wait(min(left, 1.0))  # Python sees a Ctrl-C only when this thread wakes up
        loop.over = True
        if loop.failure is not None:
            raise loop.failure
        if late := [row for row in range(count) if row not in loop.errors]:
            loop.late = True
            said = f"not scored within reward.wait_s={loop.options.wait_s:g} s after generation ended"
            _record(loop, late, dict.fromkeys(loop.needs, np.full(len(late), math.nan)), [said] * len(late))
    for row in range(count):
        if row not in loop.completions:
            loop.completions[row] = loop.decode(loop.tokens[row])
    return Scored(
        [loop.completions[row] for row in range(count)],
        loop.columns,
        [loop.errors[row] for row in range(count)],
        loop.call_seconds,
    )


def _work(loop: Loop):
    """Scores chunk after chunk until none will come."""
    try:
        while rows := _take(loop):
            texts = [loop.decode(loop.tokens[row]) for row in rows]
            loop.completions.update(zip(rows, texts, strict=True))
            started = time.perf_counter()
            scores, errors = loop.score([loop.examples[row] for row in rows], texts)
            seconds = time.perf_counter() - started
            with loop.changed:
                if loop.over:
                    return
                loop.call_seconds.append(seconds)
                _record(loop, rows, scores, errors)
                loop.changed.notify_all()
    except BaseException as error:
        with loop.changed:
            loop.failure, loop.over = loop.failure or error, True
            loop.changed.notify_all()


def _take(loop: Loop) -> list[int]:
    """The rows of the next chunk; none: there is nothing more to do."""
    size = loop.options.chunk_rows if loop.options.overlap else len(loop.examples)
    with loop.changed:
        while not loop.over:
            left = loop.waiting[0][1] + loop.options.linger_s - time.monotonic() if loop.waiting else math.inf
            full = len(loop.waiting) >= size or loop.complete or (loop.options.overlap and left <= 0)
            if loop.waiting and full:
                return sorted(loop.waiting.popleft()[0] for _ in range(min(size, len(loop.waiting))))
            if loop.complete:
                break
            loop.changed.wait(left if loop.options.overlap and loop.waiting else None)
    return []


def _record(loop: Loop, rows: Sequence[int], scores: Mapping[str, Any], errors: Sequence[str | None]):
    """Writes down what was said of rows. A channel that one chunk has and another lacks is NaN where it lacks."""
    _check_channels(scores, loop.needs)
    for name, values in scores.items():
        column = loop.columns.setdefault(name, np.full(len(loop.examples), math.nan, np.float32))
        column[rows] = np.asarray(values, np.float32).reshape(len(rows))
    loop.errors.update(zip(rows, errors, strict=True))
    loop.unscored += _count_unscored(scores, loop.needs)
    _check_share(loop.unscored, len(loop.errors), len(loop.examples), loop.limit, loop.errors.values())


def check(scores: Mapping[str, Any], errors: Sequence[str | None], needs: frozenset[str], limit: Limit):
    """The same rules for rows that were scored elsewhere; raises ValueError like `result`."""
    _check_channels(scores, needs)
    _check_share(_count_unscored(scores, needs), len(errors), len(errors), limit, errors)


def _check_channels(scores: Mapping[str, Any], needs: frozenset[str]):
    """Raises ValueError where a needed channel is missing."""
    if missing := needs - scores.keys():
        raise ValueError(
            f"the algorithm needs the score channels {sorted(missing)}, the task gives {sorted(scores)}: "
            "choose a task or reward that provides them"
        )


def _count_unscored(scores: Mapping[str, Any], needs: frozenset[str]) -> int:
    """Rows that lack a score in a needed channel."""
    return int(np.any([np.isnan(scores[name]) for name in needs], axis=0).sum())


def _check_share(unscored: int, seen: int, rows: int, limit: Limit, errors: Iterable[str | None]):
    """The circuit breaker: of `rows`, `seen` were looked at and `unscored` of them have no score.

    The share counts from min(limit.rows, rows) rows on; before, it is taken of so many. In a round of up to limit.rows
    rows a run so stops exactly where the share of the whole round is above the limit, and as soon as that is certain.
    """
    share = unscored / max(seen, min(limit.rows, rows), 1)
    if share > limit.share:
        first = next((error for error in errors if error is not None), "the task gave NaN and no reason")
        raise ValueError(
            f"{unscored} of {seen} rows could not be scored, {rows} are sampled in a round (the limit "
            f"collect.max_error_share is {limit.share}); the first error: {first}"
        )

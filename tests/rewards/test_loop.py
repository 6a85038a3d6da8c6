"""The reward loop: every row scored once, in order, while others come; what fails is told and ends in time."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from tapojax.rewards import loop

NAN = float("nan")
NEEDS = frozenset({"correct"})
LENIENT = loop.Limit(share=1.0)
FAST = loop.Options(chunk_rows=4, threads=3, linger_s=0.01, wait_s=30.0)


def rows_of(count):
    """(examples, tokens): row r is about problem r and completes with r as its only token."""
    return [f"problem {row}" for row in range(count)], [[row] for row in range(count)]


class Scorer:
    """Scores row r with r; says what it was called with."""

    def __init__(self, act=None):
        self.calls, self.act = [], act

    def __call__(self, examples, completions):
        self.calls.append((list(examples), list(completions)))
        if self.act is not None:
            self.act(completions)
        rows = [int(text) for text in completions]
        return {"correct": np.array(rows, np.float32)}, [None] * len(rows)


def decode(tokens):
    return str(tokens[0])


def run(score, count, *, order=None, needs=NEEDS, limit=LENIENT, options=FAST, decode=decode, between=lambda row: None):
    examples, _ = rows_of(count)
    with loop.scoring(score, decode, examples, needs=needs, limit=limit, options=options) as scoring:
        for row in range(count) if order is None else order:
            loop.add(scoring, row, [row])
            between(row)
        return loop.result(scoring)


def no_threads_left():
    return not any(thread.name == "rewards" for thread in threading.enumerate())


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


# ---- exactly once, in order


@pytest.mark.parametrize("overlap", [True, False], ids=["streaming", "after"])
@pytest.mark.parametrize("seed", range(3))
def test_every_row_is_scored_once_and_comes_back_in_its_place(overlap, seed):
    """Whatever the order, the pauses and the number of threads."""
    rng, count = np.random.default_rng(seed), 57
    decoded = []

    def text(tokens):
        decoded.append(tokens[0])
        return str(tokens[0])

    def pause(completions):
        time.sleep(0.001 * rng.integers(5))

    scorer = Scorer(pause)
    options = loop.Options(overlap, chunk_rows=int(rng.integers(1, 9)), threads=4, linger_s=0.002, wait_s=30.0)
    scored = run(
        scorer,
        count,
        order=rng.permutation(count).tolist(),
        options=options,
        decode=text,
        between=lambda row: time.sleep(0.001 * (row % 3)),
    )
    np.testing.assert_array_equal(scored.scores["correct"], np.arange(count, dtype=np.float32))
    assert scored.completions == [str(row) for row in range(count)] and scored.errors == [None] * count
    asked = [int(text) for _, texts in scorer.calls for text in texts]
    assert sorted(asked) == sorted(decoded) == list(range(count)), "each row once"
    for examples, texts in scorer.calls:
        assert examples == [f"problem {text}" for text in texts], "each completion with its own problem"
    assert len(scored.call_seconds) == len(scorer.calls) and min(scored.call_seconds) >= 0
    if overlap:
        assert max(len(texts) for _, texts in scorer.calls) <= options.chunk_rows
    else:
        assert len(scorer.calls) == 1, "one call of the whole batch"
    assert no_threads_left()


def test_rows_are_scored_while_others_are_still_missing():
    scorer = Scorer()
    examples, tokens = rows_of(6)
    with loop.scoring(scorer, decode, examples, needs=NEEDS, limit=LENIENT, options=FAST) as scoring:
        for row in range(5):
            loop.add(scoring, row, tokens[row])
        wait_until(lambda: len(scoring.errors) == 5)  # four fill a chunk, the fifth has lingered
        loop.add(scoring, 5, tokens[5])
        scored = loop.result(scoring)
    np.testing.assert_array_equal(scored.scores["correct"], np.arange(6))
    assert sorted(len(texts) for _, texts in scorer.calls) == [1, 1, 4]


def test_rows_linger_until_their_chunk_is_full():
    scorer, options = Scorer(), loop.Options(chunk_rows=4, threads=3, linger_s=60.0, wait_s=30.0)
    scored = run(scorer, 10, options=options)
    assert sorted(len(texts) for _, texts in scorer.calls) == [2, 4, 4], "the end does not linger"
    np.testing.assert_array_equal(scored.scores["correct"], np.arange(10))


def test_several_calls_at_a_time():
    """Two calls that wait for each other."""
    together = threading.Barrier(2, timeout=20)
    run(Scorer(lambda completions: together.wait()), 8, options=FAST)


def test_a_channel_that_only_some_chunks_have_is_nan_elsewhere():
    """A judge that is asked of right rows only has no costs where there are none."""

    def score(examples, completions):
        rows = np.array([int(text) for text in completions], np.float64)
        extra = {"judge_seconds": rows * 10} if rows[0] == 4 else {}
        return {"correct": rows, **extra}, [None] * len(rows)

    scored = run(score, 10)
    np.testing.assert_array_equal(scored.scores["judge_seconds"], [NAN] * 4 + [40, 50, 60, 70] + [NAN] * 2)
    assert {values.dtype for values in scored.scores.values()} == {np.dtype(np.float32)}


# ---- rows without a score


def every(which):
    """NaN and a reason for the rows that `which` names."""

    def score(examples, completions):
        rows = [int(text) for text in completions]
        values = np.array([NAN if which(row) else 1.0 for row in rows], np.float32)
        return {"correct": values}, [f"judge down on {row}" if which(row) else None for row in rows]

    return score


def test_nan_and_reasons_stay_with_their_rows():
    scored = run(every(lambda row: row % 3 == 1), 10)
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(scored.scores["correct"])), [1, 4, 7])
    assert [row for row, error in enumerate(scored.errors) if error] == [1, 4, 7]
    assert scored.errors[4] == "judge down on 4"


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("bad", [4, 5])
def test_in_a_small_round_the_limit_is_that_of_the_whole_round(overlap, bad):
    """limit.rows above the round: 4 of 20 rows at share 0.2 are allowed wherever they come, 5 are not."""
    options = loop.Options(overlap, chunk_rows=1, threads=1, linger_s=0.0, wait_s=30.0)
    how = dict(limit=loop.Limit(0.2, 256), options=options)
    if bad == 4:
        assert np.isnan(run(every(lambda row: row < 4), 20, **how).scores["correct"]).sum() == 4
    else:
        with pytest.raises(ValueError, match=r"collect.max_error_share is 0.2\); the first error: judge down on 0"):
            run(every(lambda row: row < 5), 20, **how)
    assert no_threads_left()


def test_the_breaker_stops_as_soon_as_the_end_is_certain():
    """Chunks of one row by one thread: 5 of the first 5 rows fail, of 20 with a limit of 0.2; no sixth is scored."""
    scorer = Scorer()

    def score(examples, completions):
        scorer(examples, completions)
        return every(lambda row: True)(examples, completions)

    options = loop.Options(chunk_rows=1, threads=1, linger_s=0.0, wait_s=30.0)
    with pytest.raises(ValueError, match=r"^5 of 5 rows could not be scored, 20 are sampled in a round"):
        run(score, 20, limit=loop.Limit(0.2, 256), options=options)
    assert len(scorer.calls) == 5


def test_in_a_large_round_the_share_counts_from_a_minimum_of_rows():
    """limit.rows 10, share 0.5: rows 0 to 4 fail and are forgiven, for the share is of 10; a sixth is not."""
    options = loop.Options(chunk_rows=1, threads=1, linger_s=0.0, wait_s=30.0)
    scored = run(every(lambda row: row < 5), 100, limit=loop.Limit(0.5, 10), options=options)
    assert np.isnan(scored.scores["correct"]).sum() == 5
    scorer = Scorer()

    def score(examples, completions):
        scorer(examples, completions)
        return every(lambda row: row < 6)(examples, completions)

    with pytest.raises(ValueError, match="^6 of 6 rows could not be scored, 100 are sampled"):
        run(score, 100, limit=loop.Limit(0.5, 10), options=options)
    assert len(scorer.calls) == 6


def test_whoever_samples_is_stopped():
    """The engine gets the error from the next row that it tells of."""
    examples, tokens = rows_of(8)
    options = loop.Options(chunk_rows=1, threads=1, linger_s=0.0, wait_s=30.0)
    limit = loop.Limit(0.2, 4)
    with pytest.raises(ValueError, match="collect.max_error_share"):
        with loop.scoring(
            every(lambda row: True), decode, examples, needs=NEEDS, limit=limit, options=options
        ) as scoring:
            loop.add(scoring, 0, tokens[0])
            wait_until(lambda: scoring.failure is not None)
            loop.add(scoring, 1, tokens[1])
            raise AssertionError("the second row was taken")


def test_nan_without_a_reason_is_told_so():
    with pytest.raises(ValueError, match="the task gave NaN and no reason"):
        run(lambda e, c: ({"correct": np.full(len(c), NAN)}, [None] * len(c)), 4, limit=loop.Limit(0.2))


def test_rows_scored_elsewhere_follow_the_same_rule():
    scores = {"correct": np.array([1, NAN, NAN, 0]), "process": np.array([1.0, 1.0, 1.0, NAN])}
    errors = [None, "down", None, None]
    loop.check(scores, errors, NEEDS, loop.Limit(0.5))
    with pytest.raises(ValueError, match=r"3 of 4 rows .* is 0.5\); the first error: down"):
        loop.check(scores, errors, NEEDS | {"process"}, loop.Limit(0.5))
    with pytest.raises(ValueError, match=r"score channels \['flawed'\], the task gives \['correct', 'process'\]"):
        loop.check(scores, errors, NEEDS | {"flawed"}, loop.Limit(0.5))


# ---- deadline


def test_rows_that_are_late_have_no_score_and_a_reason():
    """One chunk hangs; the others count. The late answer changes nothing any more."""
    release, answered = threading.Event(), threading.Event()

    def hang(completions):
        if "5" in completions:
            assert release.wait(30)
            answered.set()

    options = loop.Options(chunk_rows=4, threads=2, linger_s=60.0, wait_s=0.5)
    before = time.monotonic()
    scored = run(Scorer(hang), 12, options=options)
    assert time.monotonic() - before < loop.PATIENCE_SECONDS, "a hanging call is not awaited"
    np.testing.assert_array_equal(scored.scores["correct"], [0, 1, 2, 3, *[NAN] * 4, 8, 9, 10, 11])
    late = "not scored within reward.wait_s=0.5 s after generation ended"
    assert scored.errors == [None] * 4 + [late] * 4 + [None] * 4
    assert scored.completions == [str(row) for row in range(12)], "their texts are known"
    kept = scored.scores["correct"].copy()
    release.set()
    assert answered.wait(20)
    wait_until(no_threads_left)
    np.testing.assert_array_equal(scored.scores["correct"], kept)


def test_rows_that_no_thread_came_to_are_late_too():
    release = threading.Event()
    options = loop.Options(chunk_rows=4, threads=1, linger_s=60.0, wait_s=0.2)
    scored = run(Scorer(lambda completions: release.wait(30)), 10, options=options)
    assert np.isnan(scored.scores["correct"]).all() and all("reward.wait_s" in error for error in scored.errors)
    assert scored.completions == [str(row) for row in range(10)], "their texts are known"
    release.set()
    wait_until(no_threads_left)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_judge_that_never_answers_stops_the_run_by_the_same_rule(overlap):
    release = threading.Event()
    options = loop.Options(overlap, chunk_rows=4, threads=1, linger_s=0.0, wait_s=0.2)
    with pytest.raises(ValueError, match=r"8 of 8 rows could not be scored.*not scored within reward.wait_s=0.2 s"):
        run(Scorer(lambda completions: release.wait(30)), 8, options=options, limit=loop.Limit(0.2))
    release.set()
    wait_until(no_threads_left)


# ---- exceptions


@pytest.mark.parametrize("overlap", [True, False])
def test_what_a_chunk_raises_is_raised_and_nothing_goes_on(overlap):
    def crash(completions):
        if "6" in completions:
            raise ConnectionError("no reward server is alive")

    scorer = Scorer(crash)
    options = loop.Options(overlap, chunk_rows=4, threads=1, linger_s=60.0, wait_s=30.0)
    with pytest.raises(ConnectionError, match="no reward server is alive") as error:
        run(scorer, 40, options=options)
    assert any(entry.name == "crash" for entry in error.traceback), "where it happened"
    assert len(scorer.calls) == (2 if overlap else 1), "no chunk after it"
    assert no_threads_left()


def test_calls_under_way_end_before_the_error_is_raised():
    begun, ended = threading.Event(), []

    def act(completions):
        if "0" in completions:
            begun.set()
            time.sleep(0.2)
            ended.append(completions)
        else:
            assert begun.wait(20)
            raise RuntimeError("crashed")

    with pytest.raises(RuntimeError, match="crashed"):
        run(Scorer(act), 8, options=loop.Options(chunk_rows=4, threads=2, linger_s=60.0, wait_s=30.0))
    assert ended and no_threads_left()


def test_an_error_while_sampling_ends_the_threads():
    examples, tokens = rows_of(4)
    with pytest.raises(RuntimeError, match="the sampler failed"):
        with loop.scoring(Scorer(), decode, examples, needs=NEEDS, limit=LENIENT, options=FAST) as scoring:
            loop.add(scoring, 0, tokens[0])
            raise RuntimeError("the sampler failed")
    assert no_threads_left()


@pytest.mark.parametrize("short", ["scores", "errors"])
def test_a_score_function_that_answers_fewer_rows_is_noticed(short):
    def score(examples, completions):
        count = len(completions)
        return {"correct": np.ones(1 if short == "scores" else count)}, [None] * (count - (short == "errors"))

    with pytest.raises(ValueError):
        run(score, 4)


# ---- the engine's promise


def test_rows_told_twice_or_never_are_the_engines_mistake():
    with pytest.raises(ValueError, match="row 2 of 4 twice"):
        run(Scorer(), 4, order=[0, 1, 2, 2, 3])
    with pytest.raises(ValueError, match="row 4 of 4"):
        run(Scorer(), 4, order=[0, 4])
    with pytest.raises(ValueError, match=r"did not say that it finished 2 rows, the first: \[1, 3\]"):
        run(Scorer(), 4, order=[0, 2])
    assert no_threads_left()


def test_a_missing_channel_is_named():
    with pytest.raises(ValueError, match=r"needs the score channels \['process'\], the task gives \['correct'\]"):
        run(Scorer(), 4, needs=NEEDS | {"process"})


@pytest.mark.parametrize("bad", [{"chunk_rows": 0}, {"threads": 0}, {"linger_s": -0.1}, {"wait_s": 0.0}])
def test_impossible_options_are_refused(bad):
    with pytest.raises(ValueError, match=f"reward.{next(iter(bad))}="):
        loop.Options(**bad)


def test_it_loads_no_jax():
    code = "import sys, tapojax.rewards.loop; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"

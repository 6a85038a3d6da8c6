"""Batches come in order, as old as was asked for and no older; what fails in the thread fails in the loop."""

import functools
import os
import signal
import threading
import traceback
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tapojax import asynchrony
from tapojax.rollout.collect import Collected
from tapojax.types import Engine, Prompts, Rollout, TrainState

PATIENCE = 60  # of a test that would otherwise wait for ever


def batch(step: int, versions=None) -> Collected:
    """Two rows of two completion tokens; the second row was injected."""
    mask = np.tile([False, True, True], (2, 1))
    zeros, rows = np.zeros((2, 3), np.float32), np.zeros(2, np.int32)
    versions = None if versions is None else np.where(mask, np.array([[-1, *versions], [-1, -1, -1]]), -1)
    rollout = Rollout(mask.astype(np.int32), mask, zeros, zeros, rows + 1, rows > 0, np.array([0, 2]), versions)
    return Collected(
        rollout, {"correct": zeros[:, 0]}, Prompts([{"id": step, "problem": "?"}], [[1]]), [], [], 2, 4, {"sample": 1.0}
    )


class Spy:
    """A `collect` and a `snapshot` that write down how they were called."""

    def __init__(self):
        self.collected: list[tuple[int, int]] = []  # (step, version)
        self.snapshots: list[tuple[int, bool, bool]] = []  # (version, ahead, in_flight)
        self.threads: set[str] = set()

    def collect(self, step, policy):
        self.threads.add(threading.current_thread().name)
        self.collected.append((step, policy.version))
        return batch(step)

    def snapshot(self, version, *, ahead, in_flight):
        self.snapshots.append((version, ahead, in_flight))
        return asynchrony.Policy(version, None, (), None)

    def at(self, step):
        return functools.partial(self.snapshot, step)


def id_of(part) -> int:
    return part.prompts.examples[0]["id"]


def rollouts_thread():
    return next((t for t in threading.enumerate() if t.name == "rollouts"), None)


# ---- order and lag


def test_on_policy_collects_in_the_callers_thread_with_the_weights_of_the_step():
    spy = Spy()
    source = asynchrony.on_policy(spy.collect)
    parts = [source.next(step, spy.at(step)) for step in range(3)]
    assert spy.collected == [(0, 0), (1, 1), (2, 2)] and spy.threads == {threading.current_thread().name}
    assert spy.snapshots == [(step, False, False) for step in range(3)], "nothing is copied"
    assert [part.version for part in parts] == [0, 1, 2] and source.idle() == []
    assert parts[0].seconds == {"sample": 1.0}


@pytest.mark.parametrize("staleness", [1, 2, 3, 9])
def test_batch_j_is_begun_with_version_j_minus_k_however_fast_it_comes(staleness):
    for hurry in (True, False):  # idle after each step: the thread is always as far ahead as it may be
        spy, steps = Spy(), 6
        with asynchrony.ahead(spy.collect, start=0, steps=steps, staleness=staleness) as source:
            parts = []
            for step in range(steps):
                parts.append(source.next(step, spy.at(step)))
                pending = source.idle() if hurry else []
                assert [id_of(part) for part in pending] == list(range(step + 1, steps))[: len(pending)]
        assert [id_of(part) for part in parts] == list(range(steps)), "in order, and none is left out"
        assert spy.collected == [(step, max(0, step - staleness)) for step in range(steps)], "and none beyond the last"
        assert [part.version for part in parts] == [max(0, step - staleness) for step in range(steps)]
        assert spy.threads == {"rollouts"}
        assert [version for version, *_ in spy.snapshots] == list(range(max(1, steps - staleness))), "where needed only"
        assert {(ahead, in_flight) for _, ahead, in_flight in spy.snapshots} == {(True, False)}
        assert all(part.seconds.keys() == {"sample", "wait"} for part in parts)
        assert rollouts_thread() is None, "the thread ends with the block"


def test_the_next_batch_is_collected_while_this_one_trains():
    training = threading.Event()

    def collect(step, policy):
        assert step == 0 or training.wait(PATIENCE), "the loop waited for a batch of a later step"
        return batch(step)

    with asynchrony.ahead(collect, start=0, steps=2, staleness=1) as source:
        source.next(0, Spy().at(0))
        training.set()
        assert id_of(source.next(1, Spy().at(1))) == 1


def test_a_resumed_run_goes_on_behind_what_the_checkpoint_kept():
    spy = Spy()
    kept = [batch(step)._replace(version=step - 2) for step in (4, 5)]
    with asynchrony.ahead(spy.collect, start=4, steps=8, staleness=2, ready=kept) as source:
        parts = [source.next(step, spy.at(step)) for step in range(4, 8)]
    assert [id_of(part) for part in parts] == [4, 5, 6, 7]
    assert spy.collected == [(6, 4), (7, 5)], "as the uninterrupted run has it"


# ---- failure


class Broken(Exception):
    pass


def breaks_at(step):
    def collect(at, policy):
        if at == step:
            raise Broken(f"server down at {at}")
        return batch(at)

    return collect


def test_an_error_in_the_thread_is_raised_with_its_own_traceback():
    with pytest.raises(Broken, match="server down at 0") as error:
        with asynchrony.ahead(breaks_at(0), start=0, steps=3, staleness=1) as source:
            source.next(0, Spy().at(0))
    assert "in collect" in "".join(traceback.format_exception(error.value))
    assert rollouts_thread() is None


def test_an_error_of_a_later_batch_ends_the_run_before_the_next_step():
    with asynchrony.ahead(breaks_at(2), start=0, steps=9, staleness=2) as source:
        assert id_of(source.next(0, Spy().at(0))) == 0
        rollouts_thread() and rollouts_thread().join(PATIENCE)  # it has failed by now
        with pytest.raises(Broken):
            source.next(1, Spy().at(1))
        with pytest.raises(Broken):
            source.idle()


def test_an_interrupt_waits_for_nobody_and_begins_nothing_more(monkeypatch):
    begun, over = [], threading.Event()

    def collect(step, policy):
        begun.append(step)
        os.kill(os.getpid(), signal.SIGINT)  # the main thread waits for this very batch
        over.wait(PATIENCE)
        return batch(step)

    monkeypatch.setattr(asynchrony, "PATIENCE_SECONDS", 0.01)
    with pytest.raises(KeyboardInterrupt):
        with asynchrony.ahead(collect, start=0, steps=9, staleness=3) as source:
            source.next(0, Spy().at(0))
    thread = rollouts_thread()
    assert thread is not None and thread.daemon, "a thread that hangs must not keep the process alive"
    over.set()
    thread.join(PATIENCE)
    assert begun == [0] and not thread.is_alive()


def test_an_error_in_the_loop_ends_the_thread():
    with pytest.raises(Broken):
        with asynchrony.ahead(Spy().collect, start=0, steps=9, staleness=3) as source:
            source.next(0, Spy().at(0))
            raise Broken
    assert rollouts_thread() is None


# ---- in flight


def test_new_weights_reach_the_batch_that_is_sampled():
    """Version 1 comes while batch 1 is sampled: `update` is asked for, and its tokens may be of version 0 or 1."""
    spy, newer = Spy(), threading.Event()

    def collect(step, policy):
        if step == 0:
            return batch(step, [0, 0])
        assert newer.wait(PATIENCE)
        return batch(step, [0, 1])

    def snapshot(version, *, ahead, in_flight):
        if version == 1:
            newer.set()
        return spy.snapshot(version, ahead=ahead, in_flight=in_flight)

    with asynchrony.ahead(collect, start=0, steps=2, staleness=1, in_flight=True) as source:
        first, second = (source.next(step, functools.partial(snapshot, step)) for step in range(2))
    assert spy.snapshots == [(0, True, False), (1, True, True)], (
        "load where nothing is sampled, update where something is"
    )
    assert asynchrony.lag_metrics(first, 0) == {"lag_mean": 0.0, "lag_max": 0}
    assert asynchrony.lag_metrics(second, 1) == {"lag_mean": 0.5, "lag_max": 1}


def test_without_in_flight_new_weights_are_refused():
    def collect(step, policy):
        return batch(step, [0, step])

    with pytest.raises(ValueError, match="sampled with versions 0 to 1 of the weights, asked for were 0 to 0"):
        with asynchrony.ahead(collect, start=0, steps=2, staleness=1) as source:
            for step in range(2):
                source.next(step, Spy().at(step))


# ---- versions


def test_tokens_from_other_weights_than_asked_for_stop_the_run():
    part = batch(3, [2, 3])._replace(version=2)
    asynchrony.check_versions(part, newest=3)
    for version, newest in ((3, 3), (2, 2), (1, 2), (4, 9)):
        with pytest.raises(ValueError, match="does another trainer use the same servers"):
            asynchrony.check_versions(part._replace(version=version), newest=newest)
    with pytest.raises(ValueError, match="does not say which weights sampled which token"):
        asynchrony.check_versions(batch(3)._replace(version=2), newest=3)
    asynchrony.check_versions(batch(3)._replace(version=3), newest=3)


def test_versions_and_lag_are_those_of_sampled_tokens():
    assert asynchrony.token_versions(batch(0, [4, 5])).tolist() == [4, 5], "the injected row has none"
    assert asynchrony.token_versions(batch(0)._replace(version=7)).tolist() == [7, 7]
    part = batch(0, [4, 5])
    nothing = part._replace(rollout=part.rollout._replace(mask=np.zeros((2, 3), bool)))
    assert asynchrony.lag_metrics(nothing, 9) == {}
    asynchrony.check_versions(nothing._replace(version=0), newest=0)


# ---- snapshots


class Arrays(NamedTuple):
    engine: Engine
    state: TrainState
    calls: list[Any]


@pytest.fixture
def arrays():
    calls = []

    def load(params, version):
        calls.append(("load", version))
        return jax.tree.map(jnp.negative, params)

    def update(params, version):
        calls.append(("update", version))
        return "new"

    state = TrainState(jnp.int32(0), {"w": jnp.arange(3.0)}, (), jnp.float32(7))
    return Arrays(Engine(load, lambda *_: None, update=update), state, calls)


def score(params, tokens, mask):
    return params["w"] + tokens


def test_a_snapshot_outlives_the_buffers_it_was_taken_of(arrays):
    policy = asynchrony.snapshot(arrays.engine, arrays.state, 4, score=score, ahead=True, in_flight=False)
    jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)(arrays.state)
    assert arrays.state.params["w"].is_deleted(), "the test tests nothing"
    assert policy.version == 4 and arrays.calls == [("load", 4)]
    np.testing.assert_array_equal(policy.weights["w"], [0, -1, -2])
    np.testing.assert_array_equal(policy.score(1, None), [1, 2, 3])
    assert float(policy.carry) == 7


def test_on_policy_nothing_is_copied_and_in_flight_the_engine_updates(arrays):
    policy = asynchrony.snapshot(arrays.engine, arrays.state, 0, score=None, ahead=False, in_flight=False)
    assert policy.carry is arrays.state.carry and policy.score is None
    policy = asynchrony.snapshot(arrays.engine, arrays.state, 1, score=None, ahead=True, in_flight=True)
    assert policy.weights == "new" and arrays.calls == [("load", 0), ("update", 1)]

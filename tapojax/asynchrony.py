"""Rollouts ahead of training: one background thread collects the batches to come while this one trains.

Version v of the weights is the policy after v batches, and batch j trains version j. With staleness k it is sampled by
version max(0, j - k), whatever is faster: where the engine is deterministic, so is the run. In flight, a version that
comes while batches are sampled reaches their remaining tokens at once; then the lag of a token is k at most, and the
clock decides it. Staleness 0 knows no thread: a batch is collected when it is its turn.

Up to k snapshots of the weights live beside the parameters.
"""

import contextlib
import functools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tapojax.rollout.collect import Collected
from tapojax.types import Engine, TrainState

PATIENCE_SECONDS = 10.0  # for the batch that is being sampled when a run ends early


class Policy(NamedTuple):
    """What samples a batch. For a batch ahead, nothing in it may be given away (donated) by an update."""

    version: int
    weights: Any  # of the engine
    carry: Any
    score: Callable[..., Any] | None  # (tokens, mask) -> TokenStats, for an algorithm that injects rows


Collect = Callable[[int, Policy], Collected]  # (step, policy) -> its batch
Snapshot = Callable[..., Policy]  # (*, ahead, in_flight) -> the policy of now, as `snapshot` makes it


class Source(NamedTuple):
    """Where the loop gets its batches."""

    next: Callable[[int, Snapshot], Collected]  # the batch of a step; takes the snapshot only where it needs one
    # waits until nothing is sampled, and gives the batches of the steps to come: what a checkpoint has to keep
    idle: Callable[[], Sequence[Collected]]


def snapshot(engine: Engine, state: TrainState, step: int, *, score, ahead: bool, in_flight: bool) -> Policy:
    """The policy of `state` to sample with.

    Args:
      score: (params, tokens, mask) -> TokenStats, for an algorithm that injects rows; None: not needed.
      ahead: it is still in use when the coming updates have taken the state's buffers.
      in_flight: what is being sampled takes these weights, too.
    """
    kept = (state.params if score else None, state.carry)
    params, carry = jax.tree.map(jnp.copy, kept) if ahead else kept
    load = engine.update if in_flight else engine.load
    assert load is not None, "the config's check let in_flight pass without engine.update"
    return Policy(step, load(state.params, step), carry, functools.partial(score, params) if score else None)


def on_policy(collect: Collect) -> Source:
    """Each batch when it is its turn, sampled by the policy that it trains."""

    def next_batch(step: int, snapshot: Snapshot) -> Collected:
        policy = snapshot(ahead=False, in_flight=False)
        part = collect(step, policy)._replace(version=policy.version)
        check_versions(part, newest=policy.version)
        return part

    return Source(next_batch, lambda: [])


@contextlib.contextmanager
def ahead(
    collect: Collect,
    *,
    start: int,
    steps: int,
    staleness: int,
    in_flight: bool = False,
    ready: Sequence[Collected] = (),
) -> Iterator[Source]:
    """The batches of steps `start` to `steps`, collected in that order by a thread that ends with the block.

    An error in the thread is raised by the next call, with the thread's own traceback. `ready` are batches of the first
    steps, out of a checkpoint.
    """
    waiting = deque(_done(part) for part in ready)
    orders: queue.SimpleQueue = queue.SimpleQueue()
    over, begun = threading.Event(), start + len(ready)

    def next_batch(step: int, snapshot: Snapshot) -> Collected:
        nonlocal begun
        last = min(step + staleness, steps - 1)
        running = in_flight and not all(future.done() for future in waiting)
        policy = snapshot(ahead=True, in_flight=running) if running or begun <= last else None
        while begun <= last:
            waiting.append(Future())
            orders.put((waiting[-1], begun, policy))
            begun += 1
        for future in waiting:  # an error of a batch to come ends the run now, not when it is the batch's turn
            if future.done():
                future.result()
        started = time.perf_counter()
        part = _awaited(waiting.popleft())
        check_versions(part, newest=step if in_flight else part.version)
        return part._replace(seconds={**part.seconds, "wait": time.perf_counter() - started})

    # a daemon: an engine that does not come back must not keep the process from ending
    thread = threading.Thread(target=_work, args=(collect, orders, over), name="rollouts", daemon=True)
    thread.start()
    try:
        yield Source(next_batch, lambda: [_awaited(future) for future in waiting])
    finally:
        over.set()
        orders.put(None)
        thread.join(PATIENCE_SECONDS)


def _awaited(future: Future) -> Any:
    """Its result. Python sees a Ctrl-C that another thread's system call took only when this one wakes up."""
    while not future.done():
        futures.wait([future], timeout=1.0)
    return future.result()


def _done(part: Collected) -> Future:
    future: Future = Future()
    future.set_result(part)
    return future


def _work(collect: Collect, orders: queue.SimpleQueue, over: threading.Event):
    """Collects what is ordered until an error or the end."""
    while (order := orders.get()) is not None and not over.is_set():
        future, step, policy = order
        try:
            future.set_result(collect(step, policy)._replace(version=policy.version))
        except BaseException as error:
            future.set_exception(error)
            return


def check_versions(part: Collected, *, newest: int):
    """Every token must come from the version its batch began with, or from a later one up to `newest`.

    Raises:
      ValueError: the engine says otherwise, or does not say where several are possible.
    """
    if part.rollout.versions is None and newest != part.version:
        raise ValueError(
            "asynchrony.in_flight: the engine does not say which weights sampled which token (Rollout.versions)"
        )
    found = token_versions(part)
    if found.size and not part.version <= found.min() <= found.max() <= newest:
        raise ValueError(
            f"the engine sampled with versions {found.min()} to {found.max()} of the weights, asked for were "
            f"{part.version} to {newest}: does another trainer use the same servers?"
        )


def token_versions(part: Collected) -> np.ndarray:
    """The version behind each token that was sampled, in one dimension."""
    rollout = part.rollout
    sampled = np.asarray(rollout.mask) & (np.asarray(rollout.source) == 0)[:, None]
    if rollout.versions is None:
        return np.full(sampled.sum(), part.version)
    return np.asarray(rollout.versions)[sampled]


def lag_metrics(part: Collected, step: int) -> dict[str, float]:
    """How many versions of the weights the sampled tokens are behind the parameters that they train."""
    lags = step - token_versions(part)
    return {"lag_mean": float(lags.mean()), "lag_max": int(lags.max())} if lags.size else {}

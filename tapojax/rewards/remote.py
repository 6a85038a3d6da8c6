"""The score function of a task, answered by reward servers. No jax.

Rows are cut into chunks, and each goes to the server with the least to do. A server that fails or is late is left out
until its health check passes again; what it still owes is asked of another one under the same ids, so that no row is
lost and none counts twice. A row that no try could score is NaN, with an error text that names the last server; where
every try ended in UNAVAILABLE (servers died, or their judge is down) it is no row's fault, and a ConnectionError.
"""

import concurrent.futures
import dataclasses
import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import grpc
import numpy as np

from tapojax.rpc import client, fleet, threads
from tapojax.rpc import limits as rpc_limits
from tapojax.rpc import security as rpc_security
from tapojax.rpc import tapojax_pb2 as pb
from tapojax.rpc import tapojax_pb2_grpc as pb_grpc

SERVICE = pb.DESCRIPTOR.services_by_name["Rewards"].full_name
LIMITS = rpc_limits.Limits()
Score = Callable[[Sequence[Any], Sequence[str]], tuple[Mapping[str, Any], Sequence[str | None]]]  # see types.Task


class Description(NamedTuple):
    """What a reward server scores, and the channels it gives."""

    task: str
    channels: tuple[str, ...]


@dataclasses.dataclass
class _Work:
    """One call of the score function."""

    answers: dict[str, pb.ScoredItem] = dataclasses.field(default_factory=dict)  # by id
    streams: list[Any] = dataclasses.field(default_factory=list)
    over: threading.Event = dataclasses.field(default_factory=threading.Event)


def remote_score(
    addresses: Sequence[str],
    *,
    security: rpc_security.Security,
    deadline_s: int | float = 60.0,
    retries: int = 3,
    chunk_rows: int = 32,
    chunks_per_server: int = 4,
    limits: rpc_limits.Limits = LIMITS,
) -> Score:
    """A function like Task.score, for any thread: (examples, completions) -> (scores by channel, error text by row).

    It connects when it is first called.

    Args:
      addresses: host:port of servers that score the same, see `describe`.
      deadline_s: of one try of a chunk.
      retries: tries of a chunk after the first one.
      chunks_per_server: under way at a time.

    Raises (the function):
      ConnectionError: no server was well for deadline_s, or each that was asked for a chunk was UNAVAILABLE.
    """
    if not 0 < deadline_s < math.inf or retries < 0 or min(chunk_rows, chunks_per_server) < 1:
        raise ValueError(
            f"deadline_s={deadline_s}, retries={retries}, chunk_rows={chunk_rows}, chunks_per_server="
            f"{chunks_per_server}: deadline_s must be positive and finite, retries 0 or more, the others 1 or more"
        )
    servers = fleet.make(addresses, SERVICE, _describe, security=security, limits=limits)

    def score(examples: Sequence[Any], completions: Sequence[str]):
        work, items = _Work(), []
        for row, (example, completion) in enumerate(zip(examples, completions, strict=True)):
            try:
                items.append(_item(str(row), example, completion, limits.max_message_bytes))
            except (TypeError, ValueError) as error:
                work.answers[str(row)] = pb.ScoredItem(error=f"the row cannot be sent to a reward server: {error}")
        chunks = [items[start : start + chunk_rows] for start in range(0, len(items), chunk_rows)]
        try:
            fleet.take(servers, 0, tried=(), wait_s=deadline_s, over=work.over)  # now the channels are known
            jobs = threads.in_threads(
                lambda chunk: _score_chunk(servers, chunk, work, deadline_s, retries),
                chunks,
                chunks_per_server * len(addresses),
                name="tapojax-rewards",
            )
            for job in concurrent.futures.as_completed(jobs):
                job.result()
        finally:
            work.over.set()  # after an error or Ctrl-C nothing more is asked
            for stream in work.streams:
                stream.cancel()
        answers = [work.answers[str(row)] for row in range(len(examples))]
        return _columns(servers.said.channels, answers), [answer.error or None for answer in answers]

    return score


def describe(
    addresses: Sequence[str], *, security: rpc_security.Security, limits: rpc_limits.Limits = LIMITS
) -> Description:
    """What the servers score. One of several that does not answer may do so later and is only warned of.

    Raises:
      ConnectionError: none of them answers; it says what is wrong with each.
      ValueError: they do not score the same.
    """
    servers = fleet.make(addresses, SERVICE, _describe, security=security, limits=limits)
    for thread in fleet.check(servers):
        thread.join()
    for server in servers.servers:
        server.channel.close()
    said = {server.address: server.said for server in servers.servers if server.said is not None}
    if not said:
        raise ConnectionError(fleet.all_down(servers))
    if len(set(said.values())) > 1:
        raise ValueError(f"the reward servers do not score the same: {said}")
    return servers.said


def _describe(server: fleet.Server, timeout_s: float) -> Description:
    reply = pb_grpc.RewardsStub(server.channel).Describe(pb.DescribeRequest(), timeout=timeout_s)
    return Description(reply.task, tuple(reply.channels))


def _item(name: str, example: Mapping[str, Any], completion: str, max_bytes: int) -> pb.ScoreItem:
    item = pb.ScoreItem(id=name, example=json.dumps(dict(example)).encode(), completion=completion)
    if item.ByteSize() > max_bytes:
        raise ValueError(f"it has {item.ByteSize()} bytes, a message has at most {max_bytes}")
    return item


def _columns(channels: Sequence[str], answers: Sequence[pb.ScoredItem]) -> dict[str, np.ndarray]:
    return {name: np.array([answer.scores.get(name, math.nan) for answer in answers], np.float32) for name in channels}


def _score_chunk(servers: fleet.Fleet, items: Sequence[pb.ScoreItem], work: _Work, deadline_s, retries: int):
    """Leaves an answer to each item in work.answers."""
    waiting, tried, said, unavailable = {item.id: item for item in items}, list[str](), "", True
    for attempt in range(retries + 1):
        if attempt:
            work.over.wait(fleet.pause(attempt))
        rows, failure = len(waiting), None
        server = fleet.take(servers, rows, tried=tried, wait_s=deadline_s, over=work.over)
        try:
            _exchange(servers, server, waiting, work, deadline_s)
            return
        except (client.Failure, fleet.Broken) as error:
            tried, said = [*tried, server.address], str(error)
            code = error.code if isinstance(error, client.Failure) else None
            unavailable &= code == grpc.StatusCode.UNAVAILABLE
            # a server that is only busy is not left out, nor one whose stream we have cancelled
            busy = code == grpc.StatusCode.RESOURCE_EXHAUSTED
            failure = None if busy or work.over.is_set() else said
        finally:
            fleet.give_back(servers, server, rows, failure=failure)
    if unavailable:
        raise ConnectionError(f"no reward server could score in {retries + 1} tries, the last: {said}")
    for name in waiting:
        work.answers[name] = pb.ScoredItem(error=f"not scored in {retries + 1} tries, the last: {said}")


def _exchange(servers: fleet.Fleet, server: fleet.Server, waiting: dict[str, pb.ScoreItem], work: _Work, deadline_s):
    """Moves the server's answers to work.answers; on an error `waiting` holds the items that are still to be scored."""
    with client.failures(server.address):
        stream = pb_grpc.RewardsStub(server.channel).Score(iter([*waiting.values()]), timeout=deadline_s)
        work.streams.append(stream)
        try:
            for answer in [] if work.over.is_set() else stream:
                if answer.id not in waiting:
                    raise fleet.Broken(f"{server.address} answered {answer.id!r}, which it was not asked or not again")
                if answer.scores.keys() != set(servers.said.channels):
                    raise fleet.Broken(f"{server.address} gave {sorted(answer.scores)}, agreed was {servers.said}")
                work.answers[answer.id] = answer
                del waiting[answer.id]
        finally:
            stream.cancel()
    if waiting:
        raise fleet.Broken(f"{server.address} left {len(waiting)} items without an answer")

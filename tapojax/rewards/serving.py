"""The Rewards service around the score function of a task. No jax.

Items of all clients are gathered into batches, scored in threads, and go back in the order they are finished. What is
wrong with an item costs that item alone: it comes back with an error text and NaN in every channel, never 0. When a
batch raises, its items are scored one by one, so that the one at fault is found. Two things are no item's fault: a
ConnectionError (a judge that cannot be asked) ends the streams of its batch as UNAVAILABLE with its words, and a batch
that takes longer than `batch_s` is left behind in its thread, with its items unscored.

Nothing grows without bound: a stream holds at most `max_in_flight` items and the service `max_waiting`; then it reads
no further, and HTTP/2's flow control holds the client back.
"""

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import grpc
from prometheus_client import Counter, Gauge

from tapojax.rpc import tapojax_pb2 as pb
from tapojax.rpc import tapojax_pb2_grpc as pb_grpc
from tapojax.rpc import telemetry as rpc_telemetry
from tapojax.rpc import threads as rpc_threads
from tapojax.rpc.server import Refused

# (examples, completions) -> (scores by channel, error text or None by row), see types.Task
Score = Callable[[Sequence[Any], Sequence[str]], tuple[Mapping[str, Any], Sequence[str | None]]]
MAX_ERROR = 500  # characters


@dataclasses.dataclass
class _Stream:
    """What one call waits for; it has no more than `places` items here."""

    places: asyncio.Semaphore
    results: asyncio.Queue = dataclasses.field(default_factory=asyncio.Queue)
    gone: bool = False  # nobody waits any more


class Rewards(pb_grpc.RewardsServicer):
    """Made inside the running event loop, and scores until it ends.

    Args:
      channels: that `score` gives, see `probe`; a batch with others is an error.
      max_batch: items scored in one call.
      linger_s: how long a batch that is not full waits for more.
      threads: batches scored at a time.
      batch_s: seconds that one may take.
    """

    def __init__(
        self,
        score: Score,
        *,
        task: str,
        channels: Sequence[str],
        telemetry: rpc_telemetry.Telemetry,
        max_batch: int = 64,
        linger_s: float = 0.003,
        threads: int = 4,
        batch_s: float = 600.0,
        max_waiting: int = 1024,
        max_in_flight: int = 256,
    ):
        if min(max_batch, threads, max_waiting, max_in_flight) < 1 or linger_s < 0 or batch_s <= 0:
            raise ValueError(
                f"max_batch={max_batch}, threads={threads}, max_waiting={max_waiting}, max_in_flight={max_in_flight} "
                f"must be at least 1, linger_s={linger_s} at least 0, batch_s={batch_s} above 0"
            )
        self._score, self._task, self._channels = score, task, tuple(channels)
        self._max_batch, self._linger_s, self._batch_s = max_batch, linger_s, batch_s
        self._max_in_flight = max_in_flight
        self._waiting: asyncio.Queue[tuple[pb.ScoreItem, _Stream]] = asyncio.Queue(max_waiting)
        registry = telemetry.registry
        self._items = Counter(
            "tapojax_scored_items", "Items by outcome: scored, error.", ["outcome"], registry=registry
        )
        waiting = Gauge("tapojax_waiting_items", "Items that no thread has taken up.", registry=registry)
        waiting.set_function(self._waiting.qsize)
        self._scorers = [asyncio.create_task(self._score_batches()) for _ in range(threads)]

    async def Describe(self, request: pb.DescribeRequest, context) -> pb.DescribeReply:
        return pb.DescribeReply(task=self._task, channels=self._channels)

    async def Score(self, request_iterator, context) -> AsyncIterator[pb.ScoredItem]:
        stream, answered = _Stream(asyncio.Semaphore(self._max_in_flight)), 0
        reading = asyncio.create_task(self._read(request_iterator, stream))
        reading.add_done_callback(lambda _: stream.results.put_nowait(None))
        try:
            while not (reading.done() and answered == reading.result()):
                result = await stream.results.get()
                if isinstance(result, ConnectionError):
                    raise Refused(grpc.StatusCode.UNAVAILABLE, str(result))
                if result is not None:
                    yield result
                    stream.places.release()
                    answered += 1
        finally:
            stream.gone = True
            reading.cancel()
            await asyncio.wait([reading])

    async def _read(self, items: AsyncIterator[pb.ScoreItem], stream: _Stream) -> int:
        """Lets items wait as places become free; how many there were."""
        count = 0
        async for item in items:
            await stream.places.acquire()
            await self._waiting.put((item, stream))
            count += 1
        return count

    async def _score_batches(self):
        while True:
            batch = [await self._waiting.get()]
            if self._waiting.qsize() < self._max_batch - 1:
                await asyncio.sleep(self._linger_s)
            while len(batch) < self._max_batch and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            batch = [(item, stream) for item, stream in batch if not stream.gone]
            for result, (_, stream) in zip(await self._results([item for item, _ in batch]), batch, strict=True):
                stream.results.put_nowait(result)
                self._items.labels("error" if isinstance(result, ConnectionError) or result.error else "scored").inc()

    async def _results(self, items: Sequence[pb.ScoreItem]) -> Sequence[pb.ScoredItem | ConnectionError]:
        """One an item, in batch_s."""
        try:
            async with asyncio.timeout(self._batch_s):
                return await _in_thread(score_items, self._score, self._channels, items)
        except TimeoutError:
            why = f"not scored within --batch_s={self._batch_s:g} of the reward server: a row of the batch hangs"
            return [_failed(item, self._channels, why) for item in items]
        except ConnectionError as error:
            return [error] * len(items)


def score_items(score: Score, channels: Sequence[str], items: Sequence[pb.ScoreItem]) -> list[pb.ScoredItem]:
    """One result an item, in order, whatever is in the items and whatever `score` does.

    Raises:
      ConnectionError: `score` did: nothing can be scored now.
    """
    results: dict[int, pb.ScoredItem] = {}
    examples: dict[int, Mapping[str, Any]] = {}
    for place, item in enumerate(items):
        try:
            examples[place] = _example(item)
        except (ValueError, RecursionError) as error:
            results[place] = _failed(item, channels, f"the example is no JSON object: {error}")
    rows = [(items[place], example) for place, example in examples.items()]
    results.update(zip(examples, _score_rows(score, channels, rows), strict=True))
    return [results[place] for place in range(len(items))]


def probe(score: Score, example: Mapping[str, Any]) -> list[str]:
    """The channels of `score`, from one call of it with an empty completion: a verifier that cannot work is found now.

    Raises:
      ValueError: the example cannot be sent to a server as it is.
    """
    try:
        json.dumps(dict(example))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the example {example.get('id')!r} cannot be written as JSON: {error}") from error
    scores, _ = score([example], [""])
    return list(scores)


def _example(item: pb.ScoreItem) -> Mapping[str, Any]:
    example = json.loads(item.example)
    if not isinstance(example, dict):
        raise ValueError(f"it is a {type(example).__name__}")
    return example


def _score_rows(score: Score, channels: Sequence[str], rows: Sequence[tuple[pb.ScoreItem, Any]]) -> list[pb.ScoredItem]:
    if not rows:
        return []
    try:
        scores, errors = score([example for _, example in rows], [item.completion for item, _ in rows])
        return _results(channels, [item for item, _ in rows], scores, errors)
    except ConnectionError:
        raise
    except BaseException as error:  # in a thread of its own, SystemExit is just another way to fail
        if len(rows) == 1:
            return [_failed(rows[0][0], channels, f"{type(error).__name__}: {error}")]
        return [result for row in rows for result in _score_rows(score, channels, [row])]


def _results(channels: Sequence[str], items, scores, errors) -> list[pb.ScoredItem]:
    lengths = {name: len(values) for name, values in scores.items()}
    if lengths != dict.fromkeys(channels, len(items)) or len(errors) != len(items):
        raise ValueError(
            f"the task gave {lengths} scores and {len(errors)} errors, asked were {len(items)} of {list(channels)}"
        )
    return [
        pb.ScoredItem(
            id=item.id,
            scores={name: float(scores[name][row]) for name in channels},
            error=_clean(errors[row] or ""),
        )
        for row, item in enumerate(items)
    ]


def _failed(item: pb.ScoreItem, channels: Sequence[str], why: str) -> pb.ScoredItem:
    return pb.ScoredItem(id=item.id, scores=dict.fromkeys(channels, float("nan")), error=_clean(why))


def _clean(text: str) -> str:
    """Short, and without the lone surrogates that a message cannot carry."""
    return text[:MAX_ERROR].encode("utf-8", "replace").decode()


async def _in_thread(function: Callable[..., Any], *arguments):
    """Its result. Unlike asyncio.to_thread's, a thread that hangs for ever does not keep the process from ending."""
    (done,) = rpc_threads.in_threads(lambda given: function(*given), [arguments], 1, name="tapojax-score")
    return await asyncio.wrap_future(done)

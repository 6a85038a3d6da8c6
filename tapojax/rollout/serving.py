"""The Rollouts service around a sampler: versions, idempotent requests, groups streamed as they finish. No jax.

A request is work with a name. Whoever asks for a name that is known joins the work or replays its groups, so a client
that lost its connection asks again and nothing is sampled twice. Work that nobody listens to is ended after a while.

Weights come in two calls: LoadWeights checks and stages a whole version, CommitWeights swaps to it. A server that
fails in between keeps what it has.
"""

import asyncio
import collections
import contextlib
import hashlib
import itertools
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from tapojax.rollout import sampler as sampler_module
from tapojax.rollout.sampler import Sample, Sampler, Tensor
from tapojax.rpc import limits as limits_module
from tapojax.rpc import tapojax_pb2 as pb
from tapojax.rpc import tapojax_pb2_grpc as pb_grpc
from tapojax.rpc import telemetry as telemetry_module
from tapojax.rpc import weights as weights_module
from tapojax.rpc.server import Refused

# (examples, completions as tokens) -> (scores by channel, error text or None by row)
Scorer = Callable[[Sequence[Any], Sequence[Sequence[int]]], Awaitable[tuple[Mapping[str, Any], Sequence[str | None]]]]
MODES = {pb.PAUSE_MODE_KEEP: "keep", pb.PAUSE_MODE_WAIT: "wait", pb.PAUSE_MODE_ABORT: "abort"}


class Work:
    """One named request: its groups so far, and who listens."""

    def __init__(self, digest: bytes, skipped: Iterable[int]):
        self.digest, self.skipped = digest, frozenset(skipped)
        self.groups: list[pb.Group] = []
        self.grown = asyncio.Condition()
        self.error: BaseException | None = None
        self.done = False
        self.listeners = 0
        self.idle_since = time.monotonic()
        self.task: asyncio.Task | None = None


class Rollouts(pb_grpc.RolloutsServicer):
    """See the module. `scorer` scores completions before they are sent, for requests that ask for it."""

    def __init__(
        self,
        sampler: Sampler,
        *,
        limits: limits_module.Limits,
        telemetry: telemetry_module.Telemetry,
        scorer: Scorer | None = None,
        score_channels: Sequence[str] = (),
        weights_root: Path | None = None,
        keep_finished: int = 256,
        orphan_s: float = 60.0,
    ):
        self.sampler, self.limits, self.scorer, self.weights_root = sampler, limits, scorer, weights_root
        self.numbers = telemetry
        self.score_channels, self.keep_finished, self.orphan_s = score_channels, keep_finished, orphan_s
        self.version = -1
        self.tensors: Mapping[str, Tensor] | None = None
        self.staged: tuple[int, Mapping[str, Tensor]] | None = None
        self.paused = self.draining = False
        self.server_id = uuid.uuid4().hex
        self.works: collections.OrderedDict[str, Work] = collections.OrderedDict()
        self.swapping = asyncio.Lock()
        self.broken = asyncio.Event()  # the sampler cannot go on: the process should end

    # ---- sampling

    async def Generate(self, request: pb.GenerateRequest, context) -> AsyncIterator[pb.Groups]:
        work = self._join(request)
        skip, sent = set(request.skip), 0
        work.listeners += 1
        try:
            while not (work.done and sent == len(work.groups)):
                async with work.grown:
                    while not work.done and sent == len(work.groups):
                        await work.grown.wait()
                ready, sent = work.groups[sent:], len(work.groups)
                for message in _messages(
                    [group for group in ready if group.index not in skip], self.limits.chunk_bytes
                ):
                    yield message
        finally:
            work.listeners -= 1
            work.idle_since = time.monotonic()
        if work.error is not None:
            raise work.error

    def _join(self, request: pb.GenerateRequest) -> Work:
        digest = _digest(request)
        if (known := self.works.get(request.request_id)) and known.error is None:
            if known.digest != digest:
                raise Refused(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    f"request_id {request.request_id!r} names another request: ids must not be reused",
                )
            if known.skipped <= set(request.skip):
                return known
        self._check(request)
        work = self.works[request.request_id] = Work(digest, request.skip)
        work.task = asyncio.create_task(self._run(request, work))
        self.numbers.tokens.labels("prompt").inc(sum(len(prompt.tokens) for prompt in request.prompts))
        self._forget()
        return work

    def _check(self, request: pb.GenerateRequest):
        """Raises Refused or ValueError for what can never be sampled, or not by these weights."""
        limits_module.check_generate(request, self.limits)
        description = self.sampler.description
        longest = max((len(prompt.tokens) for prompt in request.prompts), default=0)
        if longest > description.max_prompt_tokens or request.sampling.max_tokens > description.max_tokens:
            raise ValueError(
                f"a prompt of {longest} tokens, max_tokens={request.sampling.max_tokens}: this server takes prompts of "
                f"{description.max_prompt_tokens} and completions of {description.max_tokens}; start it with larger "
                "--max_prompt_tokens and --max_tokens"
            )
        if not all(prompt.tokens for prompt in request.prompts) or request.group_size == 0 or len(request.key) != 2:
            raise ValueError("a request takes prompts of one token or more, a group_size and a key of two words")
        if request.score and self.scorer is None:
            raise ValueError("score=true, but this server has no scorer: start it with --reward_addresses")
        if self.version != request.version:
            raise Refused(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this server has version {self.version} of the weights, the request is for {request.version}",
            )

    async def _run(self, request: pb.GenerateRequest, work: Work):
        """Fills work.groups. Scoring a group overlaps with sampling the next ones."""
        scoring: set[asyncio.Task] = set()
        examples = {prompt.index: prompt.example for prompt in request.prompts}
        try:
            with self._watched():
                started = time.perf_counter()
                async with contextlib.aclosing(self.sampler.generate(request)) as groups:
                    async for index, samples in groups:
                        finish = self._finish(work, index, examples[index] if request.score else None, samples)
                        scoring.add(asyncio.create_task(finish))
                self.numbers.sampling_seconds.inc(time.perf_counter() - started)
            await asyncio.gather(*scoring)
        except asyncio.CancelledError:
            work.error = Refused(grpc.StatusCode.ABORTED, f"request {request.request_id!r} was aborted")
        except Exception as error:
            work.error = error
        finally:
            for task in scoring:
                task.cancel()
            work.done = True
            async with work.grown:
                work.grown.notify_all()

    async def _finish(self, work: Work, index: int, example: bytes | None, samples: Sequence[Sample]):
        completions = [_completion(sample) for sample in samples]
        if example is not None:
            await self._score(json.loads(example), samples, completions)
        self.numbers.tokens.labels("completion").inc(sum(len(sample.tokens) for sample in samples))
        work.groups.extend(_parts(index, completions, self.limits.chunk_bytes))
        async with work.grown:
            work.grown.notify_all()

    async def _score(self, example, samples: Sequence[Sample], completions: Sequence[pb.Completion]):
        assert self.scorer is not None
        scores, errors = await self.scorer([example] * len(samples), [sample.tokens for sample in samples])
        for row, (completion, error) in enumerate(zip(completions, errors, strict=True)):
            completion.scores.update({name: float(values[row]) for name, values in scores.items()})
            completion.score_error = error or ""

    def _forget(self):
        """Ends work without listeners, and drops the oldest finished ones."""
        now = time.monotonic()
        for work in self.works.values():
            if not work.done and work.listeners == 0 and now - work.idle_since > self.orphan_s and work.task:
                work.task.cancel()
        finished = [name for name, work in self.works.items() if work.done and work.listeners == 0]
        for name in finished[: max(len(finished) - self.keep_finished, 0)]:
            del self.works[name]

    async def Abort(self, request: pb.AbortRequest, context) -> pb.AbortReply:
        running = [work for name in request.request_ids if (work := self.works.get(name)) and not work.done]
        for work in running:
            if work.task is not None:
                work.task.cancel()
        return pb.AbortReply(aborted=len(running))

    async def Logprobs(self, request: pb.LogprobsRequest, context) -> pb.LogprobsReply:
        limits_module.check_logprobs(request, self.limits)
        with self._watched():
            rows = await self.sampler.logprobs([list(row.tokens) for row in request.rows])
        return pb.LogprobsReply(rows=[pb.Logprobs(logprobs=row) for row in rows], version=self.version)

    # ---- weights

    async def LoadWeights(self, request_iterator, context) -> pb.LoadReply:
        try:
            version, tensors, size = await weights_module.receive(
                request_iterator,
                self.tensors,
                self.version,
                self.sampler.description.tensors,
                max_bytes=self.limits.max_weight_bytes,
                root=self.weights_root,
            )
        except weights_module.ChecksumError as error:
            raise Refused(grpc.StatusCode.DATA_LOSS, str(error)) from error
        except weights_module.BaseMismatch as error:
            raise Refused(grpc.StatusCode.FAILED_PRECONDITION, str(error)) from error
        self.staged = (version, tensors)
        self.numbers.weight_bytes.inc(size)
        return pb.LoadReply(version=version, bytes=size)

    async def CommitWeights(self, request: pb.CommitRequest, context) -> pb.StatusReply:
        async with self.swapping:
            if request.version != self.version:
                if self.staged is None or self.staged[0] != request.version:
                    staged = None if self.staged is None else self.staged[0]
                    raise Refused(
                        grpc.StatusCode.FAILED_PRECONDITION,
                        f"version {request.version} is not staged here (staged: {staged}, loaded: {self.version}): "
                        "send it with LoadWeights first",
                    )
                version, tensors = self.staged
                # shielded: a swap that has begun is finished whether or not the client still waits
                await asyncio.shield(asyncio.ensure_future(self._swap(version, tensors)))
        return self._status()

    async def _swap(self, version: int, tensors: Mapping[str, Tensor]):
        with self._watched():
            await self.sampler.load(tensors, version)
        self.version, self.tensors, self.staged = version, tensors, None
        self.numbers.weight_version.set(version)

    @contextlib.contextmanager
    def _watched(self):
        """Notices that the sampler is broken."""
        try:
            yield
        except sampler_module.Broken:
            self.broken.set()
            raise

    # ---- control

    async def Status(self, request: pb.StatusRequest, context) -> pb.StatusReply:
        self._forget()
        return self._status()

    def _status(self) -> pb.StatusReply:
        description = self.sampler.description
        return pb.StatusReply(
            engine=description.engine,
            version=self.version,
            staged=-1 if self.staged is None else self.staged[0],
            paused=self.paused,
            draining=self.draining,
            running=sum(not work.done for work in self.works.values()),
            max_prompt_tokens=description.max_prompt_tokens,
            max_tokens=description.max_tokens,
            model=sampler_module.model_digest(description.tensors),
            server_id=self.server_id,
            score_channels=self.score_channels,
        )

    async def Pause(self, request: pb.PauseRequest, context) -> pb.StatusReply:
        if request.mode not in MODES:
            raise ValueError(f"pause mode {request.mode}: say KEEP, WAIT or ABORT")
        await self.sampler.pause(MODES[request.mode])
        self.paused = True
        return self._status()

    async def Resume(self, request: pb.ResumeRequest, context) -> pb.StatusReply:
        await self.sampler.resume()
        self.paused = False
        return self._status()

    async def close(self):
        """Ends all work; the streams end with ABORTED."""
        for work in self.works.values():
            if work.task is not None:
                work.task.cancel()
        await asyncio.gather(*(work.task for work in self.works.values() if work.task), return_exceptions=True)
        await self.sampler.close()


def _digest(request: pb.GenerateRequest) -> bytes:
    """Of all that decides the completions: which groups the client lacks and which weights it
    knew of do not."""
    same = pb.GenerateRequest()
    same.CopyFrom(request)
    del same.skip[:]
    same.version = 0
    return hashlib.sha256(same.SerializeToString(deterministic=True)).digest()


def _completion(sample: Sample) -> pb.Completion:
    return pb.Completion(
        tokens=sample.tokens,
        logprobs=sample.logprobs,
        base_logprobs=sample.base_logprobs,
        finish_reason=pb.FINISH_REASON_STOP if sample.stopped else pb.FINISH_REASON_LENGTH,
        versions=[pb.VersionSpan(version=s.version, begin=s.begin, end=s.end) for s in sample.versions],
    )


def _parts(index: int, completions: Sequence[pb.Completion], chunk_bytes: int) -> list[pb.Group]:
    """A group in one part, or several of about chunk_bytes each; the last one is marked."""
    parts = [
        pb.Group(index=index, first_sample=piece.start, completions=completions[piece])
        for piece in _pieces([completion.ByteSize() for completion in completions], chunk_bytes)
    ]
    parts[-1].last = True
    return parts


def _messages(groups: Sequence[pb.Group], chunk_bytes: int) -> Iterator[pb.Groups]:
    """Messages of about chunk_bytes each: one a group would cost more than its tokens."""
    for piece in _pieces([group.ByteSize() for group in groups], chunk_bytes):
        yield pb.Groups(groups=groups[piece])


def _pieces(sizes: Sequence[int], limit: int) -> list[slice]:
    """Where to cut, so that each piece is of `limit` bytes or less, or of one item; nothing gives no piece."""
    starts, filled = list[int](), 0
    for place, size in enumerate(sizes):
        if not starts or filled + size > limit:
            starts.append(place)
            filled = 0
        filled += size
    return [slice(*ends) for ends in itertools.pairwise([*starts, len(sizes)])]

"""Rollout servers for tests: a real gRPC server in a thread around a sampler, real or faked, that can be broken."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Mapping, Sequence

import numpy as np

from tapojax.rollout import serving
from tapojax.rollout.sampler import Description, Sample, Sampler, Span, Tensor
from tapojax.rpc import limits, security, server, telemetry
from tapojax.rpc import tapojax_pb2 as pb
from tapojax.rpc import tapojax_pb2_grpc as pb_grpc

NO_SECRETS = security.Security()
LIMITS = limits.Limits(chunk_bytes=4096)


class Served:
    """One server in a thread of its own."""

    def __init__(self, sampler: Sampler, *, secrets: security.Security = NO_SECRETS, port: int = 0, **options):
        self.sampler, self.secrets, self.options = sampler, secrets, options
        self.ready, self.loop = threading.Event(), asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, args=(port,), daemon=True)
        self.thread.start()
        assert self.ready.wait(30)
        self.address = f"127.0.0.1:{self.port}"

    def _run(self, port: int):
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self._serve(port))
        self.loop.run_forever()

    async def _serve(self, port: int):
        numbers = telemetry.telemetry()
        self.servicer = serving.Rollouts(self.sampler, limits=LIMITS, telemetry=numbers, **self.options)
        self.running = await server.start(
            [lambda grpc_server: pb_grpc.add_RolloutsServicer_to_server(self.servicer, grpc_server)],
            ["tapojax.v1.Rollouts"],
            host="127.0.0.1",
            port=port,
            security=self.secrets,
            limits=LIMITS,
            telemetry=numbers,
        )
        self.port = self.running.port
        self.ready.set()

    def kill(self):
        """Cuts every call at once."""
        if self.thread.is_alive():
            asyncio.run_coroutine_threadsafe(self.running.drain(0), self.loop).result(10)
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(10)


@contextlib.contextmanager
def serving_all(*samplers: Sampler, **options):
    """A server around each sampler, killed at the end."""
    servers = [Served(sampler, **options) for sampler in samplers]
    try:
        yield servers
    finally:
        for one in servers:
            one.kill()


class Fake:
    """What a fake sampler was asked, and how it shall misbehave."""

    def __init__(self, seconds: float = 0.0):
        self.seconds, self.asked, self.loaded = seconds, list[tuple[str, int]](), dict[int, Mapping[str, Tensor]]()
        self.version, self.spoil, self.on_group, self.on_load = -1, None, None, None
        self.logprob = 0.0


def expected_tokens(key: Sequence[int], index: int, sample: int, budget: int) -> list[int]:
    """What every fake sampler answers: it follows from the request alone, and ends in the stop token 1."""
    rng = np.random.default_rng([*key, index, sample])
    return [*rng.integers(2, 20, rng.integers(1, budget)).tolist(), 1]


def fake_sampler(fake: Fake, tensors: Mapping[str, tuple[int, ...]]) -> Sampler:
    async def generate(request: pb.GenerateRequest) -> AsyncGenerator[tuple[int, Sequence[Sample]], None]:
        for prompt in request.prompts:
            if prompt.index in request.skip:
                continue
            await asyncio.sleep(fake.seconds)
            if fake.on_group is not None:
                await fake.on_group(prompt.index)
            fake.asked.append((request.request_id, prompt.index))
            group = []
            for sample in range(request.group_size):
                tokens = expected_tokens(request.key, prompt.index, sample, request.sampling.max_tokens)
                spans = [Span(fake.version, 0, len(tokens))]
                group.append(Sample(tokens, [-0.5] * len(tokens), [], True, spans))
            yield prompt.index, fake.spoil(group) if fake.spoil else group

    async def logprobs(rows):
        return [[fake.logprob] * (len(row) - 1) for row in rows]

    async def load(arrays, version):
        if fake.on_load is not None:
            await fake.on_load()
        fake.loaded[version], fake.version = arrays, version

    async def nothing(*args):
        pass

    return Sampler(Description("fake", 16, 32, tensors), generate, logprobs, load, nothing, nothing, nothing)


def wait_until(condition, seconds: float = 10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)

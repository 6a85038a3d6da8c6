"""Servers for tests: on loopback and any free port, in an event loop of their own thread, with echoing servicers."""

import asyncio
import functools
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tapojax.rpc import client, limits, security, server, telemetry
from tapojax.rpc import tapojax_pb2 as pb
from tapojax.rpc import tapojax_pb2_grpc as pb_grpc

SERVICES = ["tapojax.v1.Rollouts", "tapojax.v1.Rewards"]
NOBODY = security.Security()


class Rewards(pb_grpc.RewardsServicer):
    """Gives every item its own length; some completions are errors. A call runs as long as its items come."""

    def __init__(self):
        self.ended = threading.Semaphore(0)  # one for each Score that is over, however it ended

    async def Score(self, requests, context):
        try:
            async for item in requests:
                if item.completion == "value":
                    raise ValueError(f"item {item.id}: expected a completion, got a value")
                if item.completion == "bug":
                    raise KeyError("internals of the server")
                if item.completion == "refused":
                    raise server.Refused(server.Code.DATA_LOSS, "the checksum does not match: send it again")
                if item.completion == "long":
                    raise ValueError("\U0001f600" * 100_000)
                if item.completion == "surrogate":
                    raise ValueError("half of a character: \ud800")  # as JSON can hold it
                yield pb.ScoredItem(id=item.id, scores={"length": len(item.completion)})
        finally:
            self.ended.release()

    async def Describe(self, request, context):
        return pb.DescribeReply(task="lengths", channels=["length"])


class Rollouts(pb_grpc.RolloutsServicer):
    """Answers without a model."""

    async def Generate(self, request, context):
        limits.check_generate(request, limits.Limits())
        for prompt in request.prompts:
            completions = [pb.Completion(tokens=prompt.tokens)]
            yield pb.Groups(groups=[pb.Group(index=prompt.index, completions=completions, last=True)])

    async def Logprobs(self, request, context):
        limits.check_logprobs(request, limits.Limits())
        return pb.LogprobsReply(rows=[pb.Logprobs(logprobs=[0.0] * (len(row.tokens) - 1)) for row in request.rows])

    async def LoadWeights(self, requests, context):
        return pb.LoadReply(bytes=sum([len(chunk.piece.data) async for chunk in requests]))

    async def CommitWeights(self, request, context):
        return pb.StatusReply(version=request.version)

    async def Status(self, request, context):
        return pb.StatusReply(engine="none")

    async def Pause(self, request, context):
        return pb.StatusReply(paused=True)

    async def Resume(self, request, context):
        return pb.StatusReply()

    async def Abort(self, request, context):
        return pb.AbortReply(aborted=len(request.request_ids))


class Served(NamedTuple):
    """A server that runs, and a client's view of it."""

    address: str
    running: server.Running
    telemetry: telemetry.Telemetry
    rewards: Any  # the servicer
    call: Any  # runs a coroutine in the server's loop

    def channel(self, identity: security.Security = NOBODY):
        return client.channel(self.address, security=identity, limits=limits.Limits())

    def stub(self, identity: security.Security = NOBODY):
        return pb_grpc.RewardsStub(self.channel(identity))


@pytest.fixture(scope="module")
def call():
    """Runs a coroutine in an event loop of another thread and returns its future."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def cancel_the_rest():
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    yield lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop)
    asyncio.run_coroutine_threadsafe(cancel_the_rest(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def serve(call):
    """serve(identity=NOBODY, **limits) starts a server, which ends with the test.

    make(limits, telemetry) -> (a Rollouts, a Rewards) is called in the server's loop.
    """
    started = []

    def start(*, make=lambda *_: (Rollouts(), Rewards()), port=0, identity=NOBODY, host="127.0.0.1", **changes):
        numbers, bounds = telemetry.telemetry(), limits.Limits(**changes)

        async def begin():
            rollouts, rewards = make(bounds, numbers)
            servicers = [
                functools.partial(pb_grpc.add_RolloutsServicer_to_server, rollouts),
                functools.partial(pb_grpc.add_RewardsServicer_to_server, rewards),
            ]
            options = {"security": identity, "limits": bounds, "telemetry": numbers}
            return await server.start(servicers, SERVICES, host=host, port=port, **options), rewards

        running, rewards = call(begin()).result(10)
        started.append(running)
        return Served(f"{host}:{running.port}", running, numbers, rewards, call)

    yield start
    for running in started:
        call(running.drain(0)).result(10)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory) -> Path:
    """A folder: authority, server, client and stranger (signed by itself), each as NAME.pem and NAME.key."""
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command is not installed")
    folder = tmp_path_factory.mktemp("certificates")
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2".split()
    signed = ["-CA", "authority.pem", "-CAkey", "authority.key", "-addext", "basicConstraints=critical,CA:FALSE"]
    for name, extra in [("authority", []), ("server", signed), ("client", signed), ("stranger", [])]:
        files = ["-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}"]
        names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
        subprocess.run([*make, *files, *names, *extra], cwd=folder, check=True, capture_output=True)
    return folder

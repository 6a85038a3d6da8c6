"""A server outlives whatever is sent to it: ten thousand broken messages, broken HTTP/2, broken headers."""

import functools
import random
import socket
import time

import grpc
import pytest

from tapojax.rewards import serving as reward_serving
from tapojax.rollout import sampler
from tapojax.rollout import serving as rollout_serving
from tapojax.rpc import limits, security
from tapojax.rpc import tapojax_pb2 as pb
from tapojax.rpc import tapojax_pb2_grpc as pb_grpc
from tests.rpc import fuzzing

TOKEN = security.Security(token="a-word")
FREE = {"calls_per_second": 1e6, "burst": 10**6}
# what a broken message may end in: never INTERNAL, UNKNOWN or a deadline
FAIR = {"OK", "INVALID_ARGUMENT", "FAILED_PRECONDITION", "DATA_LOSS"}


def real(limits, telemetry):
    """The servicers that are shipped, around a sampler and a task of a few lines."""

    async def generate(request):
        for prompt in request.prompts:
            if prompt.index not in request.skip:
                yield prompt.index, [sampler.Sample([1], [0.0], [], True, [])] * request.group_size

    async def logprobs(rows):
        return [[0.0] * (len(row) - 1) for row in rows]

    async def nothing(*_):
        pass

    description = sampler.Description("none", 1000, 1000, {"w": (2, 3)})
    engine = sampler.Sampler(description, generate, logprobs, nothing, nothing, nothing, nothing)
    rollouts = rollout_serving.Rollouts(engine, limits=limits, telemetry=telemetry)
    rollouts.version = 0
    rewards = reward_serving.Rewards(
        lambda examples, completions: ({"correct": [1.0] * len(examples)}, [None] * len(examples)),
        task="all right",
        channels=["correct"],
        telemetry=telemetry,
    )
    return rollouts, rewards


def alive(served, identity=TOKEN):
    return served.stub(identity).Describe(pb.DescribeRequest(), timeout=10).channels


def still_running(served):
    """Calls that never end; the last of those that do may end a moment after its client knows."""
    end = time.monotonic() + 10
    while calls := [s for metric in served.telemetry.running.collect() for s in metric.samples if s.value]:
        if time.monotonic() > end:
            break
        time.sleep(0.01)
    return calls


def test_ten_thousand_broken_messages(serve, caplog):
    """A thousand to each of the ten methods; a call that hung would end in DEADLINE_EXCEEDED."""
    served = serve(make=real, identity=TOKEN, **FREE)
    attack = functools.partial(fuzzing.attack, served.channel(TOKEN), messages=1000, seed=7, timeout=20)
    counts = attack("Rollouts") + attack("Rewards")
    methods = {method for method, _ in counts}
    assert len(methods) == 10, "every method of the contract"
    assert {code for _, code in counts} <= FAIR, counts
    assert all(counts[method, "INVALID_ARGUMENT"] for method in methods), "messages are broken enough to be refused"
    assert all(counts[method, "OK"] for method in methods), f"and whole enough to reach the servicers: {counts}"
    assert alive(served) and not still_running(served)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_without_a_token_broken_messages_are_not_even_parsed(serve):
    served = serve(identity=TOKEN, **FREE)
    counts = fuzzing.attack(served.channel(), "Rollouts", messages=50, seed=1, timeout=10)
    assert {code for _, code in counts} == {"UNAUTHENTICATED"}
    assert alive(served)


def test_noise_instead_of_http(serve):
    served, dice = serve(identity=TOKEN), random.Random(3)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    host, port = served.address.split(":")
    for i in range(200):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            noise = dice.randbytes(dice.choice([1, 9, 100, 5000]))
            try:
                connection.sendall(preface * (i % 2) + noise)
                connection.recv(1000)
            except OSError:
                pass  # the server hung up, as it should
    assert alive(served)


def test_noise_instead_of_metadata(serve):
    served, dice = serve(identity=TOKEN, **FREE), random.Random(4)
    stub = served.stub()
    for _ in range(200):
        printable = "".join(chr(dice.randint(33, 126)) for _ in range(dice.choice([0, 1, 30, 3000])))
        for key, value in [("authorization", printable), ("noise-bin", dice.randbytes(50)), ("grpc-status", printable)]:
            with pytest.raises(grpc.RpcError) as raised:
                stub.Describe(pb.DescribeRequest(), timeout=10, metadata=[(key, value)])
            assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED, value
    assert alive(served)


def test_calls_that_are_dropped_halfway_leave_nothing_behind(serve):
    served = serve(identity=TOKEN, max_concurrent=200, **FREE)
    for i in range(100):
        stub = served.stub(TOKEN)
        call = stub.Score(iter([pb.ScoreItem(id=str(n)) for n in range(100)]), timeout=10)
        for _ in range(i % 3):
            next(call)
        call.cancel()
    assert alive(served) and not still_running(served)


def test_requests_at_the_edge_of_their_types(serve):
    """The largest numbers the contract can hold are refused by a limit and not multiplied into an allocation."""
    stub = pb_grpc.RolloutsStub(serve().channel())
    most = 2**32 - 1
    request = pb.GenerateRequest(
        prompts=[pb.Prompt(index=most)],
        group_size=most,
        sampling=pb.Sampling(max_tokens=most, temperature=float("nan")),
    )
    with pytest.raises(grpc.RpcError) as raised:
        list(stub.Generate(request, timeout=10))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(limits.Limits().max_group_size) in raised.value.details()

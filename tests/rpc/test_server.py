"""The gate before every method, the two services beside them, and an end that loses no call."""

import asyncio
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import proto_reflection_descriptor_database

from tapojax.rpc import security, server, telemetry
from tapojax.rpc import tapojax_pb2 as pb
from tapojax.rpc import tapojax_pb2_grpc as pb_grpc

NOBODY, TOKEN = security.Security(), security.Security(token="a-word")
Code = grpc.StatusCode


def failure(function, *arguments, **options):
    with pytest.raises(grpc.RpcError) as raised:
        function(*arguments, **options)
    return raised.value


def score(served, *completions, timeout=5, identity=NOBODY):
    items = [pb.ScoreItem(id=str(i), completion=completion) for i, completion in enumerate(completions)]
    return {item.id: item.scores["length"] for item in served.stub(identity).Score(iter(items), timeout=timeout)}


class Held:
    """A Score that runs until its test says so."""

    def __init__(self, served, timeout=30):
        self.items = queue.Queue()
        self.call = served.stub().Score(iter(self.items.get, None), timeout=timeout)
        assert self.send("first") == 5

    def send(self, completion):
        self.items.put(pb.ScoreItem(completion=completion))
        return next(self.call).scores["length"]

    def finish(self):
        self.items.put(None)
        return list(self.call)


def health_of(served, service="", identity=NOBODY):
    stub = health_pb2_grpc.HealthStub(served.channel(identity))
    status = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5).status
    return health_pb2.HealthCheckResponse.ServingStatus.Name(status)


# ---- all four kinds of methods pass the gate whole


def test_every_kind_of_method_answers(serve):
    served = serve()
    rollouts = pb_grpc.RolloutsStub(served.channel())
    assert rollouts.CommitWeights(pb.CommitRequest(version=7), timeout=5).version == 7
    prompts = [pb.Prompt(index=i, tokens=[i, i + 1]) for i in range(3)]
    messages = list(rollouts.Generate(pb.GenerateRequest(prompts=prompts), timeout=5))
    groups = [group for message in messages for group in message.groups]
    assert [(g.index, list(g.completions[0].tokens)) for g in groups] == [(0, [0, 1]), (1, [1, 2]), (2, [2, 3])]
    chunks = [pb.WeightsChunk(piece=pb.TensorPiece(data=bytes(n))) for n in (0, 10, 1_000_000)]
    assert rollouts.LoadWeights(iter(chunks), timeout=5).bytes == 1_000_010
    assert score(served, "", "a", "é" * 9) == {"0": 0, "1": 1, "2": 9}
    assert score(served) == {}


def test_replies_stream_while_requests_still_come(serve):
    held = Held(serve())
    assert [held.send("x" * n) for n in range(20)] == list(range(20))
    assert held.finish() == []


def test_a_hundred_streams_run_at_once(serve):
    served = serve()
    stub = served.stub()
    queues = [queue.Queue() for _ in range(100)]
    calls = [stub.Score(iter(q.get, None), timeout=60) for q in queues]
    for i, q in enumerate(queues):
        q.put(pb.ScoreItem(id=str(i)))
    assert [next(call).id for call in calls] == [str(i) for i in range(100)]
    for q in queues:
        q.put(None)
    assert all(list(call) == [] for call in calls)


# ---- errors have a type, and give nothing away


def test_a_value_error_is_the_callers_and_is_told(serve):
    error = failure(score, serve(), "value")
    assert error.code() is Code.INVALID_ARGUMENT
    assert error.details() == "item 0: expected a completion, got a value"


def test_a_refusal_has_the_servicers_code(serve):
    error = failure(score, serve(), "refused")
    assert (error.code(), error.details()) == (Code.DATA_LOSS, "the checksum does not match: send it again")


def test_a_bug_is_internal_and_only_the_log_knows_more(serve, caplog):
    error = failure(score, serve(), "bug")
    assert error.code() is Code.INTERNAL and "internals" not in error.details() and "KeyError" not in error.details()
    assert "KeyError: 'internals of the server'" in caplog.text


def test_a_long_message_still_arrives(serve):
    """A status travels in HTTP headers; one that does not fit would reach the caller as another error."""
    served = serve()
    error = failure(score, served, "long")
    assert error.code() is Code.INVALID_ARGUMENT and error.details() == "\U0001f600" * server.MESSAGE_CHARACTERS
    error = failure(score, served, "surrogate")
    assert error.code() is Code.INVALID_ARGUMENT and error.details() == "half of a character: ?"


def test_results_before_an_error_arrive(serve):
    call = serve().stub().Score(iter([pb.ScoreItem(id="a"), pb.ScoreItem(completion="value")]), timeout=5)
    assert next(call).id == "a"
    assert failure(next, call).code() is Code.INVALID_ARGUMENT


def test_an_unknown_method_is_unimplemented(serve):
    method = serve().channel().unary_unary("/tapojax.v1.Rewards/Nothing")
    assert failure(method, b"", timeout=5).code() is Code.UNIMPLEMENTED


def test_bytes_that_are_no_message_are_refused_as_such(serve):
    method = serve().channel().unary_unary("/tapojax.v1.Rollouts/CommitWeights")
    error = failure(method, b"\xff" * 7, timeout=5)
    assert error.code() is Code.INVALID_ARGUMENT and "a message of 7 bytes cannot be parsed" in error.details()


def test_a_call_without_a_message_is_refused(serve):
    method = serve().channel().stream_unary("/tapojax.v1.Rewards/Describe")
    error = failure(method, iter([]), timeout=5)
    assert error.code() is Code.INVALID_ARGUMENT and "without a message" in error.details()


# ---- deadlines


def test_a_call_without_a_deadline_is_refused(serve):
    served = serve(max_seconds=60.0)
    for timeout in (None, 61):
        error = failure(served.stub().Describe, pb.DescribeRequest(), timeout=timeout)
        assert error.code() is Code.INVALID_ARGUMENT
        assert error.details() == "tapojax.v1.Rewards/Describe takes a deadline of at most 60 s: pass timeout="
    served.stub().Describe(pb.DescribeRequest(), timeout=59)


def test_a_servicer_does_not_outlive_its_callers_deadline(serve):
    served = serve()
    held = Held(served, timeout=0.5)
    assert failure(next, held.call).code() is Code.DEADLINE_EXCEEDED
    assert served.rewards.ended.acquire(timeout=10), "its finally ran"
    held.items.put(None)


def test_a_servicer_does_not_outlive_its_caller(serve):
    served = serve()
    held = Held(served)
    held.call.cancel()
    assert served.rewards.ended.acquire(timeout=10)
    held.items.put(None)


# ---- limits


def test_a_message_over_the_cap_is_refused_and_one_below_is_not(serve):
    served = serve(max_message_bytes=100_000)
    below, over = [pb.WeightsChunk(piece=pb.TensorPiece(data=bytes(n))) for n in (99_000, 101_000)]
    load = pb_grpc.RolloutsStub(served.channel()).LoadWeights  # the client's own cap is larger
    assert load(iter([below, below]), timeout=5).bytes == 198_000
    error = failure(load, iter([below, over]), timeout=5)
    assert error.code() is Code.RESOURCE_EXHAUSTED and "100000" in error.details()
    assert load(iter([below]), timeout=5).bytes == 99_000


def test_large_metadata_is_refused(serve):
    stub = serve().stub()
    error = failure(stub.Describe, pb.DescribeRequest(), timeout=5, metadata=[("x", "y" * 100_000)])
    assert error.code() is Code.RESOURCE_EXHAUSTED and "metadata" in error.details()
    assert stub.Describe(pb.DescribeRequest(), timeout=5).task == "lengths"


def test_a_small_message_cannot_unpack_to_a_large_one(serve):
    served = serve(max_message_bytes=100_000)
    bomb = pb.ScoreItem(completion="0" * 10_000_000)
    call = served.stub().Score(iter([bomb]), timeout=5, compression=grpc.Compression.Gzip)
    assert failure(list, call).code() is Code.RESOURCE_EXHAUSTED
    assert score(served, "a") == {"0": 1}


def test_a_peer_that_calls_too_often_is_told_how_long_to_wait(serve):
    served = serve(calls_per_second=0.01, burst=3)
    stub = served.stub()
    for _ in range(3):
        stub.Describe(pb.DescribeRequest(), timeout=5)
    error = failure(stub.Describe, pb.DescribeRequest(), timeout=5)
    assert error.code() is Code.RESOURCE_EXHAUSTED
    assert "too many calls from ipv4:127.0.0.1: wait " in error.details(), "whatever the connection's port"
    assert health_of(served) == "SERVING", "health has a rate of its own"


def test_guesses_of_a_token_are_limited_too(serve):
    served = serve(identity=TOKEN, calls_per_second=0.01, burst=3)
    codes = [failure(served.stub().Describe, pb.DescribeRequest(), timeout=5).code() for _ in range(5)]
    assert codes == [Code.UNAUTHENTICATED] * 3 + [Code.RESOURCE_EXHAUSTED] * 2


def test_calls_over_the_limit_of_concurrency_are_refused_until_one_ends(serve):
    served = serve(max_concurrent=2)
    first, second = Held(served), Held(served)
    error = failure(score, served, "a")
    assert error.code() is Code.RESOURCE_EXHAUSTED and "2 calls run already" in error.details()
    assert health_of(served) == "SERVING", "health has places of its own"
    assert first.send("abc") == 3, "those that run are not disturbed"
    first.finish()
    assert score(served, "a") == {"0": 1}
    second.finish()


def test_watchers_of_health_are_limited_too(serve):
    served = serve(max_concurrent=2)
    stub = health_pb2_grpc.HealthStub(served.channel())
    watchers = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
    for watcher in watchers:
        next(watcher)
    assert failure(next, stub.Watch(health_pb2.HealthCheckRequest())).code() is Code.RESOURCE_EXHAUSTED
    assert score(served, "a") == {"0": 1}


# ---- health and reflection


def test_health_answers_without_token_and_deadline(serve):
    served = serve(identity=TOKEN)
    stub = health_pb2_grpc.HealthStub(grpc.insecure_channel(served.address))
    assert stub.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
    for service in ("tapojax.v1.Rollouts", "tapojax.v1.Rewards"):
        assert health_of(served, service) == "SERVING"
    assert failure(health_of, served, "other").code() is Code.NOT_FOUND


def test_reflection_shows_the_contract_to_who_has_the_token(serve):
    served = serve(identity=TOKEN)
    database = proto_reflection_descriptor_database.ProtoReflectionDescriptorDatabase(served.channel(TOKEN))
    names = {"tapojax.v1.Rollouts", "tapojax.v1.Rewards", "grpc.health.v1.Health"}
    assert names <= set(database.get_services())
    described = database.FindFileContainingSymbol("tapojax.v1.Rollouts")
    assert {"Generate", "LoadWeights"} <= {method.name for service in described.service for method in service.method}
    nobody = proto_reflection_descriptor_database.ProtoReflectionDescriptorDatabase(served.channel())
    assert failure(nobody.get_services).code() is Code.UNAUTHENTICATED


# ---- drain


def test_draining_finishes_what_runs_and_refuses_what_is_new(serve):
    served = serve()
    held = Held(served)
    watcher = health_pb2_grpc.HealthStub(served.channel()).Watch(health_pb2.HealthCheckRequest())
    assert next(watcher).status == health_pb2.HealthCheckResponse.SERVING
    drained = served.call(served.running.drain(30))
    assert next(watcher).status == health_pb2.HealthCheckResponse.NOT_SERVING, "watchers are told"
    for service in ("", "tapojax.v1.Rewards"):
        assert health_of(served, service) == "NOT_SERVING"
    error = failure(score, served, "a")
    assert error.code() is Code.UNAVAILABLE and "draining" in error.details()
    assert held.send("x" * 1000) == 1000 and not drained.done()
    assert held.finish() == []
    drained.result(10)
    served.call(served.running.wait()).result(10)
    assert failure(score, served, "a").code() is Code.UNAVAILABLE, "nobody listens any more"


def test_draining_ends_what_runs_too_long_with_a_reason(serve):
    served = serve()
    held = Held(served)
    served.call(served.running.drain(0.2)).result(10)
    error = failure(next, held.call)
    assert error.code() is Code.UNAVAILABLE and "the server stops" in error.details()
    assert served.rewards.ended.acquire(timeout=10), "its finally ran"
    held.items.put(None)


def test_a_watcher_that_never_reads_cannot_hold_up_the_drain(serve, monkeypatch):
    served = serve()

    async def forever(self):
        await asyncio.sleep(1000)

    monkeypatch.setattr(server.health.aio.HealthServicer, "enter_graceful_shutdown", forever)
    served.call(served.running.drain(1)).result(10)


PROGRAM = """
import asyncio, functools, sys
from tapojax.rpc import limits, security, server, telemetry, tapojax_pb2 as pb, tapojax_pb2_grpc as pb_grpc

class Rewards(pb_grpc.RewardsServicer):
    async def Score(self, requests, context):
        async for item in requests:
            yield pb.ScoredItem(id=item.id, scores={"length": len(item.completion)})

async def main():
    telemetry.log_json()
    running = await server.start(
        [functools.partial(pb_grpc.add_RewardsServicer_to_server, Rewards())], ["tapojax.v1.Rewards"],
        host="127.0.0.1", port=0, security=security.Security(), limits=limits.Limits(), telemetry=telemetry.telemetry(),
    )
    print(running.port, flush=True)
    await server.until_signal(running, seconds=60)

asyncio.run(main())
assert not [name for name in ("jax", "flax", "torch", "numpy") if name in sys.modules]
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_a_server_process(number):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=os.getcwd()
    )
    try:
        address = f"127.0.0.1:{int(process.stdout.readline())}"
        items = queue.Queue()
        with grpc.insecure_channel(address) as channel:
            call = pb_grpc.RewardsStub(channel).Score(iter(items.get, None), timeout=60)
            items.put(pb.ScoreItem(id="before"))
            assert next(call).id == "before"
            process.send_signal(number)
            health = health_pb2_grpc.HealthStub(channel)
            end = time.monotonic() + 30
            while health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING:
                assert time.monotonic() < end, "the signal did not begin the drain"
            items.put(pb.ScoreItem(id="after"))
            assert next(call).id == "after"
            items.put(None)
            assert list(call) == []
        assert process.wait(30) == 0
        lines = [json.loads(line) for line in process.stderr.read().splitlines()]
        assert [line["event"] for line in lines] == ["listening", "draining", "call", "drained"]
        assert lines[2]["code"] == "OK" and lines[3]["cancelled"] == 0
    finally:
        process.kill()
        process.communicate()


# ---- where it listens


def test_two_servers_do_not_share_a_port(serve):
    port = serve().running.port
    with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1:{port}: pass a --port that is free"):
        serve(port=port)


def test_ipv6_loopback(serve):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    served = serve(host="::1")
    with grpc.insecure_channel(f"[::1]:{served.running.port}") as channel:
        assert pb_grpc.RewardsStub(channel).Describe(pb.DescribeRequest(), timeout=5).task == "lengths"


# ---- what operators see


def test_calls_are_counted_by_method_and_code(serve):
    served = serve()
    held = Held(served)
    assert served.telemetry.running.labels("tapojax.v1.Rewards/Score")._value.get() == 1
    held.finish()
    score(served, "a")
    for completion in ("value", "bug", "refused"):
        failure(score, served, completion)
    failure(served.stub().Describe, pb.DescribeRequest())
    value = served.telemetry.registry.get_sample_value

    def calls(method, code):
        return value("tapojax_calls_total", {"method": f"tapojax.v1.Rewards/{method}", "code": code})

    assert calls("Score", "OK") == 2 and calls("Describe", "INVALID_ARGUMENT") == 1
    assert [calls("Score", code) for code in ("INVALID_ARGUMENT", "INTERNAL", "DATA_LOSS")] == [1, 1, 1]
    assert value("tapojax_call_seconds_count", {"method": "tapojax.v1.Rewards/Score"}) == 5
    assert value("tapojax_calls_running", {"method": "tapojax.v1.Rewards/Score"}) == 0


def test_every_call_is_one_line_of_the_log_and_no_secret_is_in_it(serve, caplog):
    served = serve(identity=TOKEN)
    caplog.set_level("INFO", logger=telemetry.LOGGER.name)
    rollouts = pb_grpc.RolloutsStub(served.channel(TOKEN))
    list(rollouts.Generate(pb.GenerateRequest(request_id="step 7, batch 2\n" * 1000), timeout=5))
    failure(score, served, "value", identity=TOKEN)
    health_of(served)
    fields = [record.fields for record in caplog.records if record.getMessage() == "call"]
    assert [(f["method"], f["code"]) for f in fields] == [
        ("tapojax.v1.Rollouts/Generate", "OK"),
        ("tapojax.v1.Rewards/Score", "INVALID_ARGUMENT"),
    ]
    assert (
        fields[0]["request_id"].startswith("step 7, batch 2")
        and len(fields[0]["request_id"]) <= server.MESSAGE_CHARACTERS
    )
    assert fields[0]["peer"].startswith("ipv4:127.0.0.1:") and fields[0]["seconds"] >= 0
    assert fields[1]["message"] == "item 0: expected a completion, got a value"
    assert TOKEN.token not in str(fields)


def test_a_flood_of_refused_calls_is_no_flood_of_lines(serve, caplog):
    served = serve(calls_per_second=0.01, burst=1)
    caplog.set_level("INFO", logger=telemetry.LOGGER.name)
    stub = served.stub()
    stub.Describe(pb.DescribeRequest(), timeout=5)
    for _ in range(20):
        failure(stub.Describe, pb.DescribeRequest(), timeout=5)
    assert len([record for record in caplog.records if record.getMessage() == "call"]) == 1
    assert (
        served.telemetry.registry.get_sample_value(
            "tapojax_calls_total", {"method": "tapojax.v1.Rewards/Describe", "code": "RESOURCE_EXHAUSTED"}
        )
        == 20
    )


def test_many_threads_get_their_own_answers(serve):
    served = serve()
    stub, wrong = served.stub(), []

    def work(n):
        for i in range(20):
            items = [pb.ScoreItem(id=f"{n} {i}", completion="x" * (n + i))]
            got = [(item.id, item.scores["length"]) for item in stub.Score(iter(items), timeout=20)]
            wrong.extend([] if got == [(f"{n} {i}", n + i)] else [got])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong

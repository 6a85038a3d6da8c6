"""A client reaches whom it means, shows its token to nobody else, notices the dead, and says what went wrong."""

import contextlib
import queue
import select
import socket
import threading
import time

import grpc
import pytest

from tapojax.rpc import client, limits, security, server
from tapojax.rpc import tapojax_pb2 as pb
from tapojax.rpc import tapojax_pb2_grpc as pb_grpc

NOBODY, TOKEN = security.Security(), security.Security(token="a-word")
Code = grpc.StatusCode


def channel(address, identity=NOBODY, **changes):
    return client.channel(address, security=identity, limits=limits.Limits(**changes))


class Proxy:
    """A TCP proxy that forwards until it is frozen; then both ends stay connected and hear nothing."""

    def __init__(self, address):
        host, port = address.split(":")
        self.target, self.frozen, self.closed = (host, int(port)), False, False
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.pairs, self.threads = [], [threading.Thread(target=self._accept)]
        self.threads[0].start()

    def _accept(self):
        while not self.closed:
            if select.select([self.listener], [], [], 0.05)[0]:
                pair = self.listener.accept()[0], socket.create_connection(self.target)
                self.pairs.append(pair)
                self.threads += [threading.Thread(target=self._forward, args=ends) for ends in (pair, pair[::-1])]
                for thread in self.threads[-2:]:
                    thread.start()

    def _forward(self, source, sink):
        with contextlib.suppress(OSError):
            while not self.closed:
                if not self.frozen and select.select([source], [], [], 0.05)[0]:
                    if not (data := source.recv(2**16)):
                        break
                    sink.sendall(data)
                elif self.frozen:
                    time.sleep(0.05)

    def cut(self):
        for end in [end for pair in self.pairs for end in pair]:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self):
        self.closed = True
        self.cut()
        for thread in self.threads:
            thread.join()
        for end in [self.listener, *[end for pair in self.pairs for end in pair]]:
            end.close()


@pytest.fixture
def through():
    """through(served) -> a proxy before it."""
    proxies = []

    def make(served):
        proxies.append(Proxy(served.address))
        return proxies[-1]

    yield make
    for proxy in proxies:
        proxy.close()


def running_score(address, timeout=60):
    items = queue.Queue()
    call = pb_grpc.RewardsStub(channel(address)).Score(iter(items.get, None), timeout=timeout)
    items.put(pb.ScoreItem(completion="abc"))
    assert next(call).scores["length"] == 3
    return call, items


# ---- whom it talks to


@pytest.mark.parametrize("address", ["", "host", "127.0.0.1", ":50051", "127.0.0.1:", "127.0.0.1:port", "::"])
def test_an_address_has_a_host_and_a_port(address):
    with pytest.raises(ValueError, match="is not an address: write host:port"):
        channel(address)


@pytest.mark.parametrize("identity", [NOBODY, TOKEN], ids=["nothing", "a token"])
@pytest.mark.parametrize("address", ["10.0.0.7:50051", "example.com:1", "[2001:db8::1]:50051", "dns:localhost:1"])
def test_the_wire_to_another_machine_is_never_open(address, identity):
    with pytest.raises(ValueError, match="is another machine .* pass --authority_file"):
        channel(address, identity)


def test_another_machine_may_be_reached_over_tls(certificates):
    authority = (certificates / "authority.pem").read_bytes()
    channel("10.0.0.7:50051", security.Security(token="word", authority=authority)).close()


def test_every_kind_of_call_shows_the_token(serve):
    served = serve(identity=TOKEN)
    rollouts, rewards = [stub(channel(served.address, TOKEN)) for stub in (pb_grpc.RolloutsStub, pb_grpc.RewardsStub)]
    assert rewards.Describe(pb.DescribeRequest(), timeout=5).task == "lengths"
    assert rewards.Describe.future(pb.DescribeRequest(), timeout=5).result().task == "lengths"
    assert [item.id for item in rewards.Score(iter([pb.ScoreItem(id="a")]), timeout=5)] == ["a"]
    request = pb.GenerateRequest(prompts=[pb.Prompt(index=7)])
    assert [group.index for message in rollouts.Generate(request, timeout=5) for group in message.groups] == [7]
    assert rollouts.LoadWeights(iter([pb.WeightsChunk()]), timeout=5).bytes == 0
    others = [("other", "metadata")]
    assert rewards.Describe(pb.DescribeRequest(), timeout=5, metadata=others).task == "lengths"
    assert others == [("other", "metadata")], "the caller's list is the caller's"


# ---- what it says


def test_a_failure_names_server_code_and_message(serve):
    served = serve(identity=TOKEN)
    with pytest.raises(client.Failure) as raised, client.failures(served.address):
        served.stub().Describe(pb.DescribeRequest(), timeout=5)
    assert raised.value.code is Code.UNAUTHENTICATED and raised.value.address == served.address
    message = "the call shows no token or a wrong one: pass the server's --token_file"
    assert str(raised.value) == f"{served.address}: UNAUTHENTICATED: {message}"
    assert isinstance(raised.value.__cause__, grpc.RpcError)


def test_other_errors_pass_unchanged():
    with pytest.raises(KeyError), client.failures("a:1"):
        raise KeyError("mine")


def test_a_failure_without_a_message_says_so():
    class Silent(grpc.RpcError):
        def code(self):
            return Code.UNKNOWN

        def details(self):
            return None

    assert client.explain(Silent(), "host:1") == "host:1: UNKNOWN: no message"


def test_a_message_over_the_cap_is_not_sent(serve):
    served = serve()
    stub = pb_grpc.RewardsStub(channel(served.address, max_message_bytes=1000))
    with pytest.raises(client.Failure, match="RESOURCE_EXHAUSTED: .*larger than max") as raised:
        with client.failures(served.address):
            list(stub.Score(iter([pb.ScoreItem(completion="x" * 2000)]), timeout=5))
    assert raised.value.code is Code.RESOURCE_EXHAUSTED
    assert not served.telemetry.registry.get_sample_value(
        "tapojax_calls_total", {"method": "tapojax.v1.Rewards/Score", "code": "RESOURCE_EXHAUSTED"}
    )


# ---- when servers die


def test_nobody_there_is_unavailable_at_once():
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(client.Failure, match=f"{address}: UNAVAILABLE") as raised, client.failures(address):
        pb_grpc.RewardsStub(channel(address)).Describe(pb.DescribeRequest(), timeout=30)
    assert raised.value.code is Code.UNAVAILABLE


def test_who_accepts_and_never_answers_holds_a_call_no_longer_than_its_deadline():
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(client.Failure) as raised, client.failures(address):
            pb_grpc.RewardsStub(channel(address)).Describe(pb.DescribeRequest(), timeout=1)
        assert raised.value.code in (Code.DEADLINE_EXCEEDED, Code.UNAVAILABLE)


def test_a_channel_finds_a_server_that_was_started_again(serve):
    first = serve()
    stub = first.stub()
    stub.Describe(pb.DescribeRequest(), timeout=5)
    first.call(first.running.drain(0)).result(10)
    with pytest.raises(grpc.RpcError):
        stub.Describe(pb.DescribeRequest(), timeout=5)
    serve(port=first.running.port)
    assert stub.Describe(pb.DescribeRequest(), timeout=30, wait_for_ready=True).task == "lengths"


def test_a_cut_connection_fails_the_call_and_the_next_one_works(serve, through):
    served = serve()
    proxy = through(served)
    call, items = running_score(proxy.address)
    proxy.cut()
    with pytest.raises(client.Failure) as raised, client.failures(proxy.address):
        next(call)
    assert raised.value.code is Code.UNAVAILABLE
    assert served.rewards.ended.acquire(timeout=10), "the server's side of the call ended too"
    items.put(None)
    again, items = running_score(proxy.address)
    items.put(None)
    assert list(again) == []


def test_a_server_gone_without_a_word_is_noticed_long_before_the_deadline(serve, through, monkeypatch):
    monkeypatch.setattr(client, "KEEPALIVE_MS", 500)
    monkeypatch.setattr(client, "KEEPALIVE_TIMEOUT_MS", 500)
    proxy = through(serve())
    call, items = running_score(proxy.address, timeout=600)
    proxy.frozen = True
    with pytest.raises(grpc.RpcError) as raised:
        next(call)
    assert raised.value.code() is Code.UNAVAILABLE
    items.put(None)


def test_a_client_gone_without_a_word_is_noticed_long_before_the_deadline(serve, through, monkeypatch):
    monkeypatch.setattr(server, "KEEPALIVE_MS", 500)
    monkeypatch.setattr(server, "KEEPALIVE_TIMEOUT_MS", 500)
    served = serve()
    proxy = through(served)
    call, items = running_score(proxy.address, timeout=600)
    proxy.frozen = True
    assert served.rewards.ended.acquire(timeout=30), "its servicer's finally ran"
    call.cancel()
    items.put(None)

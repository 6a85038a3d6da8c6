"""The Rollouts service by its messages: names, versions, pieces, and what it refuses."""

import threading
import time

import grpc
import pytest

from tapojax.rollout.sampler import Sample, Span
from tapojax.rpc import client, security
from tapojax.rpc import tapojax_pb2 as pb
from tapojax.rpc import tapojax_pb2_grpc as pb_grpc
from tests.rollout.servers import LIMITS, Fake, expected_tokens, fake_sampler, serving_all, wait_until

SHAPES = {"a": (4,), "b": (2, 3)}
Code = grpc.StatusCode


@pytest.fixture
def fake():
    return Fake()


@pytest.fixture
def served(fake):
    with serving_all(fake_sampler(fake, SHAPES), orphan_s=0.2) as servers:
        yield servers[0]


@pytest.fixture
def stub(served):
    with client.channel(served.address, security=security.Security(), limits=LIMITS) as channel:
        yield pb_grpc.RolloutsStub(channel)


def request(name="r", indices=(0, 1, 2), **changes):
    sampling = pb.Sampling(max_tokens=8, temperature=1.0, top_p=1.0, stop_token_ids=[1])
    prompts = [pb.Prompt(index=i, tokens=[5, 6]) for i in indices]
    fields = dict(request_id=name, prompts=prompts, group_size=2, sampling=sampling, key=[1, 2], version=-1)
    return pb.GenerateRequest(**fields | changes)


def answers(stub, asked, timeout=10):
    return {group.index: group for message in stub.Generate(asked, timeout=timeout) for group in message.groups}


def refused(call):
    with pytest.raises(grpc.RpcError) as error:
        result = call()
        if not isinstance(result, pb.StatusReply):
            list(result)
    return error.value.code(), error.value.details()


def test_each_group_comes_once_and_whole(stub):
    groups = answers(stub, request())
    assert sorted(groups) == [0, 1, 2]
    for index, group in groups.items():
        assert group.last and [list(c.tokens) for c in group.completions] == [
            expected_tokens([1, 2], index, sample, 8) for sample in range(2)
        ]


def test_a_known_name_replays_its_groups(stub, fake):
    first, second = answers(stub, request()), answers(stub, request())
    assert first == second and len(fake.asked) == 3, "the sampler worked once"


def test_two_calls_with_one_name_share_the_work_that_runs(stub, fake):
    fake.seconds = 0.1
    results = []
    threads = [threading.Thread(target=lambda: results.append(answers(stub, request()))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fake.asked) == 3 and all(result == results[0] for result in results)


def test_groups_that_are_there_are_skipped(stub, fake):
    assert sorted(answers(stub, request(skip=[1]))) == [0, 2]
    assert [index for _, index in fake.asked] == [0, 2]
    assert sorted(answers(stub, request(skip=[1, 2]))) == [0] and len(fake.asked) == 2, "a later call lacks less"
    assert sorted(answers(stub, request())) == [0, 1, 2], "one that lacks more starts anew"


def test_a_name_for_something_else_is_refused(stub):
    answers(stub, request())
    code, said = refused(lambda: stub.Generate(request(group_size=3), timeout=5))
    assert code == Code.INVALID_ARGUMENT and "'r' names another request" in said


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"key": [1]}, "key of two words"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": 5000}, "5000 completions of a prompt"),
        ({"prompts": [pb.Prompt(index=0, tokens=range(17))]}, "prompt of 17 tokens"),
        ({"prompts": [pb.Prompt(index=0)]}, "one token or more"),
        ({"sampling": pb.Sampling(max_tokens=33)}, "max_tokens=33"),
        ({"score": True}, "--reward_addresses"),
    ],
)
def test_what_can_never_be_sampled_is_refused_with_its_number(stub, changes, said):
    code, details = refused(lambda: stub.Generate(request(**changes), timeout=5))
    assert code == Code.INVALID_ARGUMENT and said in details


def test_other_weights_than_asked_for_are_refused(stub):
    code, said = refused(lambda: stub.Generate(request(version=4), timeout=5))
    assert code == Code.FAILED_PRECONDITION and "version -1" in said and "for 4" in said


def test_a_commit_without_its_weights_is_refused(stub):
    code, said = refused(lambda: stub.CommitWeights(pb.CommitRequest(version=9), timeout=5))
    assert code == Code.FAILED_PRECONDITION and "9 is not staged" in said


def test_groups_that_finish_one_by_one_all_come_and_the_stream_ends(stub, fake):
    fake.seconds = 0.1
    messages = list(stub.Generate(request(), timeout=10))
    assert [[group.index for group in message.groups] for message in messages] == [[0], [1], [2]]


def test_a_large_group_comes_in_pieces_with_a_marked_end(stub, fake):
    tokens = [*[7] * 999, 1]

    def long(group):
        return [Sample(tokens, [-0.5] * 1000, [], True, [Span(-1, 0, 1000)])] * 3

    fake.spoil = long
    messages = list(stub.Generate(request(indices=(0,)), timeout=10))
    assert [len(message.groups) for message in messages] == [1, 1, 1]
    pieces = [message.groups[0] for message in messages]
    assert [piece.first_sample for piece in pieces] == [0, 1, 2]
    assert [piece.last for piece in pieces] == [False, False, True]


def test_abort_ends_the_stream_and_frees_the_name(stub, fake):
    fake.seconds = 0.3
    results = []
    thread = threading.Thread(target=lambda: results.append(refused(lambda: stub.Generate(request(), timeout=10))))
    thread.start()
    wait_until(lambda: stub.Status(pb.StatusRequest(), timeout=5).running == 1)
    assert stub.Abort(pb.AbortRequest(request_ids=["r", "unknown"]), timeout=5).aborted == 1
    thread.join()
    assert results[0][0] == Code.ABORTED
    fake.seconds = 0
    assert sorted(answers(stub, request())) == [0, 1, 2]


def test_work_that_nobody_waits_for_is_ended(stub, fake):
    fake.seconds = 0.5
    call = stub.Generate(request(), timeout=10)
    wait_until(lambda: stub.Status(pb.StatusRequest(), timeout=5).running == 1)
    call.cancel()
    time.sleep(0.3)
    wait_until(lambda: stub.Status(pb.StatusRequest(), timeout=5).running == 0)
    assert len(fake.asked) < 3


def test_an_error_of_the_sampler_ends_the_call_and_not_the_server(stub, fake):
    async def crash(index):
        raise RuntimeError("secret of the inside")

    fake.on_group = crash
    code, said = refused(lambda: stub.Generate(request(), timeout=5))
    assert code == Code.INTERNAL and "secret" not in said
    fake.on_group = None
    assert sorted(answers(stub, request())) == [0, 1, 2]


def test_pause_and_resume_show_in_the_status(stub):
    assert stub.Pause(pb.PauseRequest(mode=pb.PAUSE_MODE_KEEP), timeout=5).paused
    assert not stub.Resume(pb.ResumeRequest(), timeout=5).paused
    code, said = refused(lambda: stub.Pause(pb.PauseRequest(), timeout=5))
    assert code == Code.INVALID_ARGUMENT and "KEEP" in said

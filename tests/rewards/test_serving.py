"""The reward server's promise: every item gets one result, and what is wrong with an item costs that item alone."""

import math
import random
import threading
import time

import grpc
import pytest

from tapojax.rewards import serving
from tapojax.rpc import tapojax_pb2 as pb
from tapojax.rpc import telemetry
from tests.rewards import servers
from tests.rewards.servers import CHANNELS, item, served, stub, toy

GARBAGE = [
    b"",
    b"{",
    b"\xff\xfe{}",
    b"[1, 2]",
    b"17",
    b"null",
    b'{"answer": 0}}',
    b"[" * 100_000,
    b'{"answer": ' + b"9" * 5000 + b"}",
]


def scored(items, score=toy):
    """Results by id; every channel is there."""
    results = serving.score_items(score, CHANNELS, items)
    assert [result.id for result in results] == [i.id for i in items], "one result an item, in order"
    assert all(result.scores.keys() == set(CHANNELS) for result in results)
    return results


def is_failure(result, says: str) -> bool:
    return all(math.isnan(value) for value in result.scores.values()) and says in result.error


# ---- scoring a batch


def test_scores_are_the_tasks_own():
    examples, completions = servers.rows(10)
    items = [
        item(e["id"], b'{"id": "x", "answer": %d}' % e["answer"], c) for e, c in zip(examples, completions, strict=True)
    ]
    want, errors = toy(examples, completions)
    for row, result in enumerate(scored(items)):
        for name in CHANNELS:
            assert result.scores[name] == pytest.approx(want[name][row], rel=1e-7, nan_ok=True)
        assert result.error == (errors[row] or "")


@pytest.mark.parametrize("example", GARBAGE, ids=range(len(GARBAGE)))
def test_an_example_that_is_no_json_object_costs_itself(example):
    first, bad, last = scored([item("a"), item("b", example), item("c")])
    assert is_failure(bad, "no JSON object")
    assert first.scores["correct"] == last.scores["correct"] == 1 and not first.error + last.error


def test_a_batch_that_raises_is_scored_one_by_one():
    asked = []

    def score(examples, completions):
        asked.append(len(completions))
        if "exit" in completions:
            raise SystemExit(3)
        if "crash" in completions:
            raise ZeroDivisionError("in the verifier")
        return toy(examples, completions)

    texts = ["right", "crash", "right", "exit", "wrong"]
    results = scored([item(str(i), completion=text) for i, text in enumerate(texts)], score)
    assert asked == [5, 1, 1, 1, 1, 1]
    assert is_failure(results[1], "ZeroDivisionError: in the verifier") and is_failure(results[3], "SystemExit: 3")
    assert [results[i].scores["correct"] for i in (0, 2, 4)] == [1, 1, 0]


def test_a_judge_that_cannot_be_asked_is_no_items_fault():
    def score(examples, completions):
        if len(completions) > 1:
            raise ValueError("one by one, please")
        raise ConnectionError("judge (genrm) gave no verdict")

    with pytest.raises(ConnectionError, match="genrm"):
        scored([item("a"), item("b")], score)


@pytest.mark.parametrize(
    "score",
    [
        lambda e, c: ({"correct": [1.0] * len(c)}, [None] * len(c)),
        lambda e, c: ({"correct": [1.0], "length": [1.0], "more": [1.0]}, [None]),
        lambda e, c: ({"correct": [1.0] * 3, "length": [1.0] * 3}, [None] * 3),
        lambda e, c: ({"correct": [1.0] * len(c), "length": [1.0] * len(c)}, []),
    ],
    ids=["a channel is missing", "one too many", "too many rows", "no errors"],
)
def test_scores_that_do_not_fit_the_batch_are_none(score):
    for result in scored([item("a"), item("b")], score):
        assert is_failure(result, "asked were 1 of ['correct', 'length']")


def test_error_texts_are_short_and_can_be_sent():
    def score(examples, completions):
        raise ValueError("\ud800" + "x" * 10_000)

    (result,) = scored([item("a")], score)
    assert len(result.error) == serving.MAX_ERROR and result.SerializeToString()


def test_the_probe_finds_the_channels_and_what_cannot_work():
    assert serving.probe(toy, {"id": "a", "answer": 1}) == list(CHANNELS)
    with pytest.raises(ValueError, match="the example 'a' cannot be written as JSON"):
        serving.probe(toy, {"id": "a", "answer": b"1"})

    def broken(examples, completions):
        raise RuntimeError("cannot start a worker")

    with pytest.raises(RuntimeError, match="cannot start a worker"):
        serving.probe(broken, {"id": "a"})


# ---- over the wire


def test_it_says_what_it_scores():
    with served(toy) as (one,), stub(one.address) as calls:
        said = calls.Describe(pb.DescribeRequest(), timeout=10)
        assert said.task == "toy" and tuple(said.channels) == CHANNELS


def test_results_come_as_they_are_finished():
    free = threading.Event()

    def score(examples, completions):
        if "slow" in completions:
            assert free.wait(20)
        return toy(examples, completions)

    with served(score, max_batch=1, threads=2) as (one,), stub(one.address) as calls:
        items = [item("first", completion="slow"), *(item(str(i)) for i in range(5))]
        results = calls.Score(iter(items), timeout=20)
        fast = [next(results).id for _ in range(5)]
        free.set()
        assert fast == list("01234") and [r.id for r in results] == ["first"]


def test_items_of_all_streams_share_batches():
    sizes, begin = [], threading.Event()

    def score(examples, completions):
        begin.wait(20)
        sizes.append(len(completions))
        return toy(examples, completions)

    with served(score, max_batch=8, threads=1, linger_s=0.05) as (one,), stub(one.address) as calls:
        streams = [calls.Score(iter([item(f"{s} {i}") for i in range(6)]), timeout=20) for s in range(4)]
        time.sleep(0.3)  # all wait behind the first batch
        begin.set()
        assert sorted(r.id for stream in streams for r in stream) == [f"{s} {i}" for s in range(4) for i in range(6)]
    assert max(sizes) <= 8 and sum(sizes) == 24 and len(sizes) <= 5


def test_one_bad_item_in_a_stream_spoils_no_other():
    with served(toy) as (one,), stub(one.address) as calls:
        items = [item(str(i), GARBAGE[i % len(GARBAGE)] if i % 3 == 0 else b'{"answer": 0}') for i in range(60)]
        results = {r.id: r for r in calls.Score(iter(items), timeout=20)}
    assert len(results) == 60
    for i in range(60):
        assert is_failure(results[str(i)], "no JSON object") == (i % 3 == 0)


def test_a_client_that_sends_without_end_is_held_back():
    """40 MB wait at the client while the verifier is busy; then all of it is scored."""
    free, sent = threading.Event(), []

    def score(examples, completions):
        free.wait(60)
        return toy(examples, completions)

    def items():
        for i in range(4000):
            sent.append(i)
            yield item(str(i), completion="x" * 10_000)

    with served(score, max_batch=16, max_in_flight=16, max_waiting=16) as (one,), stub(one.address) as calls:
        results = calls.Score(items(), timeout=120)
        time.sleep(1.0)
        held = len(sent)
        free.set()
        assert len({r.id for r in results}) == 4000
    assert held < 2000, "the server takes in more than it can hold"


def test_what_nobody_waits_for_is_not_scored():
    begun, free, seen = threading.Event(), threading.Event(), []

    def score(examples, completions):
        begun.set()
        free.wait(20)
        seen.extend(completions)
        return toy(examples, completions)

    with served(score, max_batch=1, threads=1) as (one,), stub(one.address) as calls:
        left = calls.Score(iter([item(str(i), completion="left") for i in range(50)]), timeout=20)
        assert begun.wait(20)
        left.cancel()
        time.sleep(0.2)
        free.set()
        assert [r.id for r in calls.Score(iter([item("b")]), timeout=20)] == ["b"]
    assert seen.count("left") <= 2 and seen.count("right") == 1


def test_a_stream_ends_at_its_deadline_and_the_others_go_on():
    free = threading.Event()

    def score(examples, completions):
        if "slow" in completions:
            free.wait(20)
        return toy(examples, completions)

    with served(score, max_batch=1, threads=2) as (one,), stub(one.address) as calls:
        late = calls.Score(iter([item("a", completion="slow")]), timeout=0.3)
        with pytest.raises(grpc.RpcError) as error:
            list(late)
        assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert [r.id for r in calls.Score(iter([item("b")]), timeout=20)] == ["b"]
        free.set()


def test_a_dead_judge_ends_the_streams_of_its_batch_and_no_scorer():
    """UNAVAILABLE with the judge's words; when the judge is back, so is the server."""
    dead = threading.Event()
    dead.set()

    def score(examples, completions):
        if dead.is_set():
            raise ConnectionError("judge (genrm) gave no verdict on 40 of the last 64 questions")
        return toy(examples, completions)

    with served(score, threads=1) as (one,), stub(one.address) as calls:
        for _ in range(3):
            with pytest.raises(grpc.RpcError, match=r"judge \(genrm\) gave no verdict") as error:
                list(calls.Score(iter([item("a"), item("b")]), timeout=20))
            assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        dead.clear()
        assert [r.error for r in calls.Score(iter([item("c")]), timeout=20)] == [""]
        assert one.telemetry.registry.get_sample_value("tapojax_scored_items_total", {"outcome": "error"}) >= 3


def test_a_batch_that_hangs_costs_its_rows_and_no_scorer():
    """One thread: after batch_s the rows are NaN with a reason, and a fresh thread scores what comes next."""
    free = threading.Event()

    def score(examples, completions):
        if "hang" in completions:
            free.wait(60)
        return toy(examples, completions)

    with served(score, threads=1, max_batch=1, batch_s=0.2) as (one,), stub(one.address) as calls:
        items = [item("a", completion="hang"), item("b"), item("c", completion="hang"), item("d")]
        results = {r.id: r for r in calls.Score(iter(items), timeout=30)}
        free.set()
    assert is_failure(results["a"], "not scored within --batch_s=0.2") and is_failure(results["c"], "hangs")
    assert results["b"].scores["correct"] == results["d"].scores["correct"] == 1


def test_nothing_that_is_sent_breaks_the_server():
    rng = random.Random(0)
    with served(toy) as (one,), stub(one.address) as calls:
        for _ in range(20):
            items = [
                item(rng.choice(["", "a", "b"]), rng.randbytes(rng.randrange(200)), "x" * rng.randrange(100))
                for _ in range(100)
            ]
            results = list(calls.Score(iter(items), timeout=20))
            assert sorted(r.id for r in results) == sorted(i.id for i in items)
            assert all(is_failure(r, "no JSON object") for r in results)
        assert [r.error for r in calls.Score(iter([item("b")]), timeout=20)] == [""]


def test_items_are_counted_by_outcome():
    with served(toy) as (one,), stub(one.address) as calls:
        list(calls.Score(iter([item("a"), item("b"), item("c", b"[")]), timeout=20))
        count = one.telemetry.registry.get_sample_value
        assert count("tapojax_scored_items_total", {"outcome": "scored"}) == 2
        assert count("tapojax_scored_items_total", {"outcome": "error"}) == 1
        assert count("tapojax_waiting_items") == 0


def test_a_message_that_is_none_ends_its_stream():
    with served(toy) as (one,), grpc.insecure_channel(one.address) as channel:
        raw = channel.stream_stream(f"/{servers.SERVICE}/Score", response_deserializer=pb.ScoredItem.FromString)
        with pytest.raises(grpc.RpcError) as error:
            list(raw(iter([item("a").SerializeToString(), b"\xff\xff\xff"]), timeout=10))
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_an_empty_stream_ends():
    with served(toy) as (one,), stub(one.address) as calls:
        assert list(calls.Score(iter([]), timeout=20)) == []


@pytest.mark.parametrize(
    "options", [{"max_batch": 0}, {"threads": 0}, {"linger_s": -1.0}, {"max_in_flight": 0}, {"batch_s": 0.0}]
)
def test_nonsense_settings_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        serving.Rewards(toy, task="toy", channels=CHANNELS, telemetry=telemetry.telemetry(), **options)


def test_a_drain_finishes_what_was_begun_and_takes_nothing_new():
    begun, free = threading.Event(), threading.Event()

    def score(examples, completions):
        begun.set()
        free.wait(20)
        return toy(examples, completions)

    with served(score) as (one,), stub(one.address) as calls:
        running = calls.Score(iter([item(str(i)) for i in range(100)]), timeout=20)
        assert begun.wait(20)
        stopping = threading.Thread(target=one.stop, args=(20,))
        stopping.start()
        time.sleep(0.3)
        with pytest.raises(grpc.RpcError) as error:
            calls.Describe(pb.DescribeRequest(), timeout=5)
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        free.set()
        assert len(list(running)) == 100
        stopping.join(20)


def test_a_score_that_hangs_for_ever_does_not_keep_the_server_alive():
    with served(lambda examples, completions: time.sleep(1000)) as (one,), stub(one.address) as calls:
        stuck = calls.Score(iter([item("a")]), timeout=60)
        time.sleep(0.2)
        one.stop(0.1)
        assert not one.thread.is_alive()
        with pytest.raises(grpc.RpcError) as error:
            list(stuck)
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE

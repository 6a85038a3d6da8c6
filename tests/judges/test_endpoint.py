"""Replicas that are slow, broken or busy: who is asked how often, and what is said where nobody answers."""

import collections
import email.utils
import sys
import threading
import time

import numpy as np
import pytest

from tapojax.judges import endpoint, questions
from tests.judges import endpoints
from tests.judges.endpoints import DROP, HANG, PAGE, fail, say

GOOD = say("\\boxed{1}")


def make(*addresses, temperature=0.0, max_tokens=16, **options):
    model = endpoint.Model("wise", temperature, max_tokens)
    given = dict(timeout_s=5.0, pause_s=0.01, addresses=addresses) | options
    return endpoint.make(model, endpoint.Options(**given), section="judge")


def asked(end, *messages):
    return questions.verdicts(
        end, [questions.Question(m, lambda text: float("boxed{1}" in text) or None) for m in messages]
    )


# ---- what goes out and what comes back


def test_the_request_is_what_the_model_was_said_to_be(monkeypatch):
    monkeypatch.setenv("MY_KEY", "sesame")
    with endpoints.served(say("so \\boxed{1}", usage=(20, 5))) as (server,):
        end = make(server.address, temperature=0.1, max_tokens=77, api_key_variable="MY_KEY")
        values, errors, costs = asked(end, "is it right?")
    assert server.bodies == [
        {
            "model": "wise",
            "messages": [{"role": "user", "content": "is it right?"}],
            "temperature": 0.1,
            "max_tokens": 77,
        }
    ]
    assert server.keys == ["Bearer sesame"]
    assert values.tolist() == [1] and values.dtype == np.float32 and errors == [None]
    assert {name: column.tolist() for name, column in costs.items() if name != "seconds"} == {
        "tokens": [25],
        "tries": [1],
        "cached": [0],
    }
    assert 0 < costs["seconds"][0] < 5


def test_replies_come_in_the_order_of_the_questions_from_both_replicas():
    def reply(message, turn):
        return say(f"{message} \\boxed{{1}}", after_s=0.01 * (int(message) % 3))

    with endpoints.served(reply, reply) as servers:
        end = make(*[server.address for server in servers], requests=3)
        found = questions.ask(end, [questions.Question(str(i), lambda text: 1.0) for i in range(40)])
    assert [r.text.split()[0] for r in found] == [str(i) for i in range(40)]
    assert sorted(int(m) for server in servers for m in server.messages) == [*range(40)], "each once"
    assert all(server.most_under_way <= 3 for server in servers), "more at a time than were allowed"
    assert all(len(server.messages) >= 10 for server in servers), "both work"


def test_as_many_are_under_way_as_are_allowed():
    together = threading.Barrier(3)

    def respond(message, turn):
        together.wait(timeout=20)  # breaks where two are all there are
        return GOOD

    with endpoints.served(respond) as (server,):
        values, errors, _ = asked(make(server.address, requests=3, timeout_s=30, retries=0), *"abcdef")
    assert np.all(values == 1) and errors == [None] * 6 and server.most_under_way == 3


def test_the_replica_with_the_least_to_do_is_asked():
    with endpoints.served(say("\\boxed{1}", after_s=0.5), GOOD) as (slow, quick):
        end = make(slow.address, quick.address, requests=4, timeout_s=60)
        values, _, _ = asked(end, *map(str, range(60)))
    assert np.all(values == 1) and len(slow.messages) <= 8, "100 times slower: it holds what it has, the rest goes on"


def test_a_reply_without_text_or_counts_is_no_verdict_and_costs_unknown_tokens():
    with endpoints.served(say(None, reason="length", usage=None)) as (server,):
        values, errors, costs = asked(make(server.address), "a")
    assert np.isnan(values[0]) and "it reached max_tokens, raise it" in errors[0]
    assert np.isnan(costs["tokens"][0]) and costs["tries"][0] == 1


# ---- failures


TRIES = 3
FAILURES = {
    "hang": (HANG, TRIES, "no reply in time"),
    "dribble": (say("\\boxed{1}", pause_s=0.05), TRIES, "no reply in time"),
    "drop": (DROP, TRIES, "Connection error"),
    "dies half-way": (GOOD._replace(cut=40), TRIES, "peer closed connection"),
    "500": (fail(500, "out of memory"), TRIES, "out of memory"),
    "429": (fail(429, "slow down"), TRIES, "slow down"),
    "429 till a time that is no date": (
        fail(429, "slow down", retry_after="Fri, 31 Dec 99999999999999999999 00:00:00 GMT"),
        TRIES,
        "slow down",
    ),
    "page": (PAGE, TRIES, "no chat completion: '<html>hello"),
    "broken json": (GOOD._replace(body="{"), TRIES, "JSONDecodeError"),
    "other json": (GOOD._replace(body="[1]"), TRIES, "no chat completion"),
    "no choices": (GOOD._replace(body='{"choices": []}'), TRIES, "no chat completion"),
    "text is a list": (say([{"type": "x"}]), TRIES, "no chat completion"),
    "400": (fail(400, "prompt is too long"), 1, "prompt is too long"),
    "401": (fail(401, "the key sesame is wrong"), 1, "the key <key> is wrong"),
    "404": (fail(404, "no such model"), 1, "no such model"),
    "no verdict": (say("I cannot say"), 1, "says no verdict: it ends in 'I cannot say'"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_is_tried_again_where_that_can_help_and_is_never_a_verdict(kind, monkeypatch):
    act, tries, said = FAILURES[kind]
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    with endpoints.served(act) as (server,):
        values, errors, costs = asked(make(server.address, timeout_s=0.4), "a")
    assert np.isnan(values[0]) and said in errors[0] and errors[0].startswith("judge: "), errors
    assert len(server.messages) == tries == costs["tries"][0]
    assert "sesame" not in errors[0]


def test_headers_that_dribble_do_not_prolong_a_try():
    """All of them would take a minute, and none comes late."""
    with endpoints.served(GOOD._replace(header_s=0.1, headers=(("X-Wait", "on"),) * 600)) as (server,):
        started = time.monotonic()
        _, errors, _ = asked(make(server.address, timeout_s=0.4, retries=0), "a")
        assert "no reply in time" in errors[0] and time.monotonic() - started < 20


@pytest.mark.parametrize("kind", [kind for kind in FAILURES if FAILURES[kind][1] > 1])
def test_another_replica_answers_for_the_one_that_fails(kind):
    """Exactly one question finds out about it: it is left out for longer than the test takes."""
    with endpoints.served(FAILURES[kind][0], GOOD) as (bad, good):
        end = make(bad.address, good.address, timeout_s=0.4, pause_s=30.0, requests=1)
        values, errors, costs = asked(end, *"abcdef")
    assert np.all(values == 1) and errors == [None] * 6
    assert len(bad.messages) == 1 and len(good.messages) == 6
    assert sorted(costs["tries"].tolist()) == [1] * 5 + [2]


def test_a_replica_that_was_left_out_is_let_in_again():
    ill = threading.Event()
    ill.set()

    def respond(message, turn):
        return fail(500) if ill.is_set() else GOOD

    with endpoints.served(respond, GOOD) as (first, second):
        end = make(first.address, second.address, pause_s=30.0, requests=1)
        assert asked(end, "a").values[0] == 1 and len(first.messages) == 1
        assert asked(end, "b").values[0] == 1 and len(first.messages) == 1, "it is left out"
        ill.clear()
        end.replicas[0].out_until = -30.0  # time passes
        assert np.all(asked(end, *"cdef").values == 1) and len(first.messages) > 1


def test_pauses_double_and_are_kept_by_all():
    with endpoints.served(fail(500)) as (server,):
        asked(make(server.address, pause_s=0.2, retries=3), "a")
    gaps = np.diff(server.times)
    assert len(gaps) == 3 and all(0.5 * p <= gap for p, gap in zip((0.2, 0.4, 0.8), gaps, strict=True)), gaps


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_respected(form):
    """For a number of seconds, or a date."""

    def respond(message, turn):
        when = "1" if form == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)
        return GOOD if turn > 1 else fail(429, "slow down", retry_after=when)

    with endpoints.served(respond) as (server,):
        values, _, costs = asked(make(server.address), "a")
        assert values[0] == 1 and costs["tries"][0] == 2 and server.times[1] - server.times[0] > 0.9


def test_a_wait_beyond_the_time_out_is_not_waited_for():
    with endpoints.served(fail(429, "tomorrow", retry_after="86400")) as (server,):
        end = make(server.address, timeout_s=1.0)
        started = time.monotonic()
        values, errors, costs = asked(end, "a")
        assert np.isnan(values[0]) and "every replica is left out" in errors[0] and "tomorrow" in errors[0]
        assert time.monotonic() - started < 1 and costs["tries"][0] == 1
        assert asked(end, "b").costs["tries"][0] == 0 and len(server.messages) == 1, "nor is it asked again"


def test_a_busy_replica_costs_no_try_and_loses_no_row():
    """Four requests are let through in each tenth of a second, of forty that come together."""
    lock, let_through, together = threading.Lock(), collections.Counter(), threading.Barrier(40)

    def respond(message, turn):
        if turn == 1:
            together.wait(timeout=20)
        with lock:
            now = int(time.monotonic() * 10)
            let_through[now] += 1
            return GOOD if let_through[now] <= 4 else fail(429, "slow down", retry_after="0.1")

    with endpoints.served(respond) as (server,):
        end = make(server.address, requests=40, retries=0, timeout_s=60.0, window=8)
        values, errors, costs = asked(end, *map(str, range(40)))
    assert np.all(values == 1) and errors == [None] * 40
    assert np.sum(costs["tries"]) == len(server.messages), "a cost is what was asked"


def test_a_replica_that_stays_busy_is_asked_for_as_long_as_a_question_waits():
    """No sooner than after pause_s, also where it says 0."""
    with endpoints.served(fail(503, "loading", retry_after="0")) as (server,):
        end = make(server.address, retries=0, timeout_s=2.0, pause_s=0.2)
        values, errors, costs = asked(end, "a")
    assert np.isnan(values[0]) and "loading" in errors[0]
    assert 2 <= len(server.messages) == costs["tries"][0] <= 11


def test_another_replica_answers_for_the_one_that_is_busy():
    with endpoints.served(fail(429, "tomorrow", retry_after="86400"), GOOD) as (busy, good):
        values, _, costs = asked(make(busy.address, good.address, retries=0, requests=1), *"abc")
    assert np.all(values == 1) and len(busy.messages) == 1 and len(good.messages) == 3


def test_questions_come_back_to_a_busy_replica_one_by_one():
    together = threading.Barrier(8)

    def respond(message, turn):
        if turn > 1:
            return GOOD
        together.wait(timeout=20)
        return fail(429, "slow down", retry_after="1")

    with endpoints.served(respond) as (server,):
        values, _, _ = asked(make(server.address, retries=0, timeout_s=30.0), *"abcdefgh")
    assert np.all(values == 1) and np.ptp(server.times[8:]) > 0.03, "all at the same instant"


def test_a_replica_has_its_place_free_again_whatever_happens():
    end = make("http://a/v1")
    end.replicas[0].ask = lambda message: 1 / 0
    with pytest.raises(ZeroDivisionError):
        endpoint.request(end, "a")
    assert end.replicas[0].load == 0


def test_nobody_there():
    values, errors, _ = asked(make(endpoints.nobody()), "a")
    assert np.isnan(values[0]) and "no reply in 3 tries" in errors[0] and "Connection refused" in errors[0]


# ---- asked once


def test_the_same_question_is_asked_once_also_at_the_same_time():
    with endpoints.served(say("\\boxed{1}", after_s=0.2)) as (server,):
        end = make(server.address)
        calls = [threading.Thread(target=asked, args=(end, "a", "b", "a")) for _ in range(4)]
        for call in calls:
            call.start()
        for call in calls:
            call.join()
        assert sorted(server.messages) == ["a", "b"]
        values, errors, costs = asked(end, "a", "c", "a")
    assert values.tolist() == [1, 1, 1] and errors == [None] * 3
    assert costs["cached"].tolist() == [1, 0, 1] and costs["tries"].tolist() == [0, 1, 0]
    assert costs["tokens"].tolist() == [0, 25, 0] and costs["seconds"][0] == 0


def test_what_failed_or_said_nothing_is_asked_again():
    with endpoints.served(lambda message, turn: [say("hm"), fail(400), GOOD][turn - 1]) as (server,):
        end = make(server.address)
        assert [float(asked(end, "a").values[0]) for _ in range(4)] == pytest.approx(
            [np.nan, np.nan, 1, 1], nan_ok=True
        )
        assert len(server.messages) == 3


def test_a_new_process_asks_nothing_twice(tmp_path):
    file = str(tmp_path / "replies.sqlite")
    with endpoints.served(GOOD) as (server,):
        first = asked(make(server.address, cache_file=file), *"abc")
        again = asked(make(server.address, cache_file=file), *"abcd")
        assert server.messages.count("a") == 1 and len(server.messages) == 4
        assert first.values.tolist() == [1] * 3 and again.costs["cached"].tolist() == [1, 1, 1, 0]
        asked(make(server.address, cache_file=file, temperature=0.5), "a")
        asked(make(server.address, cache_file=file, max_tokens=8), "a")
        assert server.messages.count("a") == 3, "another judge is asked"


def test_a_kept_reply_that_cannot_be_read_is_asked_for_again(tmp_path):
    """It was kept when replies were read in another way."""
    file = str(tmp_path / "replies.sqlite")
    with endpoints.served(lambda message, turn: say("I cannot say") if turn == 1 else GOOD) as (server,):
        questions.ask(make(server.address, cache_file=file), [questions.Question("a", lambda text: 0.0)])
        assert asked(make(server.address, cache_file=file), "a").values[0] == 1 and len(server.messages) == 2
        assert asked(make(server.address, cache_file=file), "a").values[0] == 1 and len(server.messages) == 2


def test_the_memory_has_its_size():
    with endpoints.served(GOOD) as (server,):
        end = make(server.address, cache_rows=2)
        for message in "abaca":
            asked(end, message)
        assert server.messages == ["a", "b", "c"], "b was not used for longest"
        asked(end, "b")
        assert len(server.messages) == 4
        end = make(server.address, cache_rows=0)
        asked(end, "x")
        asked(end, "x")
        assert server.messages.count("x") == 2


def test_a_file_that_is_no_cache_is_named(tmp_path):
    (tmp_path / "text").write_text("this is no database" * 100)
    for path in (tmp_path / "text", tmp_path / "nowhere" / "x"):
        with pytest.raises(OSError, match=f"cache_file='{path}'"):
            make("http://a/v1", cache_file=str(path))


# ---- the breaker


def test_too_many_failures_stop_the_run_and_say_why():
    with endpoints.served(fail(400, "no such model")) as (server,):
        end = make(server.address, window=10, max_failure_share=0.5, requests=1)
        with pytest.raises(
            ConnectionError,
            match=r"judge \(wise\) gave no verdict on 10 of the last 10 questions, 100%; "
            r"judge.endpoint.max_failure_share is 0.5. The last error: no reply in 1 tries: http://127.*no such model",
        ):
            asked(end, *map(str, range(100)))
        assert len(server.messages) == 10, "nobody is asked any more"
        with pytest.raises(ConnectionError):
            asked(end, "a")
        assert len(server.messages) == 10
        end.rest_until = 0.0  # time passes
        assert np.isnan(asked(end, "a").values[0]) and len(server.messages) == 11, "it is tried again"


def test_a_share_at_the_limit_goes_on_whether_no_reply_or_no_verdict():
    def respond(message, turn):
        return [GOOD, GOOD, fail(400), say("hm")][int(message) % 4]

    with endpoints.served(respond) as (server,):
        end = make(server.address, window=4, max_failure_share=0.5, requests=1)
        values, errors, _ = asked(end, *map(str, range(20)))
        assert np.isnan(values).tolist() == [False, False, True, True] * 5 and len(server.messages) == 20
        assert [error is None for error in errors] == [True, True, False, False] * 5
        with pytest.raises(ConnectionError, match="on 3 of the last 4 questions, 75%.*says no verdict"):
            asked(end, "23")


def test_others_are_not_waited_for_when_it_stops():
    with endpoints.served(lambda message, turn: HANG if message == "0" else fail(400)) as (server,):
        end = make(server.address, window=5, timeout_s=30.0)
        started = time.monotonic()
        with pytest.raises(ConnectionError):
            asked(end, *map(str, range(10)))
        assert time.monotonic() - started < 10


# ---- mistakes of the user


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(addresses=()), "give the address of each replica, once"),
        (dict(addresses=("http://a/v1",) * 2), "give the address of each replica, once"),
        (dict(addresses=("localhost:8000",)), "is no address such as http://host:8000/v1"),
        (dict(addresses=("http://me:sesame@host/v1",)), "'host/v1' is no address"),
        (dict(requests=0), "requests and window are 1 or more"),
        (dict(timeout_s=0.0), "timeout_s is positive"),
        (dict(retries=-1), "the other numbers 0 or more"),
        (dict(max_failure_share=1.5), "max_failure_share a share"),
        (dict(max_tokens=0), "max_tokens >= 1"),
        (dict(temperature=-1.0), "temperature >= 0"),
    ],
)
def test_mistakes_are_named(options, said):
    options = {"addresses": ("http://a/v1",)} | options
    with pytest.raises(ValueError, match=said) as error:
        make(*options.pop("addresses"), **options)
    assert "sesame" not in str(error.value)


def test_without_the_client_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.delitem(sys.modules, "tapojax.judges.replies", raising=False)
    monkeypatch.delattr("tapojax.judges.replies", raising=False)
    with pytest.raises(ValueError, match=r"judge needs the openai client .*pip install 'tapojax\[judges\]'"):
        make("http://a/v1")

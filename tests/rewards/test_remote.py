"""The client's promise: one score a row, the task's own to the bit, whatever happens to the servers."""

import concurrent.futures
import signal
import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tapojax.rewards import remote
from tapojax.rpc import fleet, limits, security
from tapojax.rpc import tapojax_pb2 as pb
from tapojax.rpc import tapojax_pb2_grpc as pb_grpc
from tapojax.tasks import TASKS
from tests.rewards import servers
from tests.rewards.servers import CHANNELS, OPEN, served, toy

NOWHERE = "127.0.0.1:1"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(fleet, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(fleet, "LONGEST_PAUSE_S", 0.2)


def score_on(*addresses, secrets=OPEN, **options):
    return remote.remote_score(addresses, security=secrets, **{"deadline_s": 20.0, **options})


def assert_exact(got, examples, completions, score=toy):
    """Equal to what the score function says in this process, NaN for NaN and text for text."""
    (scores, errors), (want, said) = got, score(examples, completions)
    assert scores.keys() == want.keys() and list(errors) == list(said)
    for name, values in want.items():
        assert scores[name].dtype == np.float32
        np.testing.assert_array_equal(scores[name], np.asarray(values, np.float32), err_msg=name)


# ---- all is well


def test_scores_and_error_texts_are_the_tasks_own():
    with served(toy, toy) as (one, two):
        score = score_on(one.address, two.address, chunk_rows=7)
        for count in (0, 1, 100):
            examples, completions = servers.rows(count)
            assert_exact(score(examples, completions), examples, completions)


def test_the_gym_scored_elsewhere_is_the_gym():
    task = TASKS["arithmetic"](seed=0, max_prompt_tokens=16)
    rng = np.random.default_rng(0)
    examples = [task.train[i] for i in range(200)]
    texts = [task.demonstration(example, rng) for example in examples]
    scores, _ = task.score(examples, texts)
    with served(task.score, channels=list(scores)) as (one,):
        assert_exact(score_on(one.address)(examples, texts), examples, texts, task.score)
    assert 0 < np.mean(scores["correct"]) < 1


def test_both_servers_work():
    seen = {"a": 0, "b": 0}

    def counted(name):
        def score(examples, completions):
            seen[name] += len(completions)
            time.sleep(0.01)
            return toy(examples, completions)

        return score

    with served(counted("a"), counted("b")) as (one, two):
        examples, completions = servers.rows(160)
        score = score_on(one.address, two.address, chunk_rows=8)
        assert_exact(score(examples, completions), examples, completions)
    assert sum(seen.values()) == 160 and min(seen.values()) >= 40, seen


def test_the_busy_server_gets_less():
    slow, seen = threading.Event(), []

    def stuck(examples, completions):
        slow.wait(20)
        return toy(examples, completions)

    def quick(examples, completions):
        seen.extend(completions)
        if len(seen) >= 300:
            slow.set()
        return toy(examples, completions)

    with served(stuck, quick) as (one, two):
        examples, completions = servers.rows(400)
        score = score_on(one.address, two.address, chunk_rows=10)
        assert_exact(score(examples, completions), examples, completions)
    assert slow.is_set(), "rows waited for the busy server while the other one was idle"


def test_20_clients_at_a_time():
    examples, completions = servers.rows(150)
    got = {}
    with served(toy, toy) as (one, two):

        def client(name):
            score = score_on(one.address, two.address, chunk_rows=16)
            got[name] = [score(examples[name:], completions[name:]) for _ in range(2)]

        threads = [threading.Thread(target=client, args=(name,)) for name in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(got) == 20
    for name, results in got.items():
        for result in results:
            assert_exact(result, examples[name:], completions[name:])


def test_many_threads_share_one_client():
    examples, completions = servers.rows(64)
    results = []
    with served(toy) as (one,):
        score = score_on(one.address, chunk_rows=8)
        threads = [threading.Thread(target=lambda: results.append(score(examples, completions))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(results) == 8
    for result in results:
        assert_exact(result, examples, completions)


# ---- rows that cannot be scored


def test_rows_that_cannot_be_sent_cost_themselves():
    examples, completions = servers.rows(6)
    examples[1] = {"id": "a", "answer": {1, 2}}
    completions[3] = "half a character: \ud83d"
    completions[5] = "x" * 2000
    with served(toy) as (one,):
        scores, errors = score_on(one.address, limits=limits.Limits(max_message_bytes=1000))(examples, completions)
    assert np.isnan(scores["length"]).tolist() == [False, True, False, True, False, True]
    assert [error is None for error in errors] == [True, False, True, False, True, False]
    assert "set is not JSON serializable" in errors[1] and "surrogates" in errors[3]
    assert "bytes, a message has at most 1000" in errors[5]


def test_rows_whose_verifier_fails_are_nan_with_its_words():
    def score(examples, completions):
        if "right" in completions:
            raise ZeroDivisionError("no such verifier")
        return toy(examples, completions)

    examples, completions = servers.rows(20)
    with served(score) as (one,):
        scores, errors = score_on(one.address)(examples, completions)
    for row, text in enumerate(completions):
        if text == "right":
            assert np.isnan([scores["correct"][row], scores["length"][row]]).all()
            assert errors[row] == "ZeroDivisionError: no such verifier"
        else:
            assert scores["length"][row] == len(text), "another row of the batch suffered"


# ---- servers that fail


def test_a_server_killed_mid_batch_costs_no_row(tmp_path):
    """Counted: 400 rows, each with one score for the caller; scored twice: only what the dead one had in its hands."""
    journals = [tmp_path / "a", tmp_path / "b"]
    with (
        servers.toy_process(journals[0], 0.002) as (victim, first),
        servers.toy_process(journals[1], 0.002) as (_, two),
    ):
        examples, completions = servers.rows(400)

        def kill():
            servers.wait_until(lambda: journals[0].exists() and len(journals[0].read_text().splitlines()) >= 40)
            victim.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        got = score_on(first, two, chunk_rows=10)(examples, completions)
        killer.join()
        assert victim.wait(10) < 0, "it was not killed in time"
    assert_exact(got, examples, completions)
    dead, alive = (journal.read_text().splitlines() for journal in journals)
    assert set(dead) | set(alive) == {example["id"] for example in examples}, "a row was never scored"
    assert len(dead) == len(set(dead)) and len(alive) == len(set(alive)), "a server scored a row twice"
    # four chunks of ten rows were on their way back when it died
    assert len(dead) < 360 and len(set(dead) & set(alive)) <= 40


def test_servers_killed_one_after_another_come_back(tmp_path):
    """A server that is started anew on its port gets rows again."""
    examples, completions = servers.rows(40)
    with served(toy) as (one,):
        port, score = one.running.port, score_on(one.address, chunk_rows=4)
        assert_exact(score(examples, completions), examples, completions)
    seen = []

    def counted(examples, completions):
        seen.extend(completions)
        return toy(examples, completions)

    got = []
    waiting = threading.Thread(target=lambda: got.append(score(examples, completions)))
    waiting.start()
    time.sleep(0.5)
    with served(counted, port=port):
        waiting.join(30)
    assert_exact(got[0], examples, completions)
    assert len(seen) == 40


def test_a_draining_server_is_left_and_another_one_asked():
    begun, free = threading.Event(), threading.Event()

    def slow(examples, completions):
        begun.set()
        free.wait(20)
        return toy(examples, completions)

    examples, completions = servers.rows(80)
    with served(slow, toy) as (one, two):
        score, got = score_on(one.address, two.address, chunk_rows=4), []
        waiting = threading.Thread(target=lambda: got.append(score(examples, completions)))
        waiting.start()
        assert begun.wait(20)
        stopping = threading.Thread(target=one.stop, args=(20,))
        stopping.start()
        time.sleep(0.2)
        free.set()
        waiting.join(30)
        stopping.join(30)
        assert_exact(got[0], examples, completions)


def test_all_servers_down_is_an_error_that_names_them():
    examples, completions = servers.rows(4)
    with served(toy) as (one,):
        score, address = score_on(one.address, NOWHERE, deadline_s=1.0), one.address
        assert_exact(score(examples, completions), examples, completions)
    with pytest.raises(ConnectionError, match="none of the reward servers can be used .*launch.serve_rewards") as error:
        score(examples, completions)
    assert address in str(error.value) and NOWHERE in str(error.value) and "UNAVAILABLE" in str(error.value)
    with pytest.raises(ConnectionError, match=NOWHERE):
        score_on(NOWHERE, deadline_s=0.3)([], [])


def test_a_late_server_is_left_for_another_one():
    free = threading.Event()

    def late(examples, completions):
        free.wait(30)
        return toy(examples, completions)

    examples, completions = servers.rows(40)
    with served(late, toy) as (one, two):
        got = score_on(one.address, two.address, deadline_s=0.5, chunk_rows=5)(examples, completions)
        free.set()
    assert_exact(got, examples, completions)


def test_after_the_last_try_a_row_is_nan_and_the_text_names_the_server():
    """What was answered before the deadline counts."""
    asked, free = [], threading.Event()

    def score(examples, completions):
        asked.extend(completions)
        if "wrong 1" in completions:
            free.wait(30)
        return toy(examples, completions)

    examples, completions = servers.rows(3)
    with served(score, max_batch=1, threads=6) as (one,):
        scores, errors = score_on(one.address, deadline_s=0.5, retries=2)(examples, completions)
        free.set()
    assert np.isnan(scores["length"]).tolist() == [False, True, False]
    assert errors[0] is None and "3 tries" in errors[1]
    assert one.address in errors[1] and "DEADLINE_EXCEEDED" in errors[1]
    assert asked.count("right") == 1 and asked.count("wrong 1") == 3


def judge_down(examples, completions):
    raise ConnectionError("judge (genrm) gave no verdict on 40 of the last 64 questions")


def test_a_judge_that_is_down_everywhere_ends_the_run_with_its_words():
    """Nobody can score: that is no row's fault, and no NaN."""
    examples, completions = servers.rows(40)
    with served(judge_down, judge_down) as (one, two):
        for score in (score_on(one.address, two.address, chunk_rows=5), score_on(one.address, retries=0)):
            with pytest.raises(ConnectionError, match=r"UNAVAILABLE: judge \(genrm\) gave no verdict on 40"):
                score(examples, completions)


def test_a_judge_that_is_down_at_one_server_costs_no_row():
    examples, completions = servers.rows(40)
    with served(judge_down, toy) as (one, two):
        assert_exact(score_on(one.address, two.address, chunk_rows=5)(examples, completions), examples, completions)


def test_a_wrong_token_is_said():
    with served(toy, secrets=security.Security(token="right")) as (one,):
        with pytest.raises(ConnectionError, match="UNAUTHENTICATED"):
            score_on(one.address, secrets=security.Security(token="wrong"), deadline_s=0.3)([{"id": "a"}], ["b"])
        with pytest.raises(ConnectionError, match="UNAUTHENTICATED"):
            remote.describe([one.address], security=OPEN)
        examples, completions = servers.rows(5)
        score = score_on(one.address, secrets=security.Security(token="right"))
        assert_exact(score(examples, completions), examples, completions)


class Odd(pb_grpc.RewardsServicer):
    """Answers as `answer` makes it, not as it should."""

    def __init__(self, answer):
        self.answer = answer

    def Describe(self, request, context):
        return pb.DescribeReply(task="toy", channels=CHANNELS)

    def Score(self, items, context):
        for item in items:
            yield from self.answer(item)


def right(item):
    return pb.ScoredItem(id=item.id, scores=dict.fromkeys(CHANNELS, 1.0))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda item: [right(item), right(item)], "answered '"),
        (lambda item: [pb.ScoredItem(id="other", scores=dict.fromkeys(CHANNELS, 1.0))], "answered 'other'"),
        (lambda item: [], "left 2 items without an answer"),
        (lambda item: [pb.ScoredItem(id=item.id, scores={"correct": 1.0})], "gave"),
    ],
    ids=["twice", "another id", "nothing", "a channel is missing"],
)
def test_an_answer_that_breaks_the_contract_does_not_count(answer, said):
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(8))
    pb_grpc.add_RewardsServicer_to_server(Odd(answer), server)
    checks = health.HealthServicer()
    checks.set(remote.SERVICE, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        scores, errors = score_on(address, retries=0)([{"id": "a"}] * 2, ["x", "y"])
    finally:
        server.stop(0)
    assert np.isnan(scores["correct"][1]) and said in errors[1] and address in errors[1]


def test_ctrl_c_ends_at_once():
    """Chunks under way are given up, not waited for."""
    begun, free = threading.Event(), threading.Event()

    def stuck(examples, completions):
        begun.set()
        free.wait(100)
        return toy(examples, completions)

    with served(stuck) as (one,):
        program = (
            "from tapojax.rewards import remote\nfrom tapojax.rpc import security\n"
            f"score = remote.remote_score(['{one.address}'], security=security.Security(), deadline_s=90.0)\n"
            "score([{'answer': 0}] * 100, ['right'] * 100)"
        )
        child = subprocess.Popen([sys.executable, "-c", program], cwd=servers.ROOT, stderr=subprocess.PIPE, text=True)
        assert begun.wait(60)
        child.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in child.communicate(timeout=60)[1], "it waited for its deadline"
        free.set()


def test_a_process_ends_while_its_chunks_are_under_way():
    """A run that stopped leaves calls of the loop's threads behind; it does not wait for their deadline."""
    begun, free = threading.Event(), threading.Event()

    def stuck(examples, completions):
        begun.set()
        free.wait(100)
        return toy(examples, completions)

    with served(stuck) as (one,):
        program = (
            "import sys, threading\nfrom tapojax.rewards import remote\nfrom tapojax.rpc import security\n"
            f"score = remote.remote_score(['{one.address}'], security=security.Security(), deadline_s=1000.0)\n"
            "rows = [{'answer': 0}] * 100, ['right'] * 100\n"
            "threading.Thread(target=score, args=rows, daemon=True).start()\nsys.stdin.read()"
        )
        child = subprocess.Popen([sys.executable, "-c", program], cwd=servers.ROOT, stdin=subprocess.PIPE)
        assert begun.wait(60)
        child.stdin.close()
        assert child.wait(60) == 0, "it waited for its deadline"
        free.set()


# ---- what the servers say of themselves


def test_description():
    with served(toy, toy) as (one, two):
        assert remote.describe([one.address, two.address], security=OPEN) == ("toy", CHANNELS)
        assert remote.describe([NOWHERE, two.address], security=OPEN) == ("toy", CHANNELS)
    with pytest.raises(ConnectionError, match=NOWHERE):
        remote.describe([NOWHERE], security=OPEN)


def test_servers_of_different_tasks_do_not_mix():
    other = servers.Served(toy, task="other")
    with served(toy) as (one,):
        with pytest.raises(ValueError, match="do not score the same.*other"):
            remote.describe([one.address, other.address], security=OPEN)
    other.stop()


@pytest.mark.parametrize(
    "options", [{"deadline_s": 0.0}, {"deadline_s": float("inf")}, {"retries": -1}, {"chunk_rows": 0}]
)
def test_nonsense_settings_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        score_on("127.0.0.1:1", **options)


@pytest.mark.parametrize("addresses", [(), (NOWHERE, NOWHERE), ("nowhere",), ("127.0.0.1",)])
def test_nonsense_addresses_are_refused(addresses):
    with pytest.raises(ValueError, match="host:port"):
        score_on(*addresses)

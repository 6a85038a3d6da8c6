"""Rewards from servers, as a user runs them: the same run, a clear word when something does not fit, a graceful end."""

import asyncio
import functools
import json
import queue
import signal
import socket
import subprocess
import sys
import urllib.request

import grpc
import pytest
from absl import flags
from absl.testing import flagsaver

from configs import base, fapo_gym, fapo_math, papo_math, quickstart
from launch import build, serve_rewards, serve_rollouts, train, train_with_servers
from tapojax.rewards import remote
from tapojax.rpc import tapojax_pb2 as pb
from tapojax.rpc.server import Refused
from tapojax.types import Engine
from tests.rewards import servers

COMMAND = ["-m", "launch.serve_rewards", "--config=configs/quickstart.py:quicktest", "--port=0"]


@pytest.fixture(scope="module")
def address():
    with servers.process(COMMAND) as (_, where):
        yield where


def tiny():
    """As few compiled programs as a run can have, and completions of every score."""
    config = quickstart.get_config("quicktest")
    config.steps, config.task.evaluation_size, config.log.tensorboard = 2, 16, False
    config.sft.updates, config.sft.warmup_updates = 5, 2
    return config


def lines(workdir, name):
    records = [json.loads(line) for line in (workdir / name).read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith(("seconds", "tokens_per_second"))} for r in records]


def test_a_run_with_reward_servers_is_the_run_without(address, tmp_path):
    here, there = tiny(), tiny()
    there.reward.addresses = (address,)
    train.train(here, tmp_path / "here")
    train.train(there, tmp_path / "there")
    for name in ("metrics.jsonl", "evaluations.jsonl", "rollouts.jsonl"):
        assert lines(tmp_path / "there", name) == lines(tmp_path / "here", name), name
    assert {"reward", "accuracy", "score_format"} <= lines(tmp_path / "here", "metrics.jsonl")[0].keys()


def test_servers_of_another_task_stop_the_run(address):
    config = quickstart.get_config()
    config.reward.addresses = (address,)
    assert build.setup(config).algorithm.needs == {"correct"}
    with servers.served(servers.toy, task="files") as (one,):
        config.reward.addresses = (one.address,)
        with pytest.raises(ValueError, match="servers score the task 'files', this config has 'arithmetic'"):
            build.setup(config)


def test_a_channel_that_the_algorithm_needs_and_nobody_gives_stops_the_run():
    config = fapo_gym.get_config()
    with servers.served(servers.toy, task="arithmetic") as (one,):
        config.reward.addresses = (one.address,)
        with pytest.raises(ValueError, match=r"channels \['flawed'\], the reward servers give \['correct', 'length'\]"):
            build.setup(config)


def test_servers_that_do_not_judge_as_the_config_says_stop_the_run():
    """What is judged is judged there: the config of the servers is the trainer's."""
    config = quickstart.get_config()
    config.judge = base.get_config(judge="rubric").judge
    config.answer_judge = base.get_config(answer_judge="answer").answer_judge
    with servers.served(servers.toy, task="arithmetic") as (one,):
        config.reward.addresses = (one.address,)
        with pytest.raises(ValueError, match=r"channels \['answer_judge_asked', 'process_asked'\], the reward"):
            build.setup(config)


def test_a_judge_that_thinks_longer_than_it_is_waited_for_stops_the_run():
    config = quickstart.get_config()
    config.judge = base.get_config(judge="rubric").judge
    config.judge.endpoint.timeout_s, config.reward.deadline_s = 90.0, 60.0
    channels = ("correct", "process_asked")
    score = functools.partial(ones, channels)
    with servers.served(score, task="arithmetic", channels=channels) as (one,):
        config.reward.addresses = (one.address,)
        with pytest.raises(ValueError, match=r"judge.endpoint.timeout_s=90.0 is longer than reward.deadline_s=60.0"):
            build.setup(config)
        config.reward.deadline_s = 90.0
        build.setup(config)


def ones(channels, examples, completions):
    return dict.fromkeys(channels, [1.0] * len(completions)), [None] * len(completions)


@pytest.mark.parametrize("paper", [fapo_math, papo_math])
def test_the_papers_servers_have_the_time_to_judge(paper):
    """All tries of a question, and the wait for a replica before them."""
    config = paper.get_config("quicktest")
    assert config.reward.deadline_s >= (config.judge.endpoint.retries + 2) * config.judge.endpoint.timeout_s


def test_rollout_servers_must_score_as_the_config_says(monkeypatch):
    """rollout.score_on_server: the channels of algorithm and judges come from there, or the run does not start."""
    config = fapo_gym.get_config("quicktest")
    config.judge = base.get_config(judge="genrm").judge

    def scores(*channels):
        sampler = Engine(load=None, generate=None, generate_scored=ones, score_channels=channels)
        monkeypatch.setattr(build, "engine", lambda *_: sampler)
        return build.setup(config)

    with pytest.raises(
        ValueError, match=r"score_on_server: .* channels \['flawed', 'flawed_asked'\], the rollout servers give \['corr"
    ):
        scores("correct")
    with pytest.raises(ValueError, match=r"channels \['flawed_asked'\].*--reward_addresses with the same --config"):
        scores("correct", "flawed")
    assert scores("correct", "flawed", "flawed_asked").engine.score_channels


def test_a_rollout_server_scores_within_its_own_deadline_and_says_when_nobody_can(monkeypatch):
    command = ["--engine=jax", "--model=x", "--tokenizer=gym"]
    with servers.served(servers.toy, task="arithmetic") as (one,):
        args = serve_rollouts.parse([*command, f"--reward_addresses={one.address}", "--reward_deadline_s=0.5"])
        scorer, channels = serve_rollouts.score_through(args, servers.OPEN)
        assert tuple(channels) == servers.CHANNELS
    with pytest.raises(Refused, match="none of the reward servers can be used") as error:
        asyncio.run(scorer([{"answer": 0}], [[5]]))
    assert error.value.code == grpc.StatusCode.UNAVAILABLE
    monkeypatch.setattr(remote, "describe", lambda *_, **__: remote.Description("", ()))
    seen = {}
    monkeypatch.setattr(remote, "remote_score", lambda addresses, **options: seen.update(options))
    more = ["--reward_addresses=a:1", "--reward_deadline_s=2400", "--reward_retries=1"]
    serve_rollouts.score_through(serve_rollouts.parse([*command, *more]), servers.OPEN)
    assert (seen["deadline_s"], seen["retries"]) == (2400.0, 1)


def test_what_needs_only_the_problems_asks_no_judge_and_no_server(tmp_path):
    """A tokenizer, a warm start, an exported policy: the judge's folder and the servers need not be there."""
    config = fapo_gym.get_config("fapo_genrm")
    config.judge.workdir, config.reward.addresses = str(tmp_path / "missing"), ("127.0.0.1:1",)
    config.rollout.addresses = ("127.0.0.1:1",)
    assert len(build.problems(config).tokenizer) and build.problems(config).demonstration is not None
    assert build.setup(build.alone(config)).model.vocab_size
    assert config.judge.name and config.reward.addresses, "the config is left as it was"
    assert train_with_servers.write_model(config, tmp_path).is_dir()
    serve_rollouts.jax_sampler(
        serve_rollouts.parse(["--engine=jax", "--config=configs/fapo_gym.py:fapo_genrm"])
    )  # runs/genrm_gym may be missing


@pytest.mark.parametrize(
    ("flag", "deadline_s", "batch_s"), [(None, 60.0, 600.0), (None, 2400.0, 2400.0), (5.0, 2400.0, 5.0)]
)
@flagsaver.flagsaver
def test_a_batch_of_a_reward_server_has_a_limit(flag, deadline_s, batch_s, monkeypatch):
    """--batch_s; by default 600 s, or the deadline that the trainer gives."""
    config, seen = quickstart.get_config("quicktest"), {}
    config.reward.deadline_s = deadline_s
    flags.FLAGS.mark_as_parsed()
    flags.FLAGS.batch_s = flag

    async def serve(name, task, secrets, batch_s):
        seen.update(name=name, batch_s=batch_s)

    monkeypatch.setattr(serve_rewards, "serve", serve)
    monkeypatch.setattr(serve_rewards.cli, "checked_config", lambda: config)
    monkeypatch.setattr(serve_rewards.telemetry, "log_json", lambda: None)
    serve_rewards.main()
    assert seen == {"name": "arithmetic", "batch_s": batch_s}


def test_servers_that_are_not_there_stop_the_run():
    config = quickstart.get_config()
    config.reward.addresses = ("127.0.0.1:1",)
    with pytest.raises(
        ConnectionError, match="127.0.0.1:1: UNAVAILABLE.*start them with python -m launch.serve_rewards"
    ):
        build.setup(config)


def test_each_key_of_the_section_acts(address, tmp_path):
    (tmp_path / "token").write_text("secret")
    config = quickstart.get_config()
    config.reward.addresses = (address,)
    for key, value, said in [
        ("deadline_s", 0.0, "deadline_s"),
        ("retries", -1, "retries"),
        ("token_file", "/nowhere", "/nowhere"),
        ("authority_file", str(tmp_path / "token"), "not a certificate"),
        ("certificate_file", str(tmp_path / "token"), "give both or neither"),
        ("key_file", str(tmp_path / "token"), "give both or neither"),
    ]:
        changed = config.copy_and_resolve_references()
        changed.reward[key] = value
        with pytest.raises(ValueError, match=said):
            build.task(changed)


def test_sigterm_lets_items_under_way_finish(tmp_path):
    """One stream is open when the signal comes; what it still sends is scored, and the process ends with status 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        metrics = f"127.0.0.1:{free.getsockname()[1]}"
    command = [*COMMAND, f"--metrics_port={metrics.rpartition(':')[2]}", "--drain_s=30"]
    with open(tmp_path / "log", "w") as log, servers.process(command, stderr=log) as (popen, where):
        with servers.stub(where) as calls:
            waiting: queue.Queue = queue.Queue()
            results = calls.Score(iter(waiting.get, None), timeout=60)
            problem = json.dumps({"id": "a", "problem": "57+86?", "answer": "143"}).encode()
            waiting.put(servers.item("0", problem, "7+6+0=13,5+8+1=14#143"))
            first = next(results)
            assert first.scores["correct"] == 1 and first.error == ""
            with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=10) as page:
                assert b'tapojax_scored_items_total{outcome="scored"} 1.0' in page.read()
            popen.send_signal(signal.SIGTERM)
            servers.wait_until(lambda: '"draining"' in (tmp_path / "log").read_text())
            with pytest.raises(grpc.RpcError):
                calls.Describe(pb.DescribeRequest(), timeout=5)
            for name in range(1, 20):
                waiting.put(servers.item(str(name), problem, "#143"))
            waiting.put(None)
            assert sorted(int(r.id) for r in results) == list(range(1, 20))
        assert popen.wait(60) == 0
    events = [json.loads(line)["event"] for line in (tmp_path / "log").read_text().splitlines()]
    assert events[0] == "listening" and "draining" in events, "the log is JSON, line by line"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--host=0.0.0.0"], "--token_file=FILE --certificate_file=FILE --key_file=FILE"),
        (["--host=1.2.3.4.5"], "1.2.3.4.5"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(options, says):
    done = subprocess.run([sys.executable, *COMMAND, *options], cwd=servers.ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and says in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")

"""Training on the gym with judges that fail: it goes on as specified or stops with the judge's name."""

import json
import threading

import numpy as np
import pytest

from configs import base, fapo_gym, papo_gym
from launch import build, train
from tapojax.rewards import serving
from tests.judges import endpoints
from tests.judges.endpoints import fail, say
from tests.rewards import servers


def tiny(config, name, addresses, **options):
    """As few compiled programs as a run can have; most completions of its warm start are right."""
    config.judge = base.get_config(judge=name).judge
    config.judge.endpoint.update(dict(addresses=addresses, pause_s=0.01, timeout_s=5.0, **options))
    config.steps, config.task.evaluation_size, config.log.tensorboard = 2, 16, False
    config.sft.updates, config.sft.warmup_updates = 60, 2
    config.evaluation.samples, config.collect.max_error_share = 1, 1.0
    return config


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def quiet(monkeypatch):
    """Evaluation asks the judge too; here only what training asks is counted."""
    monkeypatch.setattr(train, "evaluate", lambda *_: None)
    monkeypatch.setattr(train.report, "finish", lambda *_, **__: {})


def test_training_goes_on_with_a_judge_that_fails_now_and_then(tmp_path, quiet):
    """Two replicas: one is broken, the other refuses a third of the questions for good and babbles on a third."""
    kinds, lock = {}, threading.Lock()

    def respond(message, turn):
        with lock:
            kind = kinds.setdefault(message, len(kinds) % 3)
        return [say("Score: \\boxed{0.5}"), fail(400, "I refuse"), say("well, well")][kind]

    with endpoints.served(respond, fail(500)) as (good, bad):
        config = tiny(papo_gym.get_config("quicktest"), "rubric", (good.address, bad.address), max_failure_share=1.0)
        config.judge.rubric = "three_level_no_reference"
        config.log.rollouts = config.prompts_per_step
        train.train(config, tmp_path)
    assert len(kinds) >= 3 and len(good.messages) == len(kinds), (
        "each question once, and what failed for good not again"
    )
    rows = config.prompts_per_step * config.group_size
    for record in metrics(tmp_path):
        asked = round(record["score_process_asked"] * rows)
        assert 0 < asked < rows and record["score_errors"] > 0
        assert record["score_process_tries"] is not None and record["score_process_tokens"] >= 0
    judged = sum(round(record["score_process_asked"] * rows) for record in metrics(tmp_path))
    failed = sum(record["score_errors"] for record in metrics(tmp_path))
    assert failed < judged, "some were judged"


def test_a_judge_that_is_down_stops_the_run_by_name(tmp_path, quiet):
    with endpoints.served(fail(401, "who are you?")) as (server,):
        config = tiny(fapo_gym.get_config("quicktest"), "genrm", (server.address,), window=5)
        config.steps = 50
        with pytest.raises(
            ConnectionError, match=r"judge \(genrm\) gave no verdict on 5 of the last 5 .*who are you\?"
        ):
            train.train(config, tmp_path)
    assert len(server.messages) < 5 + config.prompts_per_step * config.group_size


def test_a_judge_behind_a_reward_server_is_the_judge_here():
    row = {"id": "a", "problem": "57+86?", "answer": "143"}
    right, wrong = "7+6+0=13,5+8+1=14#143", "7+6+0=13,5+8+1=14#153"
    with endpoints.served(say("\\boxed{0}"), endpoints.DROP) as (good, bad):
        config = tiny(fapo_gym.get_config("quicktest"), "genrm", (good.address, bad.address))
        task = build.task(config)
        channels = serving.probe(task.score, row)
        with servers.served(task.score, task="arithmetic", channels=channels) as (one,):
            config.reward.addresses = (one.address,)
            there = build.setup(config).task
            scores, errors = there.score([row] * 3, [right, wrong, right])
    assert errors == [None] * 3 and len(good.messages) == 1, "the same solution is asked about once"
    assert scores["flawed"].tolist() == [1, 0, 1] and scores["flawed_exact"].tolist() == [0, 0, 0]
    assert scores["judge_precision"].tolist() == pytest.approx([0, np.nan, 0], nan_ok=True)
    assert sorted(scores["flawed_cached"][[0, 2]].tolist()) == [0, 1] and np.isnan(scores["flawed_cached"][1])

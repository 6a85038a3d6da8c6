"""When rows are scored: streaming and after give the same run, every key acts, what would deadlock is refused."""

import json

import numpy as np
import pytest

from configs import base, quickstart, tapo_gym
from launch import build, train
from tapojax.rewards import loop


def tiny(get_config=quickstart.get_config, **reward):
    config = get_config("quicktest")
    config.steps, config.task.evaluation_size, config.log.tensorboard = 2, 16, False
    config.sft.updates, config.sft.warmup_updates = 5, 2
    config.sampling.stream_tokens = 3
    config.reward.update(reward)
    return config


def lines(workdir, name):
    records = [json.loads(line) for line in (workdir / name).read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith(("seconds", "tokens_per_second"))} for r in records]


def test_streaming_and_after_are_the_same_run(tmp_path, monkeypatch):
    """Row for row and bit for bit, however rows are cut into chunks; TAPO injects rows after scoring."""
    monkeypatch.setattr(train, "evaluate", lambda *_: None)
    monkeypatch.setattr(train.report, "finish", lambda *_, **__: {})
    train.train(tiny(tapo_gym.get_config, chunk_rows=5, threads=3), tmp_path / "streaming")
    train.train(tiny(tapo_gym.get_config, overlap=False), tmp_path / "after")
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert lines(tmp_path / "streaming", name) == lines(tmp_path / "after", name), name
    (first, *_), (other, *_) = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("streaming", "after")
    )
    for record in (first, other):
        assert 0 < record["seconds_per_score_call"] <= record["seconds_per_score_call_max"]
        assert record["seconds_reward"] >= 0 and record["seconds_sample"] > 0


def test_each_key_reaches_the_loop():
    config = quickstart.get_config()
    values = dict(overlap=False, chunk_rows=7, threads=3, wait_s=9.0)
    config.reward.update(values)
    assert build.scoring(config, build.setup(config)) == loop.Options(**values)
    defaults = quickstart.get_config()
    assert build.scoring(defaults, build.setup(defaults)) == loop.Options()
    defaults.reward.wait_s = 0.0
    with pytest.raises(ValueError, match="reward.wait_s=0.0"):
        build.scoring(defaults, build.setup(defaults))
    defaults.sampling.stream_tokens = 0
    with pytest.raises(ValueError, match="sampling.stream_tokens=0"):
        build.setup(defaults)


def with_critic(monkeypatch, **keys):
    """A setup whose judge is a critic on the devices of this process."""
    config = quickstart.get_config()
    config.judge = base.get_config(judge="critic").judge
    with config.unlocked():
        config.update_from_flattened_dict(keys)
    monkeypatch.setattr(build, "judge", lambda config: lambda examples, completions: None)
    return config, build.setup(config)


def test_a_judge_of_this_process_does_not_run_beside_the_sampler_on_several_devices(monkeypatch):
    config, run = with_critic(monkeypatch, **{"mesh.fsdp": 2})
    with pytest.raises(ValueError, match="on 2 devices: the judge critic would start programs.*reward.overlap=False"):
        build.scoring(config, run)
    config.reward.overlap = False
    assert not build.scoring(config, run).overlap
    config.reward.overlap, config.rollout.addresses = True, ("elsewhere:1",)
    assert build.scoring(config, run).overlap, "the sampler is elsewhere"
    assert build.scoring(*with_critic(monkeypatch)).overlap, "on one device programs take turns"


def test_a_judge_that_draws_by_batch_gets_its_rows_together(monkeypatch):
    config, run = with_critic(monkeypatch, **{"judge.temperature": 0.7})
    with pytest.raises(ValueError, match="judge.temperature=0.7: .*set reward.overlap=False"):
        build.scoring(config, run)
    config.reward.overlap = False
    assert not build.scoring(config, run).overlap


def test_a_dead_judge_stops_the_run_by_name(tmp_path, monkeypatch):
    make_task = build.task

    def task(config):
        def score(examples, completions):
            none = np.full(len(completions), np.nan, np.float32)
            return {"correct": none, "format": none}, ["the judge is down"] * len(completions)

        return make_task(config)._replace(score=score)

    monkeypatch.setattr(build, "task", task)
    config = tiny(chunk_rows=4)
    monkeypatch.setattr(train, "evaluate", lambda *_: None)
    with pytest.raises(ValueError, match=r"collect.max_error_share is 0.2\); the first error: the judge is down"):
        train.train(config, tmp_path)

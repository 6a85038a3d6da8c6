"""Law 6 for algorithms that remember: what HAPO carries on the device, TAPO on the host and RTPO by the step number."""

import json
import shutil

import pytest

from configs import hapo_gym, rtpo_gym, tapo_gym
from launch import train
from tapojax import report

FILES = ("metrics.jsonl", "evaluations.jsonl", "rollouts.jsonl", "injections.jsonl")


def tiny(get_config):
    config = get_config("quicktest")
    config.steps, config.checkpoint.every, config.evaluation.every = 4, 2, 0
    config.prompts_per_step, config.group_size = 4, 8
    config.task.train_size, config.task.evaluation_size, config.task.levels = 6, 8, (1,)  # each prompt comes back
    config.sft.updates, config.sft.warmup_updates, config.sft.batch_size = 30, 5, 6
    config.evaluation.samples, config.evaluation.batch_prompts = 1, 8
    config.log.tensorboard = False
    return config


def records(workdir, name):
    """Lines of the log without what depends on the clock."""
    lines = report.read_jsonl(workdir / name)
    return [{k: v for k, v in r.items() if not k.startswith(("seconds", "tokens_per_second"))} for r in lines]


def memory(workdir, step):
    return json.loads((workdir / "checkpoints" / str(step) / "record" / "metadata").read_text())["record"]["memory"]


@pytest.mark.parametrize("get_config", [hapo_gym.get_config, tapo_gym.get_config, rtpo_gym.get_config])
def test_a_resumed_run_equals_the_straight_one(get_config, tmp_path):
    config, straight, resumed = tiny(get_config), tmp_path / "straight", tmp_path / "resumed"
    train.train(config, straight)
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoints" / "4")
    train.train(config, resumed)
    for name in FILES:
        assert records(resumed, name) == records(straight, name), f"{name} differs from the uninterrupted run"
    if config.algorithm.name == "tapo":
        assert records(straight, "injections.jsonl"), "the test injects nothing"
        assert memory(resumed, 4) == memory(straight, 4) and memory(straight, 2), (
            "the teacher cache is in the checkpoint"
        )
        assert {r["origin"] for r in records(straight, "injections.jsonl")} <= {1, 2, 3, 4}

"""Law 6 for a run that chooses its problems by the pass rates it sees: the checkpoint has them, look-ahead or not."""

import json
import shutil

import pytest

from configs import quickstart
from launch import train
from tapojax import report


def tiny(**curriculum):
    config = quickstart.get_config("quicktest")
    config.steps, config.checkpoint.every, config.evaluation.every = 6, 3, 0
    config.prompts_per_step, config.group_size = 2, 8
    config.task.train_size, config.task.evaluation_size, config.task.levels = 6, 8, (1,)  # each prompt comes back
    config.sft.updates, config.sft.warmup_updates, config.sft.batch_size = 30, 5, 6
    config.evaluation.samples, config.evaluation.batch_prompts = 1, 8
    config.log.tensorboard, config.log.rollouts = False, 16
    config.curriculum.update(curriculum)
    return config


def rollouts(workdir):
    return [
        (line["step"], line["problem"], line["completion"]) for line in report.read_jsonl(workdir / "rollouts.jsonl")
    ]


def rates(workdir, step):
    return json.loads((workdir / "checkpoints" / str(step) / "record" / "metadata").read_text())["record"]["pass_rates"]


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_resumed_run_chooses_the_same_problems(staleness, tmp_path):
    config, straight, resumed = tiny(pass_rates=(0.0, 0.3), outside=0.3), tmp_path / "straight", tmp_path / "resumed"
    config.asynchrony.staleness = staleness
    config.train.correction = "token" if staleness else "none"
    train.train(config, straight)
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoints" / "6")
    train.train(config, resumed)
    assert rollouts(resumed) == rollouts(straight)
    assert rates(resumed, 6) == rates(straight, 6)
    print(rates(straight, 3), rates(straight, 6))
    assert rates(straight, 3) and rates(straight, 3) != rates(straight, 6), "the run goes on learning them"

"""Training against a real vLLM over gRPC: its log-probs are the trainer's after every update, for each system."""

import subprocess
import sys

import pytest

from configs import quickstart
from launch import build, train_with_servers
from tapojax.models import config_json
from tests.launch import test_train
from tests.launch.test_train import lines
from tests.vllm import conftest

SMALL = ("--config.task.evaluation_size=16", "--config.log.tensorboard=False", "--config.evaluation.samples=1")
FLOAT32 = 2e-3  # nats: two implementations in float32, summed in another order; measured 1e-5 to 4e-4


@pytest.fixture(scope="module")
def address(vllm_python, tmp_path_factory):
    """A vLLM server of the gym's model that was given its shape alone."""
    folder = tmp_path_factory.mktemp("server")
    config = quickstart.get_config("quicktest")
    model = build.model(config.model, build.task(config).tokenizer)
    config_json.write_config(model, folder, max_position_embeddings=512)
    command = [vllm_python, "-m", "launch.serve_rollouts", "--engine=vllm", f"--model={folder}", "--port=0"]
    command += ["--max_prompt_tokens=64", "--max_tokens=64", "--dtype=float32", "--kv_cache_mib=64"]
    environment = test_train.environment() | conftest.ENVIRONMENT
    environment.pop("JAX_PLATFORMS", None)
    with train_with_servers.servers(command, 1, folder, environment=environment) as (server,):
        yield server.address


def run(address, workdir, config, *overrides):
    command = [sys.executable, "-m", "launch.train", f"--config=configs/{config}.py:quicktest", f"--workdir={workdir}"]
    command += [f"--config.rollout.addresses=('{address}',)", *SMALL, *overrides]
    done = subprocess.run(command, cwd=test_train.ROOT, env=test_train.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return lines(workdir, "metrics.jsonl")


def test_logprobs_are_the_trainers_after_each_update(address, tmp_path):
    exact = ("--config.rollout.weights_dtype=float32", f"--config.rollout.probe_tolerance={FLOAT32}")
    steps = run(address, tmp_path / "run", "remote_gym", *exact)
    assert len(steps) == 3 and all(step["mismatch_max"] < FLOAT32 for step in steps), "log p(vLLM) = log p(trainer)"
    assert all(step["lag_max"] == 0 for step in steps), "every token is of the newest weights"


def test_weights_in_bfloat16_are_as_close_as_their_rounding(address, tmp_path):
    """The trainer keeps float32; 2^-9 of relative rounding in each weight moves a log-prob by some hundredths."""
    steps = run(address, tmp_path / "run", "remote_gym")
    assert all(step["mismatch_mean"] < 0.02 and step["mismatch_k3"] < 1e-3 for step in steps)


def test_hapo_heats_what_it_is_unsure_of(address, tmp_path):
    """Without statistics the first batch is plain; then vLLM samples hotter and colder than the base."""
    exact = ("--config.rollout.weights_dtype=float32", "--config.algorithm.temperature_strength=0.3")
    first, *later = run(address, tmp_path / "run", "hapo_gym", *exact)
    assert first["mismatch_max"] < FLOAT32
    assert all(0.01 < step["mismatch_mean"] < 0.5 for step in later), "log p at T in [0.7, 1.3] against log p at 1"


def test_tapo_and_rtpo_need_nothing_of_the_server(address, tmp_path):
    for config in ("tapo_gym", "rtpo_gym"):
        steps = run(address, tmp_path / config, config, "--config.rollout.weights_dtype=float32")
        assert all(step["mismatch_max"] < FLOAT32 for step in steps), config


def test_staleness_one_trains_on_rows_of_the_version_before(address, tmp_path):
    ahead = ("--config.asynchrony.staleness=1", "--config.rollout.weights_dtype=float32")
    steps = run(address, tmp_path / "run", "remote_gym", *ahead)
    assert [step["lag_max"] for step in steps] == [0, 1, 1]

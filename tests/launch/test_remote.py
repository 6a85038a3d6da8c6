"""A trainer and rollout servers as processes: the same run as in one process, whoever is killed on the way."""

import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from launch import train_with_servers
from tests.launch import test_train
from tests.launch.test_train import ROOT, environment, final_state, lines

FILES = ("metrics.jsonl", "evaluations.jsonl", "rollouts.jsonl")
REMOTE = ("--config.rollout.weights_dtype=float32", "--config.rollout.probe_tolerance=1e-4")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "here"
    done = test_train.run(workdir)
    assert done.returncode == 0, done.stdout + done.stderr
    return workdir


@pytest.fixture
def servers(tmp_path):
    """Two JAX servers: their processes and addresses."""
    command = [sys.executable, "-m", "launch.serve_rollouts", "--engine=jax", "--port=0"]
    command += ["--config=configs/quickstart.py:quicktest"]
    with train_with_servers.servers(command, 2, tmp_path, environment=environment()) as started:
        yield [server.process for server in started], [server.address for server in started]


def assert_same_run(workdir, other):
    for name in FILES:
        assert lines(workdir, name) == lines(other, name), f"{name} differs from the run in one process"
    (_, ours), (_, theirs) = final_state(workdir), final_state(other)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def at(*addresses):
    return (*REMOTE, f"--config.rollout.addresses=({','.join(repr(a) for a in addresses)},)")


def test_a_run_over_grpc_is_the_run_here_and_survives_the_death_of_its_trainer(here, servers, tmp_path):
    """float32 weights, one server: the same rows, and so the same parameters, to the bit. The servers live on."""
    workdir, (_, addresses) = tmp_path / "run", servers
    with subprocess.Popen(test_train.command(workdir, *at(addresses[0])), cwd=ROOT, env=environment()) as process:
        while not (workdir / "checkpoints" / "2").exists():
            assert process.poll() is None, "the run ended early"
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    done = test_train.run(workdir, *at(addresses[1]))  # a resumed run may find its servers elsewhere
    assert done.returncode == 0 and "resumed" in done.stdout, done.stdout + done.stderr
    assert_same_run(workdir, here)


def test_a_server_killed_in_the_middle_costs_no_row(here, servers, tmp_path):
    """Two servers with one request a batch: what one was doing when it was killed is sampled by the other, equally."""
    workdir, (processes, addresses) = tmp_path / "run", servers
    overrides = (*at(*addresses), "--config.rollout.prompts_per_request=16", "--config.evaluation.batch_prompts=16")
    with subprocess.Popen(test_train.command(workdir, *overrides), cwd=ROOT, env=environment()) as process:
        while not (workdir / "checkpoints" / "1").exists():
            assert process.poll() is None, "the run ended early"
            time.sleep(0.05)
        processes[0].send_signal(signal.SIGKILL)
        assert process.wait(120) == 0
    ours, theirs = (
        [{k: r[k] for k in ("step", "reward", "loss")} for r in lines(w, FILES[0])] for w in (workdir, here)
    )
    assert ours == theirs


def test_rows_that_come_scored_are_scored_like_here(here, tmp_path):
    """The rollout server asks a reward server about each group before it sends it."""
    rewards = [sys.executable, "-m", "launch.serve_rewards", "--config=configs/quickstart.py:quicktest", "--port=0"]
    rollouts = [sys.executable, "-m", "launch.serve_rollouts", "--engine=jax", "--port=0"]
    rollouts += ["--config=configs/quickstart.py:quicktest", "--tokenizer=gym"]
    for folder in (one := tmp_path / "rewards", two := tmp_path / "rollouts"):
        folder.mkdir()
    with train_with_servers.servers(rewards, 1, one, environment=environment()) as (scorer,):
        rollouts.append(f"--reward_addresses={scorer.address}")
        with train_with_servers.servers(rollouts, 1, two, environment=environment()) as (sampler,):
            workdir = tmp_path / "run"
            done = test_train.run(workdir, *at(sampler.address), "--config.rollout.score_on_server=True")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(workdir, here)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--engine=jax", "--host=0.0.0.0"], "pass --token_file=FILE --certificate_file=FILE --key_file=FILE"),
        (["--engine=jax"], "give one of them"),
        (["--engine=jax", "--config=configs/nothing.py"], "configs/nothing.py cannot be loaded"),
        (["--engine=jax", "--model=x", "--token_file=nowhere"], "--token_file=nowhere cannot be read"),
    ],
)
def test_a_server_that_cannot_start_says_what_to_pass(arguments, said):
    command = [sys.executable, "-m", "launch.serve_rollouts", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_sigterm_drains_and_ends(servers):
    processes, _ = servers
    processes[0].send_signal(signal.SIGTERM)
    assert processes[0].wait(30) == 0


def test_a_run_without_its_servers_says_so(tmp_path):
    done = test_train.run(tmp_path / "run", *at("127.0.0.1:9"))
    assert done.returncode == 1 and "none of the rollout servers can be used (127.0.0.1:9" in done.stderr

"""The main job as a user runs it: files it leaves, kill -9 and resume, and what it says when something is wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs import quickstart
from launch import build

ROOT = Path(__file__).parents[2]
# 40 problems and 16 a step: the epoch ends inside step 3
TINY = (
    "--config=configs/quickstart.py:quicktest",
    "--config.steps=5",
    "--config.task.train_size=40",
    "--config.task.evaluation_size=16",
    "--config.sft.updates=5",
    "--config.sft.warmup_updates=2",
    "--config.sft.batch_size=16",
    "--config.train.minibatches=2",
    "--config.train.epochs=2",
    "--config.algorithm.kl_coef=0.01",
    "--config.evaluation.every=2",
    "--config.checkpoint.every=1",
    "--config.log.tensorboard=False",
)


def command(workdir, *overrides):
    return [sys.executable, "-m", "launch.train", *TINY, f"--workdir={workdir}", *overrides]


def run(workdir, *overrides):
    return subprocess.run(command(workdir, *overrides), cwd=ROOT, env=environment(), capture_output=True, text=True)


def environment():
    """One device, the machine's own threads."""
    return {key: value for key, value in os.environ.items() if key != "NPROC"} | {"XLA_FLAGS": ""}


def lines(workdir, name):
    """Records of a jsonl file, without what depends on the clock."""
    records = [json.loads(line) for line in (workdir / name).read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith(("seconds", "tokens_per_second"))} for r in records]


def final_state(workdir):
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        step = manager.latest_step()
        return step, manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "straight"
    done = run(workdir)
    assert done.returncode == 0, done.stdout + done.stderr
    return workdir, done.stdout


def test_a_run_leaves_everything_in_its_folder(straight):
    workdir, output = straight
    summary = json.loads((workdir / "summary.json").read_text())
    for when in ("before", "after"):
        estimate = summary["pass_at_1"][when]
        assert 0 <= estimate["low"] <= estimate["mean"] <= estimate["high"] <= 1
    assert {"sample", "reward", "score", "train", "evaluate", "warm_start"} <= summary["seconds"].keys()
    assert json.loads((workdir / "config.json").read_text())["train"]["epochs"] == 2
    assert (workdir / "curve.png").read_bytes().startswith(b"\x89PNG")
    metrics = lines(workdir, "metrics.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2, 3, 4]
    needed = {
        "reward",
        "accuracy",
        "entropy",
        "reference_kl",
        "length_mean",
        "clip_fraction",
        "collapsed_groups",
        "gradient_norm",
    }
    assert needed <= metrics[0].keys()
    assert [e["step"] for e in lines(workdir, "evaluations.jsonl")] == [0, 2, 4, 5]
    assert {"problem", "completion", "correct"} <= lines(workdir, "rollouts.jsonl")[0].keys()
    assert "| pass@1 |" in output and "step 5/5" in output


@pytest.mark.parametrize("moment", ["between steps", "while saving"])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(straight, tmp_path, moment):
    """Law 6. The kill comes after the second checkpoint, so steps 3 (an epoch's end) to 5 are done after the resume."""
    workdir = tmp_path / "killed"
    child = subprocess.Popen(command(workdir), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and child.poll() is None:
        names = [path.name for path in workdir.glob("checkpoints/*")]
        newest = max([int(name) for name in names if name.isdigit()], default=0)
        saving = any("tmp" in name for name in names)
        if newest >= 2 and (moment == "between steps" or saving or newest == 4):  # 4: the last moment to be killed
            break
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.wait()
    done = run(workdir)
    assert done.returncode == 0, done.stdout + done.stderr
    assert child.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    assert f"resumed {workdir} at step" in done.stdout
    for name in ("metrics.jsonl", "evaluations.jsonl", "rollouts.jsonl"):
        assert lines(workdir, name) == lines(straight[0], name), f"{name} differs from the uninterrupted run"
    (step, got), (want_step, want) = final_state(workdir), final_state(straight[0])
    assert step == want_step == 5
    import jax

    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b, err_msg="the resumed run ended elsewhere")


def test_a_finished_run_only_reports_again(straight):
    done = run(straight[0])
    assert done.returncode == 0 and "at step 5" in done.stdout and "| pass@1 |" in done.stdout


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--config.optimizer.schedul=cosine"], "schedul"),
        (["--config.sampling.max_tokens=9"], "raise it, or leave such examples out"),
    ],
    ids=lambda x: x[0].removeprefix("--config.") if isinstance(x, list) else "",
)
def test_mistakes_are_named_in_one_line(tmp_path, overrides, said):
    done = run(tmp_path / "run", *overrides)
    assert done.returncode != 0
    assert said in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_resuming_with_another_config_is_refused(straight):
    done = run(straight[0], "--config.seed=3")
    assert done.returncode != 0 and "seed=0" in done.stderr and "another --workdir" in done.stderr


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_parameters(tmp_path):
    workdir = tmp_path / "run"
    # a decay of 1e40 sends the parameters to infinity, whatever the rewards are
    huge = ("--config.optimizer.learning_rate=1e20", "--config.optimizer.weight_decay=1e20")
    done = run(workdir, *huge, "--config.train.max_nonfinite=2")
    assert done.returncode != 0, done.stdout
    assert "not finite" in done.stderr and "optimizer.learning_rate" in done.stderr
    assert (workdir / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("optimizer.schedule", "cosin", "did you mean 'cosine'"),
        ("model.preset", "gym-smal", "did you mean 'gym-small'"),
        ("model.path", "/nowhere", "/nowhere"),
        ("model.remat", "everything", "everything"),
        ("sampling.max_prompt_tokens", 3, "raise max_prompt_tokens"),
        ("sampling.top_p", 0.0, "0 < top_p"),
        ("mesh.fsdp", 16, "needs 16 devices"),
        ("train.microbatches", 3, "rows do not divide"),
        ("task.levels", (99,), "99"),
        ("train.correction", "tokens", "tokens"),
    ],
)
def test_mistakes_are_found_before_anything_is_compiled(key, value, said):
    config = quickstart.get_config()
    with config.unlocked():
        config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=said):
        build.setup(config)


def test_eight_devices_take_the_same_steps_as_one(straight, tmp_path):
    """fsdp 4 x tensor 2 on fake CPU devices: same samples, same scores, same losses up to float32's rounding."""
    workdir = tmp_path / "mesh"
    env = environment() | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "NPROC": "32"}  # see conftest
    mesh = (
        "--config.mesh.fsdp=4",
        "--config.mesh.tensor=2",
        "--config.steps=2",
        "--config.optimizer.schedule=constant",
    )
    done = subprocess.run(command(workdir, *mesh), cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    ours, alone = lines(workdir, "metrics.jsonl")[0], lines(straight[0], "metrics.jsonl")[0]
    for name in ("accuracy", "length_mean", "sampled_tokens"):
        assert ours[name] == alone[name], name
    for name in ("loss", "entropy", "reference_kl", "gradient_norm"):
        np.testing.assert_allclose(ours[name], alone[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_warm_start_by_itself_profile_and_dynamic_sampling(tmp_path):
    """launch.sft leaves the initial policy where launch.train finds it; DAPO refills; one step is profiled."""
    workdir = tmp_path / "dapo"
    flags = [
        "--config=configs/quickstart.py:dapo",
        "--config.steps=2",
        "--config.sft.updates=60",
        "--config.task.evaluation_size=16",
        "--config.task.levels=(1,)",
        "--config.task.evaluation_levels=(1,)",
        "--config.evaluation.every=0",
        "--config.log.profile_step=2",
        f"--workdir={workdir}",
    ]
    for name in ("sft", "train"):
        done = subprocess.run(
            [sys.executable, "-m", f"launch.{name}", *flags],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("warm start 60/60" in done.stdout) == (name == "sft"), "the warm start is made once"
    for record in lines(workdir, "metrics.jsonl"):
        assert record["collapsed_groups"] == 0 and record["sampled_rows"] >= 128 and record["silent_rows"] == 0
    assert list(workdir.glob("profile/**/*.xplane.pb")) and list(workdir.glob("tensorboard/events*"))

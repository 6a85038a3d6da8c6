"""Rollouts ahead of training in whole runs: overlap, resume, record and replay, new weights in flight, refusals."""

import json
import shutil
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs import hapo_gym, quickstart, tapo_gym
from launch import build, train
from tapojax import report

PATIENCE = 120  # of a test that would otherwise wait for ever


def tiny(get_config=quickstart.get_config, **asynchrony):
    config = get_config("quicktest")
    config.steps, config.checkpoint.every, config.evaluation.every = 4, 2, 0
    config.prompts_per_step, config.group_size = 4, 8
    config.task.train_size, config.task.evaluation_size = 6, 8  # each prompt comes back
    config.task.levels = config.task.evaluation_levels = (1,)
    config.sft.updates, config.sft.warmup_updates, config.sft.batch_size = 60, 5, 6
    config.evaluation.samples, config.evaluation.batch_prompts = 1, 8
    config.log.tensorboard, config.optimizer.warmup_updates = False, 0
    config.asynchrony.update(asynchrony)
    if config.asynchrony.staleness:
        config.train.correction = "token"
    return config


def records(workdir, name="metrics.jsonl"):
    """Lines of the log without what depends on the clock."""
    lines = report.read_jsonl(workdir / name)
    return [{k: v for k, v in r.items() if not k.startswith(("seconds", "tokens_per_second"))} for r in lines]


def assert_same_end(one, other):
    """Bit for bit the same last checkpoint."""
    states = []
    for workdir in (one, other):
        with ocp.CheckpointManager(workdir / "checkpoints") as manager:
            what = ocp.args.Composite(state=ocp.args.StandardRestore())
            states.append(jax.tree.leaves(manager.restore(manager.latest_step(), args=what)["state"]))
    for a, b in zip(*states, strict=True):
        np.testing.assert_array_equal(a, b)


def ahead() -> bool:
    """In the thread that collects; evaluations sample in the main one."""
    return threading.current_thread().name == "rollouts"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run of staleness 1 that writes its batches down."""
    workdir = tmp_path_factory.mktemp("asynchrony") / "recorded"
    train.train(tiny(staleness=1, record=True), workdir)
    return workdir


# ---- lag and overlap


@pytest.mark.parametrize("staleness", [0, 1])
def test_the_engine_gets_version_j_minus_k_and_generation_overlaps_training(staleness, tmp_path, monkeypatch):
    """Staleness 1: batch j + 1 is begun before step j is written, and is not finished before that. No clock is read.

    Staleness 0: the weights of the step itself, the key of the step, and no thread.
    """
    config = tiny(staleness=staleness)
    make_engine, write = build.engine, train.write
    begun, written = ([threading.Event() for _ in range(config.steps + 1)] for _ in range(2))
    calls = []

    def engine(*args):
        local = make_engine(*args)

        def generate(weights, prompts, key, **how):
            version, arrays = weights
            if how["group_size"] == config.group_size:
                step = len(calls)
                calls.append((version, key, ahead()))
                begun[step].set()
                if staleness and step:
                    assert written[step - 1].wait(PATIENCE), f"step {step - 1} waited for batch {step}"
            return local.generate(arrays, prompts, key, **how)

        return local._replace(load=lambda params, version: (version, local.load(params, version)), generate=generate)

    def write_late(log, config, run, step, *given):
        if staleness and step + 1 < config.steps:
            assert begun[step + 1].wait(PATIENCE), f"batch {step + 1} was not begun while step {step} trained"
        written[step].set()
        write(log, config, run, step, *given)

    monkeypatch.setattr(build, "engine", engine)
    monkeypatch.setattr(train, "write", write_late)
    train.train(config, tmp_path)
    assert [version for version, *_ in calls] == [max(0, step - staleness) for step in range(4)]
    assert {thread for *_, thread in calls} == {bool(staleness)}
    for step, (_, key, _) in enumerate(calls):
        want = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), step), 0)
        np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(want))
    lags = [(r["lag_mean"], r["lag_max"]) for r in records(tmp_path)]
    assert lags == [(0, 0), *[(staleness, staleness)] * 3]
    stages = {key for key in report.read_jsonl(tmp_path / "metrics.jsonl")[0] if key.startswith("seconds_")}
    assert ("seconds_wait" in stages) == bool(staleness) and "seconds_sample" in stages


def test_stale_rows_differ_from_the_policy_that_they_train(recorded):
    """The mismatch is of two versions of the policy and the correction mends it; batch 0 is not stale."""
    lines = records(recorded)
    assert lines[0]["mismatch_max"] < 1e-4 and abs(lines[0]["importance_mean"] - 1) < 1e-5
    assert all(r["mismatch_max"] > 1e-3 for r in lines[1:]), "the test trains nothing"


# ---- nothing is lost


@pytest.mark.parametrize(
    ("get_config", "staleness"), [(quickstart.get_config, 1), (tapo_gym.get_config, 2), (hapo_gym.get_config, 1)]
)
def test_a_resumed_run_equals_the_straight_one(get_config, staleness, tmp_path):
    """Law 6. What is in flight at a checkpoint is part of it; TAPO remembers on the host, HAPO on the device."""
    config, straight, resumed = tiny(get_config, staleness=staleness), tmp_path / "straight", tmp_path / "resumed"
    train.train(config, straight)
    kept = json.loads((straight / "checkpoints" / "2" / "record" / "metadata").read_text())["record"]["ready"]
    assert len(kept) == staleness
    if config.algorithm.name == "tapo":
        assert records(straight, "injections.jsonl"), "the test injects nothing"
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoints" / "4")
    train.train(config, resumed)
    for name in ("metrics.jsonl", "evaluations.jsonl", "rollouts.jsonl", "injections.jsonl"):
        assert records(resumed, name) == records(straight, name), f"{name} differs from the uninterrupted run"
    assert_same_end(resumed, straight)


# ---- record and replay


def without_sampling(monkeypatch, config):
    """Whatever is sampled in training fails the run; evaluations may sample."""
    make_engine = build.engine

    def engine(*args):
        local = make_engine(*args)

        def generate(*given, **how):
            assert how["group_size"] != config.group_size, "a replayed run sampled"
            return local.generate(*given, **how)

        return local._replace(generate=generate)

    monkeypatch.setattr(build, "engine", engine)


def test_a_replay_ends_in_the_same_parameters_and_samples_nothing(recorded, tmp_path, monkeypatch):
    config = tiny(staleness=1, replay=str(recorded / "recorded"))
    without_sampling(monkeypatch, config)
    train.train(config, tmp_path)
    assert_same_end(tmp_path, recorded)
    assert records(tmp_path) == records(recorded)
    schedule = report.read_jsonl(recorded / "recorded" / "schedule.jsonl")
    assert [(line["step"], line["version"]) for line in schedule] == [(0, 0), (1, 0), (2, 1), (3, 2)]
    tokens = [sum(line["tokens_by_version"].values()) for line in schedule]
    assert tokens == [r["sampled_tokens"] for r in records(recorded)]


def test_an_on_policy_run_replays_too(tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    config = tiny(record=True)
    train.train(config, first)
    without_sampling(monkeypatch, config)
    train.train(tiny(replay=str(first / "recorded")), second)
    assert_same_end(second, first)


# ---- in flight


def test_in_flight_weights_reach_running_batches_and_replay_exactly(tmp_path, monkeypatch):
    """An engine that takes new weights halfway. When they come is up to the clock; what came is recorded."""
    make_engine, newest, came = build.engine, [0], threading.Condition()

    def engine(*args):
        local = make_engine(*args)

        def update(params, version):
            with came:
                newest[0] = version
                came.notify_all()
            return version, local.load(params, version)

        def generate(weights, prompts, key, **how):
            version, arrays = weights
            rollout = local.generate(arrays, prompts, key, **how)
            later = version
            if ahead() and version:
                with came:
                    assert came.wait_for(lambda: newest[0] > version, PATIENCE), "no update came in flight"
                    later = newest[0]
            half = np.arange(rollout.mask.shape[1]) - rollout.prompt_lengths[:, None] > 3
            return rollout._replace(versions=np.where(rollout.mask, np.where(half, later, version), -1))

        def load(params, version):
            return version, local.load(params, version)

        return local._replace(load=load, generate=generate, update=update)

    monkeypatch.setattr(build, "engine", engine)
    config = tiny(staleness=2, in_flight=True, record=True)
    config.checkpoint.every = 4
    first, second = tmp_path / "first", tmp_path / "second"
    train.train(config, first)
    schedule = report.read_jsonl(first / "recorded" / "schedule.jsonl")
    assert any(len(line["tokens_by_version"]) == 2 for line in schedule), "no batch was changed in flight"
    assert all(r["lag_max"] <= 2 for r in records(first))
    monkeypatch.undo()
    train.train(tiny(staleness=2, replay=str(first / "recorded")), second)
    assert_same_end(second, first)
    assert records(second) == records(first)


# ---- failures and refusals


def test_an_error_while_sampling_ahead_ends_the_run(tmp_path, monkeypatch):
    make_engine = build.engine

    def engine(*args):
        local = make_engine(*args)

        def generate(*given, **how):
            if ahead():
                raise RuntimeError("the server is gone")
            return local.generate(*given, **how)

        return local._replace(generate=generate)

    monkeypatch.setattr(build, "engine", engine)
    with pytest.raises(RuntimeError, match="the server is gone") as error:
        train.train(tiny(staleness=1), tmp_path)
    assert any(entry.name == "generate" for entry in error.traceback), "where it happened"
    assert not any(thread.name == "rollouts" for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"asynchrony.staleness": -1}, "staleness is 0 or more"),
        ({"asynchrony.staleness": 1}, "choose train.correction=token or sequence, or a mismatch.mask"),
        ({"asynchrony.in_flight": True}, "in flight at least 1"),
        (
            {"asynchrony.staleness": 1, "asynchrony.in_flight": True, "train.correction": "token"},
            "name servers in rollout.addresses",
        ),
        (
            {"asynchrony.staleness": 1, "train.correction": "token", "mesh.fsdp": 2},
            "on 2 devices: the embedded sampler",
        ),
        ({"asynchrony.replay": "nowhere"}, "nowhere/schedule.jsonl has no batch of step 0"),
    ],
    ids=lambda x: "+".join(x) if isinstance(x, dict) else "",
)
def test_what_cannot_work_is_refused_before_anything_is_compiled(keys, said):
    config = quickstart.get_config()
    with config.unlocked():
        config.update_from_flattened_dict(keys)
    run = build.setup(config)
    with pytest.raises(ValueError, match=said):
        build.check_asynchrony(config, run)


def test_rejection_alone_is_a_correction_of_stale_rows():
    config = quickstart.get_config()
    config.asynchrony.staleness, config.mismatch.mask = 1, 0.1
    build.check_asynchrony(config, build.setup(config))

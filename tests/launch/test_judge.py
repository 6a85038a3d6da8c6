"""The `judge` section: a finished critic becomes the source of channel "flawed"; what is no critic is named."""

import json
import shutil
import threading

import jax
import numpy as np
import pytest

from configs import fapo_gym, genrm_gym, quickstart
from launch import build, cli
from tapojax import checkpoint

CLEAN, WRONG = "7+6+0=13,5+8+1=14#143", "7+6+0=13,5+8+1=14#153"
ROWS = [{"id": "a", "problem": "57+86?", "answer": "143"}] * 2


@pytest.fixture(scope="module")
def critic(tmp_path_factory):
    """The folder of a run of one step, as launch.train leaves it."""
    workdir, config = tmp_path_factory.mktemp("run") / "critic", genrm_gym.get_config("quicktest")
    cli.write_config(config, workdir)
    run = build.setup(config)
    with jax.set_mesh(run.mesh):
        params = build.initial_params(config.model, run.model, run.mesh, jax.random.key(0))
        state = build.fresh_state(run.algorithm, run.optimizer, params, run.mesh)
        checkpoint.save(checkpoint.open_manager(workdir / "checkpoints"), 1, state, {})
    return workdir


def judged_by(workdir):
    config = fapo_gym.get_config("fapo_genrm")
    config.judge.workdir = str(workdir)
    return config


def test_the_trained_critic_judges_the_right_rows(critic):
    run = build.setup(judged_by(critic))
    with jax.set_mesh(run.mesh):
        scores, errors = run.task.score(ROWS, [CLEAN, WRONG])
    assert {"flawed", "flawed_exact", "judge_precision", "judge_recall"} <= scores.keys()
    assert np.isnan(scores["flawed"][0]) == ("no verdict" in (errors[0] or "")), "it was never trained"
    assert scores["flawed"][1] == 0 and errors[1] is None, "a wrong row is not judged"
    plain = build.setup(fapo_gym.get_config("fapo"))
    assert plain.task.score(ROWS, [CLEAN, WRONG])[0].keys() == scores.keys() - {
        "flawed_exact",
        "flawed_asked",
        "flawed_seconds",
        "flawed_tokens",
        "judge_precision",
        "judge_recall",
    }


def test_any_thread_may_ask_the_judge(critic):
    """A reward server asks from a new thread for each batch, outside the mesh of the main one."""
    run, got = build.setup(judged_by(critic)), []
    thread = threading.Thread(target=lambda: got.append(run.task.score(ROWS, [CLEAN, WRONG])))
    thread.start()
    thread.join()
    with jax.set_mesh(run.mesh):
        want, errors = run.task.score(ROWS, [CLEAN, WRONG])
    assert got[0][1] == errors
    assert want.keys() == got[0][0].keys()
    for name in want.keys() - {"flawed_seconds"}:
        np.testing.assert_array_equal(got[0][0][name], want[name], err_msg=name)


def test_parameters_are_those_of_the_checkpoint(critic):
    config = json.loads((critic / "config.json").read_text())
    assert config["task"]["name"] == "critiques"
    run = build.setup(genrm_gym.get_config("quicktest"))
    with jax.set_mesh(run.mesh):
        step, params = build.saved_params(run, critic)
        want = build.initial_params(genrm_gym.get_config().model, run.model, run.mesh, jax.random.key(0))
    assert step == 1
    jax.tree.map(np.testing.assert_array_equal, params, want)


def test_a_critic_may_be_older_than_some_keys(critic, tmp_path):
    old = shutil.copytree(critic, tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    del config["sampling"]["stream_tokens"], config["answer_judge"]
    config["judge"] = {"workdir": "", "temperature": 0.0, "batch_rows": 64}
    (old / "config.json").write_text(json.dumps(config))
    run = build.setup(judged_by(old))
    assert "flawed_asked" in run.task.score(ROWS, [CLEAN, WRONG])[0]


def test_what_is_no_finished_critic_is_named(tmp_path):
    with pytest.raises(ValueError, match="has no config.json: train a judge with .*configs/genrm_gym.py"):
        build.setup(judged_by(tmp_path))
    cli.write_config(quickstart.get_config(), tmp_path / "other")
    with pytest.raises(ValueError, match="is a run of the task 'arithmetic', not of one of .*'critiques'"):
        build.setup(judged_by(tmp_path / "other"))
    cli.write_config(genrm_gym.get_config(), tmp_path / "begun")
    with pytest.raises(ValueError, match="no checkpoints/ in .*begun"):
        build.setup(judged_by(tmp_path / "begun"))
    (tmp_path / "begun" / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="holds no checkpoint yet"):
        build.setup(judged_by(tmp_path / "begun"))


def test_rows_of_the_judge_divide_over_the_devices():
    config = judged_by("runs/genrm_gym")
    config.judge.batch_rows, config.mesh.data = 3, 2
    with pytest.raises(ValueError, match="judge.batch_rows=3 is not a multiple of 2 devices"):
        build.setup(config)

"""`python -m launch.compare` as a user runs it: shared warm start, a killed child, a restart, a table."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs import quickstart
from launch import compare, processes
from launch.processes import Job

ROOT = Path(__file__).parents[2]
CONFIG = """
from configs import quickstart

VARIANTS = {"rloo": "leave one out", "grpo": "the parent"}


def get_config(mode=""):
    c = quickstart.get_config(mode or "rloo")
    c.steps, c.prompts_per_step, c.task.train_size, c.task.evaluation_size = 3, 4, 40, 8
    c.sft.updates, c.sft.warmup_updates, c.sft.batch_size = 4, 2, 16
    c.evaluation.batch_prompts, c.evaluation.every, c.checkpoint.every = 8, 1, 1
    c.log.tensorboard = False
    return c
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny_gym.py"
    path.write_text(CONFIG)
    return path


def begin(config, *given):
    """One device, the machine's own threads."""
    environment = {key: value for key, value in os.environ.items() if key != "NPROC"} | {"XLA_FLAGS": ""}
    command = [sys.executable, "-m", "launch.compare", f"--config={config}", *map(str, given)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)


def finish(config, *given):
    process = begin(config, *given)
    return process, *process.communicate()


def process_of(command, name):
    """The number of the process that a job is started as; what is said before is read over."""
    for line in command.stdout:
        if line.startswith(f"{name}: process "):
            return int(line.split()[line.split().index("process") + 1])
    raise AssertionError(f"{name} was not started: {command.stderr.read()}")


def alive(number):
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def lines(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_a_killed_child_is_reported_the_others_finish_and_a_restart_does_the_rest(config, tmp_path):
    flags = [f"--workdir={tmp_path / 'gym'}", "--seeds=0", "--processes=2", "--config.task.levels=(1,)"]
    rloo, grpo = (tmp_path / "gym" / name / "seed-0" for name in ("rloo", "grpo"))
    command = begin(config, *flags)
    child = process_of(command, "rloo seed 0")
    while not (rloo / "checkpoints" / "1").exists() and alive(child):
        time.sleep(0.01)
    assert alive(child), (rloo / "log.txt").read_text()
    os.kill(child, signal.SIGKILL)
    said, errors = command.communicate()
    assert command.returncode == 1, said + errors
    assert "rloo seed 0: FAILED with status -9" in said and f"the end of {rloo / 'log.txt'}" in said
    assert "evaluation after 0 steps" in said, "the tail of its log"
    assert "1 failed: rloo seed 0" in errors and "Traceback" not in errors
    assert "| grpo | 1 |" in said and "| rloo | 1 |" not in said and "Not finished, left out: rloo seed 0 (" in said

    # both began from the policy of one warm start, with the overrides
    assert len(list((tmp_path / "gym" / "initial-0").glob("*/initial/0"))) == 1
    assert "warm start" not in (grpo / "log.txt").read_text()
    assert lines(rloo, "evaluations")[0] == lines(grpo, "evaluations")[0]
    assert json.loads((grpo / "config.json").read_text())["task"]["levels"] == [1]

    before = {path: path.stat().st_mtime_ns for path in grpo.rglob("*")}
    done, said, errors = finish(config, *flags)
    assert done.returncode == 0, said + errors
    assert "grpo seed 0: finished already" in said and "rloo seed 0: done" in said and "warm start" not in said
    assert f"resumed {rloo} at step" in (rloo / "log.txt").read_text()
    assert before == {path: path.stat().st_mtime_ns for path in grpo.rglob("*")}, "a finished run is left as it is"
    assert [record["step"] for record in lines(rloo, "metrics")] == [0, 1, 2]
    table = (tmp_path / "gym" / "table.md").read_text()
    assert table in said and "| rloo | 1 |" in table and "| grpo | 1 |" in table and "Not finished" not in table
    results = json.loads((tmp_path / "gym" / "results.json").read_text())
    assert results["baseline"] == "grpo" and results["budget_rows"] == 3 * 4 * 8
    assert (tmp_path / "gym" / "curves.png").read_bytes().startswith(b"\x89PNG")

    # a further seed, interrupted: the command ends its children
    command = begin(config, *flags, "--seeds=0,1")
    child = process_of(command, "warm start of seed 1")
    command.send_signal(signal.SIGTERM)
    command.communicate()
    assert command.returncode == 128 + signal.SIGTERM and not alive(child)

    # only the report, of what there is
    done, said, errors = finish(config, *flags, "--seeds=0,1", "--report_only", "--baseline=rloo", "--variants=rloo")
    assert done.returncode == 0, said + errors
    assert "| rloo | 1 |" in said and "grpo" not in said and "left out: rloo seed 1 (0 steps done)" in said

    done, said, errors = finish(config, *flags, "--config.optimizer.clip_norm=2.0")
    assert done.returncode == 1 and "clip_norm=1.0, this command says 2.0" in errors, "before anything is started"


def test_a_warm_start_is_shared_where_it_is_equal():
    def key(**changes):
        config = quickstart.get_config()
        config.update_from_flattened_dict(changes)
        return compare.warm_start_key(config)

    assert key() == key(**{"steps": 7, "optimizer.clip_norm": 3.0, "sampling.temperature": 0.5, "group_size": 4})
    assert key() == compare.warm_start_key(quickstart.get_config("dapo"))
    changed = [{"sft.updates": 7}, {"task.scratchpad": 0.5}, {"sampling.max_tokens": 30}, {"model.dtype": "bfloat16"}]
    assert len({key(), *(key(**change) for change in changed)}) == 5


def test_the_initial_policy_is_given_whole_and_once(tmp_path):
    source, run = tmp_path / "warm", tmp_path / "run"
    (source / "initial" / "0").mkdir(parents=True)
    (source / "initial" / "0" / "params").write_text("new")
    (run / "initial").mkdir(parents=True)  # of a process that was killed before it saved
    (run / "initial.partial" / "0").mkdir(parents=True)
    compare.copy_initial(source, run)
    assert (run / "initial" / "0" / "params").read_text() == "new" and not (run / "initial.partial").exists()
    (source / "initial" / "0" / "params").write_text("newer")
    compare.copy_initial(source, run)
    assert (run / "initial" / "0" / "params").read_text() == "new", "a run keeps the policy it has begun from"


def test_runs_whose_warm_start_failed_are_not_begun(tmp_path, monkeypatch):
    """`began` has its initial policy already and needs none; `other` has a warm start of its own."""
    jobs = {name: Job(name, "launch.train", [], tmp_path / name) for name in ("lost", "began", "other")}
    bad = Job("warm start", "launch.sft", [], tmp_path / "bad")
    for folder in ("began", "good"):
        (tmp_path / folder / "initial" / "0").mkdir(parents=True)
    runs = [(jobs["lost"], bad.folder), (jobs["began"], bad.folder), (jobs["other"], tmp_path / "good")]
    monkeypatch.setattr(compare, "plan", lambda *_: ({bad.folder: bad}, runs))
    asked = []
    monkeypatch.setattr(processes, "run_all", lambda given, _: asked.append(given) or [j for j in given if j is bad])
    (tmp_path / "other").mkdir()
    assert compare.train(tmp_path, {}, [], 2) == [bad]
    assert asked == [[bad], [jobs["began"], jobs["other"]]]
    assert (tmp_path / "other" / "initial" / "0").exists() and not (tmp_path / "lost").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--variants=rlo"], "did you mean 'rloo'?"),
        (["--baseline=gspo"], "no chosen variant is called 'gspo'"),
        (["--seeds=0,b"], "'b' is no number"),
        (["--config.seed=3"], "say --seeds=3"),
        (["--report_only"], "Give its --workdir"),
        (["--report_only", "--workdir=/nowhere"], "no run is finished"),
        (["--config.algorithm.clip_hgh=1"], "clip_hgh"),
    ],
)
def test_mistakes_end_in_one_message(config, given, message):
    done, said, errors = finish(config, *given)
    assert done.returncode == 1 and message in errors and "Traceback" not in errors, said + errors


def test_a_config_without_variants_and_one_with_a_mode():
    for path, message in [("configs/gsm8k.py", "has no VARIANTS"), ("configs/quickstart.py:dapo", "--variants=dapo")]:
        done, _, errors = finish(path)
        assert done.returncode == 1 and message in errors

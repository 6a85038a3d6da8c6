"""`python -m launch.report` as a user runs it: results, a run, and things that are neither."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch import report
from tests.test_results import one_set, result

ROOT = Path(__file__).parents[2]


def save(folder, found):
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(found))
    return folder


@pytest.fixture
def two(tmp_path):
    """Folders of two results of the same set."""
    a, b = result("base", {"s": one_set([0.0, 0.5, 0.5])}), result("ours", {"s": one_set([0.5, 1.0, 0.5])})
    return save(tmp_path / "base", a), save(tmp_path / "ours", b)


@pytest.fixture
def run(tmp_path):
    folder, last = tmp_path / "run", one_set([0.5])
    folder.mkdir()
    config = {
        "task": {"name": "files", "evaluation_path": "data/s_test.jsonl"},
        "evaluation": {"temperature": 0.5, "top_p": 0.7},
        "sampling": {"max_tokens": 32},
    }
    (folder / "config.json").write_text(json.dumps(config))
    own = {k: v for k, v in last.items() if k in ("pass@1", "pass@4", "maj@4", "problems", "samples", "mean_length")}
    own |= {"step": 40, "truncated": 0.0, "errors": 0}
    (folder / "evaluations.jsonl").write_text(json.dumps({**own, "step": 0}) + "\n" + json.dumps(own) + "\n")
    return folder


def command(*given, cwd=ROOT):
    line = [sys.executable, "-m", "launch.report", *map(str, given)]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True)


def test_two_results_and_a_run_beside_each_other(two, run, tmp_path):
    done = command(*two, run, f"--out={tmp_path / 'new' / 'table.md'}")
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "new" / "table.md").read_text()
    assert done.stdout == f"{text}\nwritten  {tmp_path / 'new' / 'table.md'}\n"
    title, _, row = text.splitlines()[:3]
    assert "ours - base" in title and "run-40 (run)" in title and "+0.333 [" in row
    assert "- s: run-40 (run) has no numbers by problem; use launch.evaluate" in text


def test_a_result_and_a_run_have_values_beside_each_other(two, run, tmp_path):
    done = command(two[0], run, f"--out={tmp_path / 'table.md'}")
    assert done.returncode == 0, done.stdout + done.stderr
    row = done.stdout.splitlines()[2]
    assert "0.333 [" in row and "0.500 [" in row and row.split("|")[-2].strip() == ""
    assert "- s: run-40 (run) has no numbers by problem; use launch.evaluate" in done.stdout


def test_a_runs_set_is_called_as_its_folder(run):
    config = json.loads((run / "config.json").read_text())
    config["task"]["evaluation_path"] = "data/aime24/test.jsonl"
    (run / "config.json").write_text(json.dumps(config))
    assert list(report.of_run(run)["sets"]) == ["aime24"]


def test_one_result_is_shown(two):
    done = command(two[0])
    assert done.returncode == 0 and done.stdout.startswith("**base**, temperature 0.5"), done.stderr


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda folder: [], "error: which results? Name their folders: python -m launch.report"),
        (lambda folder: [folder / "no"], "no is no result of launch.evaluate and no run: there is no result.json"),
    ],
)
def test_mistakes_end_in_one_message(tmp_path, make, said):
    done = command(*make(tmp_path))
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr


def test_a_file_is_a_result_too(two):
    assert report.read(two[0] / "result.json") == report.read(two[0])


def test_a_run_without_a_file_of_problems_is_called_by_its_task(run):
    config = json.loads((run / "config.json").read_text())
    config["task"] = {"name": "arithmetic"}
    (run / "config.json").write_text(json.dumps(config))
    assert list(report.read(run)["sets"]) == ["arithmetic"]


def test_an_evaluation_that_was_killed_is_named(tmp_path):
    (tmp_path / "aime24.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="has not come to its end: run its launch.evaluate again"):
        report.read(tmp_path)


@pytest.mark.parametrize("text", ["{", '{"name": "x"}', "[]"])
def test_a_damaged_result_is_named(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ValueError, match="result.json is damaged or no result of launch.evaluate"):
        report.read(tmp_path)


def test_a_run_that_has_not_evaluated_yet(run):
    (run / "evaluations.jsonl").write_text("")
    with pytest.raises(ValueError, match="has no evaluation yet"):
        report.read(run)

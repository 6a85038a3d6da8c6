"""`python -m launch.benchmark`: what it writes, never how fast."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch import benchmark
from launch.peers import workload

ROOT = Path(__file__).parents[2]


def run(*flags) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launch.benchmark", "--quick", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_quick_run_of_ours_alone_writes_json_history_and_table(tmp_path):
    cases = ["generate", "train", "step_kl", "logprobs_backward"]
    done = run(f"--cases={','.join(cases)}", f"--folder={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr

    (path,) = tmp_path.glob("benchmark-*.json")
    record = json.loads(path.read_text())
    assert list(record["cases"]) == list(record["shapes"]) == cases
    for name, cells in record["cases"].items():
        assert list(cells) == ["tapojax"]
        values = cells["tapojax"]
        assert {"median_seconds", "min_seconds", "max_seconds", "tokens_per_second", "extra_peak_mib"} <= values.keys()
        assert len(values["seconds"]) == 1, "a quick run counts one repetition"
        assert f"| {name} | tapojax |" in done.stdout
    facts = record["machine"]
    assert facts["matmul_gflops_before"] > 0 and facts["cores"] > 0
    assert "jax" in record["cases"]["generate"]["tapojax"]["versions"]
    assert json.loads((tmp_path / "benchmark-history.jsonl").read_text()) == record
    assert "trl is left out" in done.stdout and "pip install google-tunix" in done.stdout


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--cases=generate,fly", "no case is called 'fly'"),
        ("--cases=startup_again", "put startup before it"),
        ("--rows=12", "not a multiple of the group size"),
        ("--trl_python=/no/such/python", "there is no /no/such/python"),
    ],
)
def test_mistakes_end_with_a_message_before_anything_runs(flag, message, tmp_path):
    done = run(flag, f"--folder={tmp_path}")
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_table_compares_with_ours_and_names_failures():
    ours = workload.summary(
        [{"seconds": [2.0, 1.0, 3.0], "cpu_seconds": [1.0] * 3, "others_cores": 0.0, "extra_peak_mib": 100.0}],
        tokens=10,
    )
    theirs = workload.summary(
        [{"seconds": [3.0], "cpu_seconds": [1.0], "others_cores": 0.5, "extra_peak_mib": 250.0}], tokens=10
    )
    cells = {"tapojax": ours, "trl": theirs, "tunix": {"error": "Traceback\nMemoryError: no room"}}
    rows = benchmark.table({"train": cells}).splitlines()[2:]
    assert rows[0] == "| train | tapojax | 2.000 (1.000-3.000) | 1.00 | 5 | 100 | - | - |"
    assert rows[1] == "| train | trl | 3.000 (3.000-3.000) | 1.00 | 3 | 250 | 1.50 | 2.50 |"
    assert "failed: MemoryError: no room" in rows[2]
    assert benchmark.busy_with_others({"train": cells}) == ["train/trl (0.5)"]

"""Results beside each other: avg@k set by set, and differences to the first, problem by problem.

    python -m launch.report results/mine-initial results/mine-40
    python -m launch.report results/base-hapo results/dapo-hapo results/hapo-hapo --out=hapo.md

A result is a folder that launch.evaluate wrote; a run's folder stands for its last evaluation, without differences. Of
one result alone the table is printed. Sets with other problems under the same name are named and not compared.
"""

import json
import sys
from pathlib import Path

from absl import app, flags

from tapojax import protocols, report, results

OUTPUT = flags.DEFINE_string("out", "results/comparison.md", "file to write the table to; of several results")
KEYS = ("name", "policy", "protocol", "notes", "sampling", "sets", "mean", "ks")  # what is read of a result


def main(argv):
    try:
        paths = [Path(name) for name in argv[1:]]
        if not paths:
            raise ValueError("which results? Name their folders: python -m launch.report results/a results/b")
        found = [read(path) for path in paths]
        if len(found) == 1:
            print(results.table(found[0]))
            return
        text = results.comparison_table(found, results.compare(found))
        output = Path(OUTPUT.value)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{text}\n\nwritten  {output}")


def read(path: Path) -> results.Result:
    """The result in a folder, or a run's last evaluation as one.

    Raises:
      ValueError: it is neither, or the evaluation is not finished.
    """
    if (path / "evaluations.jsonl").is_file():
        return of_run(path)
    file = path if path.suffix == ".json" else path / "result.json"
    if not file.is_file():
        begun = list(path.glob("*.jsonl")) if path.is_dir() else []
        raise ValueError(
            f"{path} is an evaluation that has not come to its end: run its launch.evaluate again"
            if begun
            else f"{path} is no result of launch.evaluate and no run: there is no {file.name} in it"
        )
    try:
        found = json.loads(file.read_text())
        return {key: found[key] for key in KEYS}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged or no result of launch.evaluate ({error!r})") from error


def of_run(workdir: Path) -> results.Result:
    """A run's last evaluation."""
    config = json.loads((workdir / "config.json").read_text())
    evaluations = report.read_jsonl(workdir / "evaluations.jsonl")
    if not evaluations:
        raise ValueError(f"{workdir} has no evaluation yet")
    last = evaluations[-1]
    sampling = {key: config["evaluation"][key] for key in ("temperature", "top_p")}
    path = config["task"].get("evaluation_path")
    sets = {protocols.title(path) if path else config["task"]["name"]: last}
    return {
        "name": f"{workdir.name}-{last['step']} (run)",
        "policy": {"name": f"{workdir.name}-{last['step']}", "step": last["step"]},
        "protocol": None,
        "notes": [],
        "sampling": {**sampling, "top_k": 0, "max_tokens": config["sampling"]["max_tokens"]},
        "sets": sets,
        "mean": results.mean_over_sets(sets),
        "ks": [],
    }


if __name__ == "__main__":
    app.run(main)

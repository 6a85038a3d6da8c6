"""How well a process reward model finds the first wrong step: ProcessBench's and FlawedPositiveBench's numbers.

    python -m launch.evaluate_process_model processbench.jsonl.gz --path=Qwen2.5-Math-PRM-7B
    python -m launch.evaluate_process_model processbench.jsonl.gz --path=my-trl-prm --threshold=gsm8k \
        --separator=$'\\n' --no-chat --template=$'{problem}\\n'

A generative critic is evaluated by launch.evaluate; the table is the same.
"""

import argparse
import inspect
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import cli
from tapojax import evaluation, results, resumable
from tapojax.datasets import labelled, reading
from tapojax.judges import classifier, reward_model

AT_A_TIME = 256  # solutions, for a line of progress


def main(arguments: Sequence[str] | None = None):
    args = parse(arguments)
    cli.cache_compilations()
    model = reward_model.load(args.path, **{name: getattr(args, name) for name in reading_options()})
    if not model.process:
        raise ValueError(f"--path={args.path} is an outcome reward model, which scores no steps")
    rows = [row for path in args.data for row in solutions(path)]
    records: list[dict] = []
    for start in range(0, len(rows), AT_A_TIME):
        records += classifier.critic_records(model, rows[start : start + AT_A_TIME])
        print(f"{len(records)} of {len(rows)} solutions", flush=True)
    threshold, records = with_threshold(records, args.threshold)
    write(Path(args.results) / Path(args.path).name, vars(args), threshold, records)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch.evaluate_process_model", description=__doc__.partition("\n")[0])
    parser.add_argument("data", nargs="+", help="solutions in steps with labels, in any layout that prepare_data reads")
    parser.add_argument("--path", required=True, help="folder of the model")
    parser.add_argument(
        "--threshold", default="0.5", help="below it a step is wrong, or the subset on which to find it"
    )
    parser.add_argument("--results", default="results", help="folder to write to")
    for name, default in reading_options().items():
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(default, bool) else {"type": type(default)}
        parser.add_argument(f"--{name}", default=default, **kind)
    return parser.parse_args(arguments)


def reading_options() -> dict[str, Any]:
    """The keyword arguments of reward_model.load with their defaults."""
    parameters = inspect.signature(reward_model.load).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def solutions(path: str) -> Iterator[Mapping[str, Any]]:
    """The solutions of a file whose label is known."""
    for number, row in enumerate(reading.iterate(path), 1):
        found = labelled.critique(row, f"{path}, row {number}", f"{path}/{number}")
        if found["label"] != labelled.UNKNOWN:
            yield found


def with_threshold(records: Sequence[Mapping[str, Any]], asked: str) -> tuple[float, list[dict[str, Any]]]:
    """The threshold and the verdicts under it; `asked` is a number or the subset on which the best one is found.

    Raises:
      ValueError: it is neither.
    """
    try:
        threshold = float(asked)
    except ValueError:
        chosen = [record for record in records if evaluation.subset_of(record) == asked]
        if not chosen:
            names = sorted({evaluation.subset_of(record) for record in records})
            raise ValueError(f"--threshold={asked} is no number and no subset; there are {names}") from None
        threshold = evaluation.critic_threshold(chosen)
    return threshold, [{**r, "predicted": evaluation.first_error(r["step_scores"], threshold)} for r in records]


def write(folder: Path, asked: Mapping[str, Any], threshold: float, records: Sequence[Mapping[str, Any]]):
    table = evaluation.critic_table(records)
    text = results.critic(f"{folder.name}, threshold {threshold:.4g}", table)
    folder.mkdir(parents=True, exist_ok=True)
    found = resumable.plain({"asked": asked, "threshold": threshold, "critic": table})
    (folder / "critic.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    (folder / "critic.md").write_text(text + "\n")
    (folder / "critic.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    print(f"\n{text}\n\nwritten  {folder}/critic.json, critic.md, critic.jsonl")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")

"""From the rows of published files to a set to train or test on, and what there is to know about it."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tapojax.datasets import labelled, overlap, reading, schema, table

Example = dict[str, Any]
RESULT = "result.json"
TIERS = ((0.875, 1.0), (0.625, 0.875), (0.375, 0.625), (0.125, 0.375), (0.0, 0.125))  # PAPO's, each (above, up to]


class Survey(NamedTuple):
    """What was met while reading: rows, different ones, those that come again, and those whose answers differ."""

    rows: int
    different: int
    repeated: int
    contradictory: dict[str, list[str]]  # id of the first row -> the answers


def convert(
    name: str, split: str, paths: Sequence[str | Path], *, unreadable: list[str] | None = None
) -> Iterator[Example]:
    """The examples of a data set's files, in their order.

    Args:
      unreadable: gets the messages of rows that say no problem or answer, which are then left out.

    Raises:
      ValueError: such a row, with its file and place, if nobody collects them; a damaged file.
    """
    dataset = table.get(name)
    given = dict(dataset.answers)
    count = itertools.count()
    for path in paths:
        for number, row in enumerate(reading.iterate(path), 1):
            place, default = f"{path}, row {number}", f"{name}/{split}/{next(count)}"
            if answer := given and given.get(hashlib.sha256(str(row.get("problem", "")).encode()).hexdigest()):
                row = {**row, "answer": answer}
            try:
                yield (labelled.critique if dataset.kind == "steps" else schema.example)(row, place, default)
            except ValueError as error:
                if unreadable is None:
                    raise
                unreadable.append(str(error))


def survey(examples: Iterable[Example], *, deduplicate: bool) -> tuple[list[Example], Survey]:
    """The examples, and what there is of duplicates among them.

    Problems are the same if they are set alike (`overlap.fold`); solutions in steps, if their steps are too.

    Args:
      deduplicate: keep the first row of each problem, and none of a problem whose rows have different answers, as
        nobody knows the right one.
    """
    seen: dict[bytes, tuple[Example, set[str]]] = {}
    everything, rows, repeated = [], 0, set()
    for example in examples:
        rows += 1
        key = hashlib.sha256(_key(example).encode()).digest()
        if key in seen:
            repeated.add(key)
        seen.setdefault(key, (example, set()))[1].add(_verdict(example))
        if not deduplicate:  # a hundred copies of each of many problems need not be in memory
            everything.append(example)
    contradictory = {one["id"]: sorted(answers) for one, answers in seen.values() if len(answers) > 1}
    kept = [one for one, answers in seen.values() if len(answers) == 1] if deduplicate else everything
    return kept, Survey(rows, len(seen), len(repeated), contradictory)


def merged(surveys: Iterable[Survey]) -> Survey:
    """Of several parts, each for itself."""
    rows, different, repeated, contradictory = zip(*surveys, strict=True)
    return Survey(sum(rows), sum(different), sum(repeated), {k: v for one in contradictory for k, v in one.items()})


def _key(example: Example) -> str:
    return "\n".join([overlap.fold(example["problem"]), *example.get("steps", ())])


def _verdict(example: Example) -> str:
    return str(example["label"]) if "label" in example else overlap.said(example["answer"])


def anything(path: str | Path) -> Iterator[Example]:
    """The examples of a file of any layout, problems or solutions in steps."""
    for index, row in enumerate(reading.iterate(path)):
        read = labelled.critique if labelled.holds_steps(row) else schema.example
        yield read(row, f"{path}, row {index + 1}", f"{Path(path).name}/{index}")


def pass_rates(path: str | Path) -> dict[str, float]:
    """Pass rates by the id of their problem, from rows {"id", "pass_rate"} or a result.json of launch.evaluate.

    Raises:
      ValueError: a row without one of the two.
    """
    if Path(path).name == RESULT:
        each = [one["per_problem"] for one in json.loads(Path(path).read_text(encoding="utf-8"))["sets"].values()]
        pairs = [pair for one in each for pair in zip(one["id"], one["correct"], strict=True)]
        return {str(id): float(rate) for id, rate in pairs if rate is not None}
    found = {}
    for number, row in enumerate(reading.iterate(path), 1):
        rate = row.get("pass_rate")
        if "id" not in row or isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
            raise ValueError(f"{path}, row {number}: expected an id and a pass_rate in [0, 1], it has {str(row)[:80]}")
        found[str(row["id"])] = float(rate)
    return found


def count_rated(
    splits: Mapping[str, Sequence[Example]], rates: Mapping[str, float], path: str | Path
) -> dict[str, int]:
    """How many problems of each split have a rate in the file at `path`.

    Raises:
      ValueError: none of any split.
    """
    found = {split: sum(one["id"] in rates for one in examples) for split, examples in splits.items()}
    if not any(found.values()):
        ours = next((one["id"] for examples in splits.values() for one in examples), None)
        raise ValueError(
            f"{path} rates other problems: it has {len(rates)} ids, the first {next(iter(rates), None)!r}, and none is "
            f"of these problems, the first {ours!r}"
        )
    return found


def rated(examples: Iterable[Example], rates: Mapping[str, float]) -> list[Example]:
    """With the pass rates of another file, by id; those without one keep their own."""
    return [{**one, "pass_rate": rates[one["id"]]} if one["id"] in rates else one for one in examples]


def tiered(
    examples: Sequence[Example], *, tiers: Sequence[tuple[float, float]] = TIERS, per_tier: int, seed: int
) -> list[Example]:
    """As many problems of each tier of pass rates, drawn at random; none unsolved, none without a rate.

    PAPO's stratified set: Tan et al., arXiv 2603.26535 (five tiers of 4000, rates of 8 attempts of a reference model).

    Raises:
      ValueError: nothing is rated; a tier has fewer, and then all of them are told.
    """
    if not any("pass_rate" in one for one in examples):
        raise ValueError("no problem has a pass rate, by which tiers are drawn: give them with --pass_rates")
    inside = [[one for one in examples if low < one.get("pass_rate", 0.0) <= high] for low, high in tiers]
    if any(len(members) < per_tier for members in inside):
        counts = ", ".join(f"({low}, {high}]: {len(some)}" for (low, high), some in zip(tiers, inside, strict=True))
        raise ValueError(
            f"a tier of pass rates has fewer than {per_tier} problems: {counts}. Lower --per_tier or rate more problems"
        )
    rng = np.random.default_rng(seed)
    return [members[i] for members in inside for i in sorted(rng.choice(len(members), per_tier, replace=False))]


def verl_row(example: Example, index: int, split: str, *, template: str, source: str, ability: str) -> Example:
    """The example as verl's trainers read it, the template around its problem; `schema` takes the bare one from it.

    Solution and pass rate, where it has them, stay beside verl's fields.
    """
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": template.format(problem=example["problem"].strip())}],
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": example["answer"]},
        "extra_info": {"split": split, "index": index, "question": example["problem"], "id": example["id"]},
        **{key: example[key] for key in ("solution", "pass_rate") if example.get(key, "") != ""},
    }

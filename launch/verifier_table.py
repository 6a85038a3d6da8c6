"""How far the verifier agrees with others: on graded cases, beside math-verify alone, as a table.

    python -m launch.verifier_table ../shared/data/grader_cases

The folder holds any of these files of JSON lines (all but the last may be compressed, .jsonl.gz):

    verdicts            gold, pred, verdict, kind (answer: bare; response: to be found in a text; choice), source, core
    reference_verdicts  gold, pred, mode (answer or response), id, and verdicts: what other graders said
    extraction          text, extracted, source
    normalize           raw, expected, source

A case agrees when the verdict is the expected one: that of the source, or where there is only a panel, that of at least
three of the four graders which compare meaning. The second table lists, one by one, the cases of `core` (those on which
that panel is of one mind) and of the panel where this verifier says otherwise.
"""

import argparse
import collections
import gzip
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tapojax.rewards import answers, pool, spelling

PANEL = ("prm800k", "verl_prime", "qwen", "verl_math_verify")
MAJORITY = 3


class Case(NamedTuple):
    """One row: `expected` is None where the gold answer cannot be read, and so nothing should be said."""

    source: str
    gold: str
    completion: str
    expected: bool | None
    core: bool


def main(arguments: Sequence[str]):
    parser = argparse.ArgumentParser(prog="python -m launch.verifier_table")
    parser.add_argument("folder", type=Path, help="with verdicts.jsonl and its companions")
    parser.add_argument("--deadline_s", type=float, default=8.0, help="of one comparison")
    parser.add_argument("--workers", type=int, default=1, help="processes that compare")
    given = parser.parse_args(arguments)
    if not (folder := given.folder).is_dir():
        sys.exit(f"error: {folder} is no folder: give the one that holds verdicts.jsonl")
    cases = [*verdicts(rows(folder, "verdicts")), *panel(rows(folder, "reference_verdicts"))]
    with pool.Pool(answers.CHECKER, workers=given.workers, memory_mb=1024) as workers:
        ours = answers.grade(
            [case.completion for case in cases],
            [case.gold for case in cases],
            deadline_s=given.deadline_s,
            workers=workers,
        )
    with pool.Pool("launch.verifier_table:math_verify_alone", workers=given.workers, memory_mb=1024) as workers:
        alone = workers.run([[case.gold, case.completion] for case in cases], deadline_s=given.deadline_s)
    theirs = [outcome.value if outcome.error is None else None for outcome in alone]
    print(table(cases, [grade.correct for grade in ours], theirs))
    print(strings("extraction", rows(folder, "extraction"), "text", "extracted", _extracts))
    print(strings("normalize", rows(folder, "normalize"), "raw", "expected", _same_spelling))
    print("\n" + disagreements(cases, ours, theirs))


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    """The rows of folder/name*.jsonl or .jsonl.gz; none where there is no such file."""
    found = []
    for path in sorted([*folder.glob(f"{name}*.jsonl"), *folder.glob(f"{name}*.jsonl.gz")]):
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as lines:
            found += [json.loads(line) for line in lines]
    return found


def verdicts(found: Iterable[dict[str, Any]]) -> Iterator[Case]:
    """Cases of test suites with one gold answer. Choices among letters are other projects' contracts."""
    for row in found:
        if isinstance(row["gold"], str) and row["kind"] != "choice":
            yield Case(row["source"], row["gold"], _completion(row["pred"], row["kind"]), row["verdict"], row["core"])


def panel(found: Iterable[dict[str, Any]]) -> Iterator[Case]:
    """Answers of models, with what three of four graders say of them; where the panel is split nothing is expected."""
    for row in found:
        said = [row["verdicts"].get(name) is True for name in PANEL]
        source = row["id"].split("/")[0]
        if source != "verdict" and max(sum(said), len(PANEL) - sum(said)) >= MAJORITY:
            yield Case(source, row["gold"], _completion(row["pred"], row["mode"]), sum(said) >= MAJORITY, True)


def _completion(prediction: str, kind: str) -> str:
    return rf"\boxed{{{prediction}}}" if kind == "answer" else prediction


def math_verify_alone() -> Callable[[list[str]], bool]:
    """math-verify as its users call it: both texts searched for an answer, a bare gold put into a box."""
    import logging

    import math_verify

    logging.disable(logging.CRITICAL)

    def check(item: list[str]) -> bool:
        gold, completion = item
        boxed = gold if "$" in gold or "boxed" in gold else rf"\boxed{{{gold}}}"
        parsed = [math_verify.parse(text, parsing_timeout=None) for text in (boxed, completion)]
        return bool(math_verify.verify(*parsed, timeout_seconds=None))

    check([r"\frac{1}{2}", "0.5"])
    return check


def table(cases: list[Case], ours: list[bool | None], theirs: list[bool | None]) -> str:
    """Cases, and on how many each of the two agrees, by source and for `core` alone."""
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for case, own, other in zip(cases, ours, theirs, strict=True):
        for name in (case.source, "all"):
            for column in ("", "core ") if case.core else ("",):
                counts[name][f"{column}cases"] += 1
                counts[name][f"{column}ours"] += own == case.expected
                counts[name][f"{column}theirs"] += other == case.expected
            counts[name]["differ"] += own != other
    names = [*sorted(counts.keys() - {"all"}), "all"]
    columns = ("cases", "ours", "theirs", "differ", "core cases", "core ours", "core theirs")
    lines = ["| source | cases | ours agrees | math-verify agrees | the two differ | core | ours | math-verify |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---:|"]
    return "\n".join(
        [*lines, *(f"| {name} | " + " | ".join(str(counts[name][c]) for c in columns) + " |" for name in names)]
    )


def strings(title: str, found: list[dict[str, Any]], given: str, wanted: str, agrees: Callable) -> str:
    """How many strings come out as expected, and which do not."""
    wrong = [row for row in found if not agrees(row[given], row[wanted])]
    lines = [f"\n{title}: {len(found) - len(wrong)} of {len(found)} agree"]
    return "\n".join(
        [*lines, *(f"* {row[given]!r:.70} should be {row[wanted]!r:.40} ({row['source']})" for row in wrong)]
    )


def _extracts(text: str, expected: str | None) -> bool:
    found = answers.extract(text)
    if found is None or expected is None:
        return found == expected
    return _same_spelling(found, answers.extract(expected) or expected)


def _same_spelling(one: str, other: str) -> bool:
    return spelling.alike(spelling.tidy(one), spelling.tidy(other)) or answers.grade([one], [other])[0].correct is True


def disagreements(cases: list[Case], ours: list[answers.Grade], theirs: list[bool | None]) -> str:
    """Those of the core cases, one by one."""
    lines = ["| source | gold | end of the completion | expected | ours | math-verify |", "|---|---|---|---|---|---|"]
    for case, own, other in zip(cases, ours, theirs, strict=True):
        if case.core and own.correct != case.expected:
            end = " ".join(case.completion.split())[-60:].replace("|", r"\|")
            said = f"no verdict ({own.error})" if own.correct is None else own.correct
            lines.append(f"| {case.source} | `{case.gold[:60]}` | `{end}` | {case.expected} | {said} | {other} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])

"""What is in a prepared set: rows, lengths, duplicates, contradictory answers, problems it shares with others."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tapojax.datasets import overlap, preparing

Example = dict[str, Any]
SHOWN = 5  # of each list, in the text; the JSON has all
FIELDS = ("problem", "answer", "solution", "steps")


def describe(
    splits: Mapping[str, Sequence[Example]],
    *,
    rows: Mapping[str, int],
    published: Mapping[str, int | None],
    surveys: Mapping[str, preparing.Survey],
    unreadable: Mapping[str, Sequence[str]],
    rated: Mapping[str, int],
    against: Mapping[str, Sequence[Example]],
    measure: Callable[[str], int],
    unit: str,
) -> dict[str, Any]:
    """Everything about the splits, plain enough for JSON.

    Args:
      splits: their examples, each once.
      rows: written, with the copies of a recipe.
      published: rows of the files as their home says; None: it does not say.
      surveys: what was met while reading.
      unreadable: messages of rows that were left out.
      rated: how many examples a file of pass rates has; empty where there is no such file.
      against: other sets by their name, in which the same problems are looked for; the splits are compared anyway.
      measure: the length of a text, in units of `unit`.
    """
    found: dict[str, Any] = {"unit": unit, "splits": {}, "overlaps": []}
    for split, examples in splits.items():
        met = surveys[split]
        found["splits"][split] = {
            "rows": rows[split],
            "examples": len(examples),
            "read": met.rows,
            "published": published[split],
            "different": met.different,
            "repeated": met.repeated,
            "contradictory": met.contradictory,
            "unreadable": list(unreadable[split]),
            "rated": rated.get(split),
            "lengths": {field: _lengths_of(_texts(examples, field), measure) for field in FIELDS},
        }
    names = list(splits)
    compared = [(a, b, splits[b]) for i, a in enumerate(names) for b in names[i + 1 :]]
    compared += [(a, b, other) for a in names for b, other in against.items()]
    for one, other, examples in compared:
        found["overlaps"].append({"of": one, "with": other} | _shared(overlap.pairs(splits[one], examples)))
    return found


def _shared(pairs: Sequence[overlap.Pair]) -> dict[str, Any]:
    exact = {pair.train for pair in pairs if pair.match == "exact"}
    loose = {pair.train for pair in pairs} - exact
    return {"exact": len(exact), "loose": len(loose), "pairs": [list(pair) for pair in pairs]}


def _lengths_of(texts: Sequence[str], measure: Callable[[str], int]) -> dict[str, int | float] | None:
    """Smallest, median, mean, 95th percentile and largest; None of no texts."""
    found = sorted(measure(text) for text in texts if text)
    if not found:
        return None
    p95 = found[min(len(found) - 1, int(0.95 * len(found)))]
    return {
        "min": found[0],
        "median": statistics.median(found),
        "mean": round(statistics.fmean(found), 1),
        "p95": p95,
        "max": found[-1],
    }


def _texts(examples: Sequence[Example], field: str) -> list[str]:
    values = [example.get(field, "") for example in examples]
    return ["\n\n".join(value) if isinstance(value, list) else value for value in values]


def text(found: Mapping[str, Any], title: str) -> str:
    """The report as Markdown."""
    lines = [f"# {title}", ""]
    for split, about in found["splits"].items():
        lines += [f"## {split}: {about['rows']:,} rows", "", *_counts(about), "", *_lengths(about, found["unit"]), ""]
    for pair in found["overlaps"]:
        lines.append(
            f"- {pair['exact']:,} of {pair['of']} are in {pair['with']} word for word, {pair['loose']:,} more in other "
            f"spelling{_some(f'{a} = {b}' for a, b, _ in pair['pairs'])}"
        )
    return "\n".join(lines).rstrip() + "\n"


def _counts(about: Mapping[str, Any]) -> list[str]:
    published = about["published"]
    differ = "" if published in (None, about["read"]) else f", not the {published:,} that are published"
    lines = [
        f"- read {about['read']:,} rows{differ}: {about['different']:,} different ones, {about['examples']:,} kept"
    ]
    if about["repeated"]:
        lines.append(f"- {about['repeated']:,} come more than once")
    if about["unreadable"]:
        lines.append(f"- {len(about['unreadable']):,} more are left out as unreadable{_some(about['unreadable'])}")
    if about["rated"] is not None:
        lines.append(f"- {about['rated']:,} are in the file of pass rates")
    if wrong := about["contradictory"]:
        told = _some(f"{id}: {' or '.join(answers)}" for id, answers in wrong.items())
        lines.append(f"- {len(wrong):,} come with different answers{told}")
    return lines


def _lengths(about: Mapping[str, Any], unit: str) -> list[str]:
    lines = [f"| {unit} | min | median | mean | p95 | max |", "|---|---:|---:|---:|---:|---:|"]
    for field, found in about["lengths"].items():
        if found:
            lines.append(f"| {field} | " + " | ".join(f"{value:,}" for value in found.values()) + " |")
    return lines


def _some(items) -> str:
    items = list(items)
    more = f", and {len(items) - SHOWN:,} more" if len(items) > SHOWN else ""
    return f" ({'; '.join(items[:SHOWN])}{more})" if items else ""

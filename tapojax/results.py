"""Results of evaluations as tables for people: one by itself, and several beside each other.

A result is what launch.evaluate leaves in result.json. Two results of a set are compared problem by problem, where the
digests of their problems say that they are the same; the interval of a difference is over problems.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from tapojax import evaluation, resumable
from tapojax.evaluation import Estimate
from tapojax.report import estimate_text

Result = Mapping


def mean_over_sets(sets: Mapping[str, Mapping]) -> dict:
    """The unweighted mean over sets of avg@k and its interval."""
    rates = [[np.nan if v is None else v for v in found["pass@1"].values()] for found in sets.values()]
    return evaluation.mean_of_sets([Estimate(*rate) for rate in rates])._asdict()


# ---- one result


def table(result: Result) -> str:
    """Markdown: rates of each set, then its completions, its other score channels, and what to know of them."""
    sets = result["sets"]
    parts = [heading(result), rates(result), completions(sets)]
    if names := channels(sets):
        rows = [[name, *(_number(found.get(f"mean_{key}")) for key in names)] for name, found in sets.items()]
        parts.append(markdown(["mean of", *names], rows))
    for name, found in sets.items():
        for key, whose in (("critic", "all samples"), ("critic_vote", "votes")):
            parts += [critic(f"{name}, {whose}", found[key])] if key in found else []
    parts += ["\n".join(f"- {note}" for note in result["notes"])] if result["notes"] else []
    return "\n\n".join(parts)


def heading(result: Result) -> str:
    """What was evaluated, and how."""
    protocol, policy = result["protocol"], result["policy"]["name"]
    named = f"**{result['name']}**" + (f": {policy}" if policy != result["name"] else "")
    lines = [f"{named}, {_how(result)}"]
    if protocol:
        lines.append(f"protocol {protocol['name']}: {protocol['headline']} ({protocol['source']})")
    return "\n\n".join(lines)


def _how(result: Result) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in result["sampling"].items())


def rates(result: Result) -> str:
    """avg@k, pass@k and maj@k with their 95 % intervals; avg@k is pass@1 of its unbiased estimator."""
    sets, rows = result["sets"], []
    extra = [k for k in result["ks"] if k != 1 and any(k != found["samples"] for found in sets.values())]
    for name, found in sets.items():
        n = found["samples"]
        middle = [estimate_text(found[f"pass@{k}"]) for k in extra]
        ends = [estimate_text(found[f"pass@{n}"]), estimate_text(found[f"maj@{n}"])] if n > 1 else ["", ""]
        rows.append([name, str(found["problems"]), str(n), estimate_text(found["pass@1"]), *middle, *ends])
    if len(sets) > 1:
        mean = [f"mean of {len(sets)} sets", "", "", estimate_text(result["mean"])]
        rows.append([*mean, *[""] * (len(extra) + 2)])
    titles = ["set", "problems", "k", "avg@k", *(f"pass@{k}" for k in extra), "pass@k", "maj@k"]
    return markdown(titles, rows)


def completions(sets: Mapping[str, Mapping]) -> str:
    """Lengths in tokens, shares that were cut off and that an answer was read from, failures to score, time."""
    rows = [[name, *_of_completions(found)] for name, found in sets.items()]
    return markdown(["set", *COMPLETION_TITLES], rows)


COMPLETION_TITLES = ["length mean", "median", "95th %", "truncated", "answered", "not scored", "seconds", "tokens/s"]


def _of_completions(found: Mapping) -> list[str]:
    lengths = [_number(found.get(f"{key}_length"), "{:.1f}") for key in ("mean", "median", "p95")]
    shares = [_number(found.get(key)) for key in ("truncated", "answered")]
    seconds = sum(found["seconds"].values()) if "seconds" in found else None
    speed = _number(found.get("tokens_per_second"), "{:.0f}")
    return [*lengths, *shares, str(found["errors"]), _number(seconds, "{:.1f}"), speed]


def channels(sets: Mapping[str, Mapping]) -> list[str]:
    """Score channels beside correctness."""
    found = [key.removeprefix("mean_") for s in sets.values() for key in s if key.startswith("mean_")]
    return [key for key in dict.fromkeys(found) if key != "length"]


CRITIC = ("rows", "erroneous", "correct", "process_f1", "precision", "recall", "f1", "accuracy", "no_verdict")


def critic(title: str, found: Mapping) -> str:
    """How well flaws are found, subset by subset; columns as in evaluation.critic_table."""
    average = {"average of subsets": found["average"]} if len(found["subsets"]) > 1 else {}
    whole = {"all rows": found["pooled"], "right final answers": found["flawed_positives"]}
    rows = [
        [name, str(row.get("rows", "")), *(_number(row[key]) for key in CRITIC[1:])]
        for name, row in {**found["subsets"], **average, **whole}.items()
        if row.get("rows") != 0
    ]
    return markdown([title, *CRITIC], rows)


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; every column as wide as its widest cell, so that it can be read as text too."""
    widths = [max(len(row[i]) for row in [titles, *rows]) for i in range(len(titles))]

    def line(cells, align=str.ljust):
        return "| " + " | ".join(align(cell, width) for cell, width in zip(cells, widths, strict=True)) + " |"

    ruler = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(titles), ruler, *map(line, rows)])


def _number(value: float | None, form: str = "{:.3f}") -> str:
    return "" if value is None or value != value else form.format(value)


# ---- several results


def compare(found: Sequence[Result]) -> dict:
    """Each set of several results, with differences to the first where the problems are the same.

    Returns results (their names), sets -> {values, differences}, one a result, None where there is none; mean -> the
    same over the sets that can be compared, or None; notes: what was not compared or not done equally, and why.

    A result without numbers by problem, a run's own, has values and no differences.

    Raises:
      ValueError: fewer than two results, or no set is in the first and another one with the same problems.
    """
    if len(found) < 2:
        raise ValueError("one result alone cannot be compared: name another one")
    labels, sets, notes = [result["name"] for result in found], {}, settings_that_differ(found)
    for name in _set_names(found):
        sets[name], said = _compare_set(name, found, labels)
        notes += said
    others = [i for i in range(1, len(found)) if any(entry["differences"][i] for entry in sets.values())]
    if not others and not any(_lacks_problems(name, found) for name in sets):
        raise ValueError("no set can be compared: " + "; ".join(notes))
    shared = [name for name, entry in sets.items() if all(entry["differences"][i] for i in others)]
    mean = _compare_means(found, {name: sets[name] for name in shared}, others) if others and len(shared) > 1 else None
    return resumable.plain({"results": labels, "sets": sets, "mean": mean, "notes": notes})


def _set_names(found: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(name for result in found for name in result["sets"]))


def _lacks_problems(name: str, found: Sequence[Result]) -> bool:
    """Whether a set of the first and another result has no numbers by problem in one, and so no difference."""
    values = [result["sets"][name] for result in found if name in result["sets"]]
    return name in found[0]["sets"] and len(values) > 1 and any("per_problem" not in value for value in values)


def _compare_set(name: str, found: Sequence[Result], labels: Sequence[str]) -> tuple[dict, list[str]]:
    """Values and differences of one set, and a note on each result that cannot be compared with the first."""
    values = [result["sets"].get(name) for result in found]
    differences, notes = list[dict | None]([None] * len(found)), []
    if lacking := [label for label, value in zip(labels, values, strict=True) if value is None]:
        notes.append(f"{name} is not in {', '.join(lacking)}")
    for i, value in enumerate(values):
        if value is not None and "per_problem" not in value:
            notes.append(f"{name}: {labels[i]} has no numbers by problem; use launch.evaluate")
        elif i and value is not None and values[0] is not None and "per_problem" in values[0]:
            if value["data"]["problems"] == values[0]["data"]["problems"]:
                rates = [np.array(v["per_problem"]["correct"], float) for v in (value, values[0])]
                differences[i] = evaluation.paired_difference(*rates)._asdict()
            else:
                notes.append(f"{name}: {labels[i]} has other problems than {labels[0]}, {_overlap(values[0], value)}")
    return {"values": [value and value["pass@1"] for value in values], "differences": differences}, notes


def _overlap(first: Mapping, other: Mapping) -> str:
    a, b = (found["per_problem"]["id"] for found in (first, other))
    return f"{len(b)} against {len(a)}, {len(set(a) & set(b))} ids in both: not compared"


def _compare_means(found: Sequence[Result], sets: Mapping[str, Mapping], others: Sequence[int]) -> dict:
    """The unweighted means over sets that the first result and the others have, and their differences."""
    values, differences = list[dict | None]([None] * len(found)), list[dict | None]([None] * len(found))
    for i in [0, *others]:
        values[i] = mean_over_sets({name: found[i]["sets"][name] for name in sets})
    for i in others:
        each = [Estimate(**entry["differences"][i]) for entry in sets.values()]
        differences[i] = evaluation.mean_of_sets(each)._asdict()
    return {"sets": list(sets), "values": values, "differences": differences}


def settings_that_differ(found: Sequence[Result]) -> list[str]:
    """What was not the same, other than the policy: sampling, protocol."""
    said = {key: [str(result["sampling"][key]) for result in found] for key in found[0]["sampling"]}
    said["protocol"] = [result["protocol"]["name"] if result["protocol"] else "none" for result in found]
    return [f"{key} differs: {', '.join(values)}" for key, values in said.items() if len(set(values)) > 1]


def comparison_table(found: Sequence[Result], compared: Mapping) -> str:
    """Markdown: avg@k side by side with differences to the first, the completions of each, and what to know."""
    names = compared["results"]
    titles = ["avg@k", "problems", "k", *names, *(f"{name} - {names[0]}" for name in names[1:])]
    rows = [
        [name, _all(found, name, "problems"), _all(found, name, "samples"), *_cells(entry)]
        for name, entry in compared["sets"].items()
    ]
    if compared["mean"]:
        rows.append([f"mean of {', '.join(compared['mean']['sets'])}", "", "", *_cells(compared["mean"])])
    each = [
        [name, result["name"], *_of_completions(result["sets"][name])]
        for name in compared["sets"]
        for result in found
        if name in result["sets"]
    ]
    notes = [
        f"sampled with {_how(found[0])}",
        "differences are paired by problem, their 95 % intervals are over problems; * where 0 is outside",
        *compared["notes"],
        *_notes(found),
    ]
    bullets = "\n".join(f"- {note}" for note in notes)
    return "\n\n".join([markdown(titles, rows), markdown(["set", "result", *COMPLETION_TITLES], each), bullets])


def _notes(found: Sequence[Result]) -> list[str]:
    """Those of the results, each once, with the names of the results where not all have it."""
    said = dict.fromkeys(note for result in found for note in result["notes"])
    whose = {note: [result["name"] for result in found if note in result["notes"]] for note in said}
    return [note if len(names) == len(found) else f"{', '.join(names)}: {note}" for note, names in whose.items()]


def _all(found: Sequence[Result], name: str, key: str) -> str:
    """What the results say of a set: one number where they agree."""
    return "/".join(dict.fromkeys(str(result["sets"][name][key]) for result in found if name in result["sets"]))


def _cells(entry: Mapping) -> list[str]:
    values = [estimate_text(value) if value else "" for value in entry["values"]]
    return [*values, *(_difference_text(value) for value in entry["differences"][1:])]


def _difference_text(value: Mapping | None) -> str:
    """Empty where nothing can be compared; a note says why."""
    if value is None or value["mean"] is None:
        return ""
    clear = "*" if value["low"] > 0 or value["high"] < 0 else ""
    return f"{value['mean']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]{clear}"

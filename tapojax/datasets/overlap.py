r"""The same problem in two places: exactly, but for the way it is set, or loosely, but with the same answer.

Rewritten problems (other numbers, other words) are not found this way.
"""

import fractions
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tapojax.rewards import spelling

Example = Mapping[str, Any]
FRACTION = re.compile(r"\\[dt]frac(?![a-z])")
SETTING = re.compile(r"[\s$~]+|\\[,;:! \[\]()]|\\q?quad(?![a-z])")
NO_WORD = re.compile(r"[\W_]+")
NUMBER = re.compile(
    r"([-+]?)(?:(\d{1,999}(?:\.\d{1,999})?)|(\d{1,999})/(\d{1,999})|\\frac\{(\d{1,999})\}\{(\d{1,999})\})"
)
SHORT = 20  # letters and digits: such texts are alike by accident


class Pair(NamedTuple):
    train: str  # ids
    test: str
    match: str  # exact or loose


def fold(text: str) -> str:
    r"""A text without what only sets it: spaces, marks of formulas, `\dfrac` for `\frac`, the last full stop."""
    return SETTING.sub("", FRACTION.sub(r"\\frac", text)).rstrip(".")


def loose(folded: str) -> str:
    """Letters and digits alone, of a folded text."""
    return NO_WORD.sub("", folded).lower()


@functools.lru_cache(maxsize=2**16)  # sets have many copies
def said(answer: str) -> str:
    """An answer in one spelling: the value of a number or ratio, the key of anything else."""
    key = spelling.key(spelling.tidy(answer))
    match = NUMBER.fullmatch(key)
    number = "/".join(filter(None, match.groups()[1:])) if match else ""
    try:
        return str(fractions.Fraction(match[1] + number)) if match else key or fold(answer)
    except ZeroDivisionError:
        return key


def pairs(train: Iterable[Example], test: Iterable[Example]) -> list[Pair]:
    """Problems of train that are in test, each pair of ids once: exact, or loose with answers spelled alike."""
    exactly: dict[str, list[Example]] = {}
    loosely: dict[str, list[Example]] = {}
    for example in test:
        folded = fold(example["problem"])
        exactly.setdefault(folded, []).append(example)
        loosely.setdefault(loose(folded), []).append(example)
    found: dict[tuple[str, str], str] = {}
    for example in train:
        folded = fold(example["problem"])
        for other in exactly.get(folded, []):
            found.setdefault((example["id"], other["id"]), "exact")
        text = loose(folded)
        for other in loosely.get(text, []) if len(text) >= SHORT else []:
            if _agree(example, other):
                found.setdefault((example["id"], other["id"]), "loose")
    return [Pair(*ids, match) for ids, match in found.items()]


def _agree(one: Example, other: Example) -> bool:
    """A solution in steps may come without an answer."""
    ours, theirs = one.get("answer"), other.get("answer")
    return not (ours and theirs) or spelling.alike(spelling.tidy(ours), spelling.tidy(theirs))

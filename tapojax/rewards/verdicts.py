r"""What a judge's reply says. A reply without a legible verdict is None: the judge failed, which is no verdict of 0."""

import re

from tapojax.rewards import spans

TAIL = 300  # characters of a critique in which its verdict must stand
INTEGER = re.compile(r"\s*[-+]?[0-9]+\s*")
LEVELS = (0.0, 0.5, 1.0)
POINTS = re.compile(r"<points>\s*([0-9]+)\s*out\s+of\s+7\s*</points>")
GRADE = re.compile(r"\bfinal grade\W{0,8}(correct|incorrect)\b", re.IGNORECASE)
SCORE_IS = re.compile(r"[Ss]core\s*(?:is(?:\s*:)?|:)\s*([0-9]+\.?[0-9]*|\.[0-9]+)")


def parse(text: str, num_steps: int) -> int | None:
    r"""Index of the first wrong one of `num_steps` steps, -1 for none: the integer in the last balanced `\boxed{}`.

    Only the last 300 characters are read. Signs, leading zeros and spaces around are fine; `3.0`, `- 1`, `\text{3}` and
    an index outside [-1, num_steps) are not. Source: FAPO, arXiv 2510.22543, as its code reads critiques in training
    (yyDing1/FAPO). When it judges solutions that code takes any integer, and evaluates the box as Python in one
    version; ours is strict in both places, and what has no verdict is None where the code says "not flawed".
    """
    tail = text[-TAIL:]
    begin, end = spans.boxed(tail, 0) or (0, 0)
    if not tail[:begin].endswith(r"\boxed{") or not INTEGER.fullmatch(tail, begin, end):
        return None
    index = int(tail[begin:end])
    return index if -1 <= index < num_steps else None


def answered(text: str) -> str | None:
    """What follows the last `</think>`; None while a `<think>` is open."""
    reply = text.rpartition("</think>")[2]
    return None if "<think>" in reply else reply


def parse_rubric(text: str) -> float | None:
    r"""The mark a rubric judge gave, 0, 0.5 or 1: in the last balanced `\boxed{}`, else behind the first "score is|:".

    Only what follows the last `</think>` counts; while a `<think>` is open nothing counts. Any other number is no mark.
    Source: PAPO, arXiv 2603.26535, and its code (tanzelin430/PAPO), where a reply without a mark counts as 0.
    """
    if (reply := answered(text)) is None:
        return None
    begin, end = spans.boxed(reply, 0) or (0, 0)
    spoken = SCORE_IS.search(reply)
    marks = [_mark(reply[begin:end]), _mark(spoken[1]) if spoken else None]
    return next((mark for mark in marks if mark is not None), None)


def _mark(text: str) -> float | None:
    try:
        return float(text) if float(text) in LEVELS else None
    except ValueError:
        return None


def parse_points(text: str) -> int | None:
    """The points from 0 to 7 in the last `<points>N out of 7</points>`, behind the thoughts.

    Source: the mark sheets of IMO-Bench as PAPO's code reads them; there a number anywhere is taken for the points, one
    above 7 or a fraction too, and a reply without any counts as 0.
    """
    found = POINTS.findall(answered(text) or "")
    return int(found[-1]) if found and len(found[-1]) == 1 and int(found[-1]) <= 7 else None


def parse_grade(text: str) -> bool | None:
    """Whether the reply closes with "Final Grade: CORRECT", False for INCORRECT; it must not say both.

    Source: the answer judge of PAPO's code, where a mere "correct" will do, and no grade counts as incorrect.
    """
    found = {grade.lower() for grade in GRADE.findall(answered(text) or "")}
    return found == {"correct"} if len(found) == 1 else None

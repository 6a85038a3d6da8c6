r"""What a judge's reply says. A reply without a legible verdict is None: the judge failed, which is no verdict of 0."""

import re

from tapojax.rewards import spans

TAIL = 300  # characters of a critique in which its verdict must stand
INTEGER = re.compile(r"\s*[-+]?[0-9]+\s*")
LEVELS = (0.0, 0.5, 1.0)
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


def parse_rubric(text: str) -> float | None:
    r"""The mark a rubric judge gave, 0, 0.5 or 1: in the last balanced `\boxed{}`, else behind the first "score is|:".

    Only what follows the last `</think>` counts; while a `<think>` is open nothing counts. Any other number is no mark.
    Source: PAPO, arXiv 2603.26535, and its code (tanzelin430/PAPO), where a reply without a mark counts as 0.
    """
    reply = text.rpartition("</think>")[2]
    if "<think>" in reply:
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

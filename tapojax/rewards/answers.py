r"""The verifier of final answers: finds the answer in a completion and compares it with the gold answer.

Right, wrong and "no verdict" are kept apart. A completion that gives no answer is wrong, and so is an answer that is
not mathematics or is as long as a text. A comparison that hangs, crashes or runs out of memory has no verdict but an
error, and so has a gold answer that cannot be read: such a row gets no score, never a zero.

The comparison goes from cheap and safe to dear and dangerous: the same spelling (`spelling`), exact rational numbers,
then math-verify in a worker process under a deadline (`equality`, `pool`).
"""

import decimal
import fractions
import itertools
import os
import re
import threading
from collections.abc import Sequence
from typing import NamedTuple

from tapojax.rewards import pool, spans, spelling

CHECKER = "tapojax.rewards.equality:checker"
# MATH, OlympiadBench and Minerva stay below 210 characters and depth 5; parsers take time exponential in the depth
MAX_LENGTH = 1000  # characters
MAX_DEPTH = 12  # brackets within brackets
MAX_WORDS = 3  # a gold answer of more words is a sentence, and has more than one right wording
INTEGER = re.compile(r"[-+]?\d+")
RATIO = re.compile(r"([-+]?)(?:(\d+) ?/ ?(\d+)|\\frac ?\{([-+]?\d+)\} ?\{(\d+)\})")
TOWER = re.compile(r"\d+(?: ?\^ ?(?:\{ ?)?\d+)+[ }]*")
UNREADABLE = re.compile(r"[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")  # and writing backwards
DECIMAL = re.compile(r"([-+]?\d*\.?\d+)(?: ?\\(?:times|cdot) ?10 ?\^ ?(?:\{ ?)?([-+]?\d{1,15})[ }]*)?")
# 10^(10^18) is the largest number it holds; above is infinity
HUGE = decimal.Context(prec=30, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN, traps=[])

_shared: dict[int, pool.Pool] = {}  # by process id: a forked child makes its own
_shared_lock = threading.Lock()


class Grade(NamedTuple):
    """The verdict on one completion: `correct` is None exactly where `error` says why there is none."""

    correct: bool | None
    error: str | None


def extract(text: str, *, side_by_side: bool = False) -> str | None:
    """The final answer of a completion, never empty, or None when it gives none; `spans.find` says where it is."""
    if (span := spans.find(text, side_by_side=side_by_side)) is None:
        return None
    answer = re.sub(r"<<[^<>]*>>", "", spans.join(text[slice(*span)])).strip()
    behind_hashes = text[max(0, span[0] - 100) : span[0]].rstrip().endswith("####")
    money = behind_hashes and re.fullmatch(r"[-+$€£\d.,/]*", answer)
    return (re.sub(r"[$€£,]", "", answer) if money else answer) or None


def grade(
    completions: Sequence[str],
    answers: Sequence[str],
    *,
    deadline_s: int | float = 5.0,
    workers: pool.Pool | None = None,
) -> list[Grade]:
    r"""Grades each completion against the gold answer at its place.

    Boxes side by side are one answer, a list: whoever writes `\boxed{1}, \boxed{2}` for 2 is wrong.
    A gold answer is a string such as `1,234`, `\frac{1}{2}` or `336^\circ`, or a solution with a `\boxed{}` or `####`.
    `deadline_s` bounds one comparison, from the moment a worker begins it; equal pairs are compared once.
    `workers` is a pool over `CHECKER`; by default the program shares one, started when first needed.

    Raises:
      ValueError: the lists differ in length, or hold something that is not a string.
      RuntimeError: no worker process can be started.
    """
    if len(completions) != len(answers):
        raise ValueError(
            f"{len(completions)} completions but {len(answers)} gold answers; give one gold answer for each"
        )
    for index, text in enumerate(itertools.chain(completions, answers)):
        if not isinstance(text, str):
            name = f"completion {index}" if index < len(answers) else f"gold answer {index - len(answers)}"
            raise ValueError(f"{name} is {text!r:.80}, a {type(text).__name__}; convert it to a string first")
    given = [extract(completion, side_by_side=True) for completion in completions]
    pairs = list(zip(given, answers, strict=True))
    compared = {pair: _compare_spelling(*pair) for pair in dict.fromkeys(pairs)}
    items = {pair: item for pair, item in compared.items() if not isinstance(item, Grade)}
    grades = {pair: verdict for pair, verdict in compared.items() if isinstance(verdict, Grade)}
    if items:
        outcomes = (workers or shared_pool()).run(list(items.values()), deadline_s=deadline_s)
        grades |= {pair: Grade(*outcome) for pair, outcome in zip(items, outcomes, strict=True)}
    return [grades[pair] for pair in pairs]


def shared_pool() -> pool.Pool:
    """The program's pool of answer checkers: up to four workers, one core left to the program."""
    with _shared_lock:
        if os.getpid() not in _shared:
            workers = max(1, min(4, (os.cpu_count() or 2) - 1))
            _shared[os.getpid()] = pool.Pool(CHECKER, workers=workers, memory_mb=2048)
        return _shared[os.getpid()]


def _compare_spelling(prediction: str | None, gold: str) -> Grade | tuple[list[str], str]:
    """The verdict if it can be had without mathematics, else the gold answers and the prediction for `equality`."""
    if prediction is None or not _plausible(prediction):
        return Grade(False, None)
    gold_answer = extract(gold, side_by_side=True) or gold if "boxed" in gold or "####" in gold else gold
    if not _plausible(gold_answer):
        return Grade(
            None,
            f"gold answer {gold_answer[:50]!r}... is over {MAX_LENGTH} characters or depth {MAX_DEPTH}, or not text",
        )
    tidied, tidy_gold = spelling.tidy(prediction), spelling.tidy(gold_answer)
    if not tidy_gold:
        return Grade(None, f"gold answer {gold!r} is empty")
    if not tidied or spelling.alike(tidy_gold, tidied):
        return Grade(bool(tidied), None)
    if spelling.is_literal(tidy_gold):
        sentence = f"gold answer {gold_answer!r} is a sentence: other words may mean the same"
        return Grade(None, sentence) if len(tidy_gold.split()) > MAX_WORDS else Grade(False, None)
    # 10% is 10, and 0.1 too if the prediction bears no percent sign
    as_fraction = "%" in gold_answer and "%" not in prediction
    golds = [tidy_gold, rf"\frac{{{tidy_gold}}}{{100}}"] if as_fraction else [tidy_gold]
    value, gold_values = _rational(tidied), [_rational(text) for text in golds]
    if value is not None and None not in gold_values:
        return Grade(value in gold_values, None)
    return Grade(False, None) if all(_sizes_differ(tidied, text) for text in golds) else (golds, tidied)


def _plausible(answer: str) -> bool:
    if UNREADABLE.search(answer):
        return False
    depths = itertools.accumulate((c in "([{") - (c in ")]}") for c in answer[:MAX_LENGTH])
    return len(answer) <= MAX_LENGTH and max(depths, default=0) <= MAX_DEPTH


def _rational(tidied: str) -> fractions.Fraction | None:
    """The value of an integer or a ratio of integers, None for anything else."""
    if INTEGER.fullmatch(tidied):
        return fractions.Fraction(int(tidied))
    if not (match := RATIO.fullmatch(tidied)):
        return None
    sign, numerator, denominator = match[1] or "+", int(match[2] or match[4]), int(match[3] or match[5])
    return fractions.Fraction(int(f"{sign}1") * numerator, denominator) if denominator else None


def _sizes_differ(a: str, b: str) -> bool:
    """Whether both are numbers of different size, one of them a power, such as 9^9^9 that no worker could write out."""
    one, other = (_size(text) for text in (a, b)) if "^" in a + b else (None, None)
    if one is None or other is None:
        return False
    small, large = sorted((one, other))
    far = large.is_infinite() or HUGE.subtract(large, small) > HUGE.multiply(large, decimal.Decimal("1e-9"))
    return small.is_finite() and far


def _size(tidied: str) -> decimal.Decimal | None:
    """The value of a rational number, a power of ten or a tower of integers to 30 digits, None for anything else."""
    if TOWER.fullmatch(tidied):
        value = decimal.Decimal(1)
        for base in reversed(re.findall(r"\d+", tidied)):
            value = HUGE.power(HUGE.create_decimal(base), value)
        return None if value.is_nan() else value
    if match := DECIMAL.fullmatch(tidied):
        return HUGE.create_decimal(f"{match[1]}e{match[2] or 0}")
    if (ratio := _rational(tidied)) is None:
        return None
    return HUGE.divide(HUGE.create_decimal(ratio.numerator), HUGE.create_decimal(ratio.denominator))

"""Exact checker of the arithmetic gym: which steps of a completion are right, and is the answer right for them.

A completion is `step,step,...#answer`; a step is an equation `terms=number` over plain integers. The problem prescribes
one derivation (`gym_solutions.solve`). A written step is RIGHT when its equation is true and it states a prescribed
step that comes after the last one rightly stated. So:

- a wrong result, a wrong digit or carry, and a true equation that this problem does not call for are wrong steps;
- a step that builds on an earlier wrong one is wrong too, unless the true derivation needs it as it stands;
- a step repeated or written out of order is wrong; a step left out is no wrong step, but is missing from `process`;
- a mistake that is then put right stays a wrong step, and text that is no equation (or an empty step) is one as well;
- the order of terms and of factors is free: 6+7+0=13 states 7+6+0=13.

Nothing a model can write raises an error, and the time is linear in the length of the completion.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from tapojax.tasks import gym_solutions

MAX_STEPS = 256  # text beyond this many steps counts as one more wrong step
MAX_STEP_CHARACTERS = 64

_NUMBER = r"(?:0|[1-9][0-9]{0,11})"
_STEP = re.compile(rf"({_NUMBER}(?:[+*-]{_NUMBER})+)=({_NUMBER})")
_ANSWER = re.compile(r"0|-?[1-9][0-9]*")

Terms = tuple[tuple[bool, tuple[int, ...]], ...]  # (is subtracted, factors) of each term
Equation = tuple[Terms, int]


class StepVerdict(NamedTuple):
    """One written step: `true` says the equation holds, `right` that the problem also calls for it here."""

    text: str
    true: bool
    right: bool


class Verdict(NamedTuple):
    """What a completion is worth.

    correct      the answer is right
    steps        one verdict per written step
    process      right steps / max(prescribed steps, written steps), in [0, 1]: the share of the prescribed steps that
                 were done rightly, diluted by steps in excess so that writing out every guess cannot pay
    flawed       the answer is right although a written step is wrong: right by luck (FAPO's flawed positive)
    unsupported  the answer is right, no written step is wrong, but prescribed steps are missing: an immediate answer
                 is correct and unsupported with process 0, not flawed
    format_ok    every step is an equation (true or not) and exactly one '#' precedes a plain integer; zero steps pass
    """

    correct: bool
    steps: tuple[StepVerdict, ...]
    process: float
    flawed: bool
    unsupported: bool
    format_ok: bool


def extract(completion: str) -> str | None:
    """The text after the last '#' if it is a plain integer (no spaces, leading zeros or trailing text), else None."""
    _, marker, answer = completion.rpartition("#")
    return answer if marker and _ANSWER.fullmatch(answer) else None


def check(problem: str, completion: str) -> Verdict:
    """Judge `completion` against the derivation that `problem` prescribes; the module docstring has the rules.

    A hinted rollout is judged as `hint + completion`. Raises ValueError when `problem` is no problem of the gym.
    """
    solution = gym_solutions.solve(problem)
    answer = extract(completion)
    parsed = [(text, _parse(text)) for text in _written_steps(completion)]
    steps = _judge([_terms(step.partition("=")[0]) for step in solution.steps], parsed)
    right = sum(step.right for step in steps)
    correct = answer == solution.answer
    flawed = correct and right < len(steps)
    return Verdict(
        correct=correct,
        steps=steps,
        process=right / max(len(solution.steps), len(steps)),
        flawed=flawed,
        unsupported=correct and not flawed and right < len(solution.steps),
        format_ok=answer is not None and all(equation is not None for _, equation in parsed),
    )


def first_error(problem: str, completion: str) -> int:
    """Index of the first wrong step; the number of steps if only the answer is wrong or absent; -1 if nothing is wrong.

    The convention of step-level critics (ProcessBench, Zheng et al., arXiv 2412.06559): steps count from 0, and the
    answer is the paragraph after the last step. Steps left out are not errors.
    """
    verdict = check(problem, completion)
    wrong = [index for index, step in enumerate(verdict.steps) if not step.right]
    return wrong[0] if wrong else -1 if verdict.correct else len(verdict.steps)


def score(examples: Sequence[Mapping[str, Any]], completions: Sequence[str]) -> dict[str, Float32[np.ndarray, "B"]]:
    """Score channels "correct", "process", "flawed", "format" of `completions`, aligned with their `examples`."""
    if len(examples) != len(completions):
        raise ValueError(
            f"{len(examples)} examples for {len(completions)} completions; repeat each example group_size times"
        )
    verdicts = [check(example["problem"], text) for example, text in zip(examples, completions, strict=True)]
    return {
        "correct": np.array([verdict.correct for verdict in verdicts], np.float32),
        "process": np.array([verdict.process for verdict in verdicts], np.float32),
        "flawed": np.array([verdict.flawed for verdict in verdicts], np.float32),
        "format": np.array([verdict.format_ok for verdict in verdicts], np.float32),
    }


def _written_steps(completion: str) -> list[str]:
    """The steps before the last '#' (all of the text when there is none)."""
    before, marker, after = completion.rpartition("#")
    text = before if marker else after
    return text.split(",", MAX_STEPS) if text else []


def _terms(side: str) -> Terms:
    """Normal form of a sum of products: signed terms in order, each with its factors in order."""
    products = re.findall(r"([+-]?)([0-9*]+)", side)
    return tuple(sorted((sign == "-", tuple(sorted(map(int, product.split("*"))))) for sign, product in products))


def _value(terms: Terms) -> int:
    return sum(-math.prod(factors) if negative else math.prod(factors) for negative, factors in terms)


def _parse(step: str) -> Equation | None:
    """Left side in normal form and right side of an equation, or None if the text is no equation."""
    match = _STEP.fullmatch(step) if len(step) <= MAX_STEP_CHARACTERS else None
    return (_terms(match[1]), int(match[2])) if match else None


def _judge(required: list[Terms], written: list[tuple[str, Equation | None]]) -> tuple[StepVerdict, ...]:
    """Walk the prescribed steps with a pointer that only moves forward, past each step rightly stated."""
    verdicts, position = [], 0
    for text, equation in written:
        true = right = False
        if equation is not None:
            terms, result = equation
            true = _value(terms) == result
            right = true and terms in required[position:]
            position = required.index(terms, position) + 1 if right else position
        verdicts.append(StepVerdict(text, true, right))
    return tuple(verdicts)

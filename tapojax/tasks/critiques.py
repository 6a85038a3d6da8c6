"""Critiques of gym solutions as a Task: what a generative reward model is trained on (FAPO, arXiv 2510.22543).

A problem is a gym problem with a written solution whose answer is right and one of whose steps may be wrong:

    57+86?7+6+0=13,5+8+1=15#143;

The critic works out each step, writes T where the solution has it so and F at the first character where it has not, and
closes with the index of that step, or -1 where all are right:

    7+6+0=13T5+8+1=1F#1

It breaks off there because one character is easily compared, a whole step afterwards is not: with F after the step the
same warm start ended at an accuracy of .70 instead of .97.

Solutions are a pure function of (seed, index), and train or evaluate by the hash of their problem, like the gym's.
"""

import dataclasses
import os.path
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Float32

from tapojax.tasks import gym, gym_checker, gym_levels, gym_solutions, gym_tokenizer
from tapojax.types import Task

END = ";"  # of the solution under critique
NO_VERDICT = -2


def critiques(
    *,
    seed: int,
    max_prompt_tokens: int,
    levels: Sequence[int] = (2,),
    evaluation_levels: Sequence[int] = (2,),
    train_size: int = 20_000,
    evaluation_size: int = 256,
    flaws: float = 0.5,
    scratchpad: float = 0.4,
    sloppiness: float = 0.8,
) -> Task:
    """Find the first wrong step of solutions to problems of the given levels.

    Args:
      flaws: share of the solutions that hold a wrong step.
      scratchpad: share of warm-start demonstrations that work step by step; the others give a verdict at once.
      sloppiness: share of the immediate verdicts that are wrong.

    Raises:
      ValueError: an unknown level, one whose solutions do not fit max_prompt_tokens, flaws outside [0, 1].
    """
    for level in (*levels, *evaluation_levels):
        if (longest := sum(gym_levels.lengths(level)) + len(END)) > max_prompt_tokens:
            raise ValueError(
                f"level {level} has problems with solutions of up to {longest} tokens, sampling.max_prompt_tokens is "
                f"{max_prompt_tokens}: raise max_prompt_tokens or choose other levels"
            )
    if not 0 <= flaws <= 1:
        raise ValueError(f"task.flaws={flaws}: a share between 0 and 1")
    return Task(
        tokenizer=gym_tokenizer.TOKENIZER,
        train=Source(gym.source(levels, train_size, seed), flaws),
        evaluation=Source(gym.source(evaluation_levels, evaluation_size, 0, split="heldout"), flaws),
        prompt=lambda example: prompt(example["gym"], example["solution"]),
        score=lambda examples, completions: (score(examples, completions), [None] * len(completions)),
        answer=gym_checker.extract,
        demonstration=lambda example, rng: demonstration(example, rng, scratchpad=scratchpad, sloppiness=sloppiness),
    )


def prompt(problem: str, solution: str) -> list[int]:
    """The tokens after which the critique begins. Raises ValueError for a text that the vocabulary cannot write."""
    return gym_tokenizer.TOKENIZER.encode(problem + solution + END)


def to_criticise(example: Mapping[str, Any], completion: str) -> dict[str, Any]:
    """The row that asks for a critique of a completion.

    Raises:
      ValueError: the completion contains the end of a solution, what follows would pass for the critique.
    """
    if END in completion:
        raise ValueError(f"the solution contains {END!r}, which ends it: {completion!r}")
    return {"id": example["id"], "gym": example["problem"], "solution": completion, "num_steps": num_steps(completion)}


def num_steps(solution: str) -> int:
    """How many steps a solution has written."""
    steps = solution.rpartition("#")[0]
    return steps.count(",") + 1 if steps else 0


def verdict(critique: str, steps: int) -> int | None:
    """The index of the first wrong one of `steps` steps, -1 for none; None where the critique does not say a legal one.

    Our choice: strict. The published scorer of the judge takes any integer but -1 for an error, in range or not.
    """
    legal = {str(index): index for index in range(-1, steps)}
    return legal.get(gym_checker.extract(critique) or "")


def score(examples: Sequence[Mapping[str, Any]], completions: Sequence[str]) -> dict[str, Float32[np.ndarray, "B"]]:
    """Channels of the critiques.

    predicted, label  index of the first wrong step, -1 for none; predicted is -2 where a critique gives no verdict,
                      which is its mistake: NaN would say that it could not be scored
    num_steps         of the solution
    correct           predicted and label agree on whether there is a wrong step (the published `acc`)
    location          they agree on which
    """
    pairs = zip(completions, examples, strict=True)
    return channels(examples, [verdict(text, example["num_steps"]) for text, example in pairs])


def channels(
    examples: Sequence[Mapping[str, Any]], verdicts: Sequence[int | None]
) -> dict[str, Float32[np.ndarray, "B"]]:
    """The channels of `score`, given what each critique says."""
    label, steps = (np.array([example[name] for example in examples], np.float32) for name in ("label", "num_steps"))
    predicted = np.array([NO_VERDICT if index is None else index for index in verdicts], np.float32)
    return {
        "predicted": predicted,
        "label": label,
        "num_steps": steps,
        "correct": ((predicted != NO_VERDICT) & ((predicted == -1) == (label == -1))).astype(np.float32),
        "location": (predicted == label).astype(np.float32),
    }


@dataclasses.dataclass(frozen=True)
class Source:
    """Random access to the problems of `source`, each with a solution; a share `flaws` of every stretch is flawed."""

    source: gym.Source
    flaws: float

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        index = range(len(self))[index]
        example, turn = self.source[index], index // len(self.source.levels)
        flawed = int((turn + 1) * self.flaws) > int(turn * self.flaws)
        solution = (
            with_flaw(example, np.random.default_rng((self.source.seed, index))) if flawed else example["solution"]
        )
        label = gym_checker.first_error(example["problem"], solution)
        return {
            "id": f"critique-{example['level']}:{example['problem']}{solution}",
            "problem": example["problem"] + solution + END,
            "answer": str(label),
            "gym": example["problem"],
            "solution": solution,
            "label": label,
            "num_steps": num_steps(solution),
            "level": example["level"],
        }


def with_flaw(example: Mapping[str, Any], rng: np.random.Generator) -> str:
    """The worked solution with one wrong step and still its right answer.

    The step has a wrong digit anywhere or, as often, one before the '=' and the result that follows from it: true, but
    not called for. A step that is wrong here and right further on is drawn again: the flaw is where it was made.
    """
    steps, _, answer = example["solution"].rpartition("#")
    while True:
        parts = steps.split(",")
        at = int(rng.integers(len(parts)))
        parts[at] = slip(parts[at], rng) if rng.random() < 0.5 else gym.wrong_digit(parts[at], rng)
        solution = ",".join(parts) + "#" + answer
        if gym_checker.first_error(example["problem"], solution) == at:
            return solution


def slip(step: str, rng: np.random.Generator) -> str:
    """A step of the same length with a wrong digit before the '=' and, where there is such a number, its result."""
    left, _, right = step.partition("=")
    left = gym.wrong_digit(left, rng)
    try:
        result = gym_solutions.solve(left + "?").answer
    except ValueError:  # a leading zero, or below zero
        result = right
    return f"{left}={result if len(result) == len(right) else right}"


def demonstration(example: Mapping[str, Any], rng: np.random.Generator, *, scratchpad: float, sloppiness: float) -> str:
    """With probability `scratchpad` the worked critique, else a verdict, a share `sloppiness` of which is wrong."""
    label = example["label"]
    if rng.random() < scratchpad:
        return worked(example["gym"], example["solution"])
    others = [index for index in range(-1, example["num_steps"]) if index != label]
    return f"#{rng.choice(others) if rng.random() < sloppiness else label}"


def worked(problem, solution: str) -> str:
    """The critique that works out each step and breaks off where the solution departs from it."""
    label, prescribed = gym_checker.first_error(problem, solution), gym_solutions.solve(problem).steps
    right = prescribed if label < 0 else prescribed[:label]
    critique = "".join(step + "T" for step in right)
    if label >= 0:
        written = solution.rpartition("#")[0].split(",")
        critique += os.path.commonprefix([prescribed[label], written[label]]) + "F"
    return f"{critique}#{label}"

"""The arithmetic gym: problems of graded difficulty whose every reasoning step can be checked exactly.

Process rewards, flawed positives, hints, teachers and critiques thereby have a ground truth on a laptop. A problem is a
pure function of (level, seed, index); a hash of its text decides whether it trains or evaluates.

Families and lengths: `gym_levels`. Worked solutions: `gym_solutions`. Verdicts, scores and first errors: `gym_checker`.
"""

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex, TypedDict

import numpy as np

from tapojax.tasks import gym_levels, gym_solutions

HELD_OUT_ONE_IN = 10
MAX_DRAWS = 10_000


class Example(TypedDict):
    """A row of the gym: `solution` is the worked solution with its answer, e.g. "7+6+0=13,5+8+1=14#143"."""

    id: str
    problem: str
    answer: str
    solution: str
    level: int


def problem(level: int, seed: int, index: int, *, split: str = "train") -> str:
    """Problem number `index` of `level`: a pure function of its arguments, ending in '?'.

    A problem belongs to one split by a hash of its text, whatever the seed, so the splits cannot share a problem;
    drawing goes on until one falls into `split` ("train" or "heldout").
    """
    _validate([level], split)
    rng = np.random.default_rng((seed, level, index))
    for _ in range(MAX_DRAWS):
        text = gym_levels.LEVELS[level].draw(rng) + "?"
        if held_out(text) == (split == "heldout"):
            return text
    raise ValueError(f"no {split} problem of level {level} in {MAX_DRAWS} draws; the level is too small to split")


def held_out(problem: str) -> bool:
    """Whether `problem` is kept for evaluation: one in ten, by a hash that ignores the order of operands and operators.

    So 57+86 and 86+57 always fall on the same side.
    """
    tokens = sorted(re.findall(r"[0-9]+|[^0-9]", problem))
    digest = hashlib.blake2b(" ".join(tokens).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELD_OUT_ONE_IN == 0


@dataclasses.dataclass(frozen=True)
class Source:
    """Random access to `size` examples, levels in turn; any such sequence feeds `grain.MapDataset.source`."""

    levels: tuple[int, ...]
    size: int
    seed: int
    split: str

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: SupportsIndex) -> Example:
        index = range(self.size)[index]
        level = self.levels[index % len(self.levels)]
        text = problem(level, self.seed, index, split=self.split)
        solution = gym_solutions.solve(text)
        return Example(
            id=f"gym-{level}:{text}", problem=text, answer=solution.answer, solution=solution.text, level=level
        )


def source(levels: Sequence[int], size: int, seed: int, *, split: str = "train") -> Source:
    """`size` problems drawn (with replacement) from one split of `levels`; repeat a level to give it more weight.

    An example's `id` names its problem, so equal ids are equal problems.
    """
    _validate(levels, split)
    if size < 1 or seed < 0:
        raise ValueError(f"size={size} and seed={seed}: a source needs a positive size and a seed of at least 0")
    return Source(tuple(levels), size, seed, split)


def demonstration(
    example: Mapping[str, Any],
    rng: np.random.Generator,
    *,
    scratchpad: float,
    sloppiness: float,
    flaws: float = 0.0,
    slips: float = 0.0,
) -> str:
    """A demonstrator's completion for supervised fine-tuning.

    With probability `scratchpad` the worked solution, of which a share `flaws` has one wrong digit in a step and still
    the right answer; else an immediate answer "#143", of which a share `sloppiness` has one wrong digit. The quick
    start uses scratchpad=0.4, sloppiness=0.8: reinforcement learning then finds out that the scratchpad pays.
    Each column of the worked solution comes out one too high with probability `slips`, and so does its digit of the
    answer: a policy with that habit hardly ever gets through a long sum, yet needs to unlearn a single thing.
    """
    if rng.random() < scratchpad:
        solution = _with_slips(example, rng, slips) if slips else example["solution"]
        steps, _, answer = solution.rpartition("#")
        return (wrong_digit(steps, rng) if rng.random() < flaws else steps) + "#" + answer
    answer = example["answer"]
    return "#" + (wrong_digit(answer, rng) if rng.random() < sloppiness else answer)


def _with_slips(example: Mapping[str, Any], rng: np.random.Generator, slips: float) -> str:
    """Raises ValueError where the digits of the answer are not those of the columns."""
    columns = example["solution"].rpartition("#")[0].split(",")
    if _read_off(columns) != example["answer"]:
        raise ValueError(f"slips={slips}: {example['problem']!r} is not worked in columns; choose levels 1 to 12")
    columns = [c[:-1] + str((int(c[-1]) + (rng.random() < slips)) % 10) for c in columns]
    return ",".join(columns) + "#" + _read_off(columns)


def _read_off(columns: Sequence[str]) -> str:
    """The answer that columns spell: the whole last result, then the last digits of those before, backwards."""
    last = columns[-1].rpartition("=")[2]
    return str(int(last + "".join(column[-1] for column in reversed(columns[:-1]))))


def _validate(levels: Sequence[int], split: str) -> None:
    gym_levels.require(levels)
    if split not in ("train", "heldout"):
        raise ValueError(f"split {split!r}: choose 'train' or 'heldout'")


def wrong_digit(text: str, rng: np.random.Generator) -> str:
    """`text` with one digit, chosen uniformly, replaced by another one."""
    position = int(rng.choice([i for i, character in enumerate(text) if character.isdigit()]))
    digit = (int(text[position]) + int(rng.integers(1, 10))) % 10
    return text[:position] + str(digit) + text[position + 1 :]

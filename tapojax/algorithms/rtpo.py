"""RTPO, reverse thinking policy optimization: part of a worked solution is given away, less and less of it.

Source: the trainer in the TRL pull request 4652 (closed, unmerged) and the repository SolarWindRider/avr; there is no
paper. Fact: hints lose tokens from their end by a schedule in steps, and the rest is GRPO with a token-mean loss. Our
choice: the hint opens the completion (the trainer's own sampler makes it a finished turn: `closed_turn`), it is cut on
token ids, rewards read the completion alone, and without a hint the prompt is the plain one.

Differs from DAPO without dynamic sampling: the prompts.
"""

from typing import Any

from tapojax import schedules
from tapojax.algorithms import hints
from tapojax.algorithms.dapo import dapo
from tapojax.types import Algorithm, Task


def rtpo(
    *,
    group_size: int,
    max_tokens: int,
    steps: int,
    task: Task,
    schedule: str = "linear",
    direction: str = "down",
    anneal: float = 0.8,
    rate: float = 5.0,
    milestones: tuple[float, ...] = (0.3, 0.6, 0.9),
    values: tuple[float, ...] = (0.2, 0.5, 0.8, 1.0),
    value: float = 0.0,
    closed_turn: bool = False,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Algorithm:
    """The schedule (`schedules.hint_fraction`) reaches its end at the share `anneal` of the run's steps; a knob that it
    does not read must keep its default. Neutral: schedule = "constant", value = 0.

    Raises:
      ValueError: the task has no solutions or, for closed_turn, no turns; an example has no solution.
    """
    solve = task.solution
    place = task.closed_hint if closed_turn else lambda example, hint: [*task.prompt(example), *hint]
    if solve is None:
        raise ValueError("the task has no worked solutions to cut hints from: choose one that has, such as arithmetic")
    if place is None:
        raise ValueError("closed_turn=True needs turns: set task.chat=True, or closed_turn=False for an open hint")
    if schedule == "constant" and anneal != 0.8:
        raise ValueError(f"anneal={anneal} is not read by the constant schedule: leave it out")
    shape: dict[str, Any] = dict(direction=direction, rate=rate, milestones=milestones, values=values, value=value)
    fraction = schedules.hint_fraction(schedule, anneal * steps, **shape)

    def prompts(prompts, step):
        share = fraction(step)
        pairs = zip(prompts.examples, prompts.tokens, strict=True)
        return prompts._replace(tokens=[hinted(*pair, share) for pair in pairs]) if share else prompts

    def hinted(example, tokens, share):
        if (solution := solve(example)) is None:
            raise ValueError(f"{example['id']!r} has no worked solution: set task.solution_key, or leave such rows out")
        hint = hints.cut(task.tokenizer, solution[0], share)
        return place(example, hint) if hint else tokens

    parent = dapo(group_size=group_size, max_tokens=max_tokens, clip_low=clip_low, clip_high=clip_high)
    return parent._replace(keep=None, prompts=prompts, diagnostics=lambda *args: {"hint_fraction": fraction(args[-1])})

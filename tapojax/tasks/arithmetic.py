"""The arithmetic gym as a Task."""

from collections.abc import Sequence

from tapojax.tasks import gym, gym_checker, gym_levels, gym_tokenizer
from tapojax.types import Task


def arithmetic(
    *,
    seed: int,
    max_prompt_tokens: int,
    levels: Sequence[int] = (2,),
    evaluation_levels: Sequence[int] = (2,),
    train_size: int = 20_000,
    evaluation_size: int = 256,
    scratchpad: float = 0.4,
    sloppiness: float = 0.8,
) -> Task:
    """Problems of the given levels; the evaluation problems never occur in training.

    Args:
      seed: of the problems; the evaluation set does not depend on it.
      scratchpad: share of warm-start demonstrations that work step by step; the others answer at once.
      sloppiness: share of the immediate answers that have a wrong digit.

    Raises:
      ValueError: an unknown level, or one whose problems do not fit max_prompt_tokens.
    """
    for level in (*levels, *evaluation_levels):
        if (longest := gym_levels.lengths(level)[0]) > max_prompt_tokens:
            raise ValueError(
                f"level {level} has prompts of up to {longest} tokens, sampling.max_prompt_tokens is "
                f"{max_prompt_tokens}: raise max_prompt_tokens or choose other levels"
            )
    tokenizer = gym_tokenizer.TOKENIZER
    return Task(
        tokenizer=tokenizer,
        train=gym.source(levels, train_size, seed),
        evaluation=gym.source(evaluation_levels, evaluation_size, 0, split="heldout"),
        prompt=lambda example: tokenizer.encode(example["problem"]),
        score=lambda examples, completions: (gym_checker.score(examples, completions), [None] * len(completions)),
        answer=gym_checker.extract,
        demonstration=lambda example, rng: gym.demonstration(
            example, rng, scratchpad=scratchpad, sloppiness=sloppiness
        ),
    )

"""The arithmetic gym as a Task."""

from collections.abc import Sequence

from tapojax.rewards import surgery
from tapojax.tasks import gym, gym_checker, gym_levels, gym_tokenizer
from tapojax.types import Example, Task


def arithmetic(
    *,
    seed: int,
    max_prompt_tokens: int,
    levels: Sequence[int] = (2,),
    evaluation_levels: Sequence[int] = (2,),
    warm_levels: Sequence[int] = (),
    train_size: int = 20_000,
    evaluation_size: int = 256,
    scratchpad: float = 0.4,
    sloppiness: float = 0.8,
    flaws: float = 0.0,
    slips: float = 0.0,
) -> Task:
    """Problems of the given levels; the evaluation problems never occur in training.

    Args:
      seed: of the problems; the evaluation set does not depend on it.
      warm_levels: of the warm start's demonstrations; none: those of `levels`.
      scratchpad: share of warm-start demonstrations that work step by step; the others answer at once.
      sloppiness: share of the immediate answers that have a wrong digit.
      flaws: share of the demonstrations with steps that have one wrong digit there, and still the right answer.
      slips: probability of each column of a demonstration to come out one too high, and its digit of the answer too.

    Raises:
      ValueError: an unknown level, or one whose problems do not fit max_prompt_tokens.
    """
    for level in (*levels, *evaluation_levels, *warm_levels):
        if (longest := gym_levels.lengths(level)[0]) > max_prompt_tokens:
            raise ValueError(
                f"level {level} has prompts of up to {longest} tokens, sampling.max_prompt_tokens is "
                f"{max_prompt_tokens}: raise max_prompt_tokens or choose other levels"
            )
    tokenizer = gym_tokenizer.TOKENIZER

    def score(examples, completions):
        return gym_checker.score(examples, completions), [None] * len(completions)

    return Task(
        tokenizer=tokenizer,
        train=gym.source(levels, train_size, seed),
        evaluation=gym.source(evaluation_levels, evaluation_size, 0, split="heldout"),
        prompt=lambda example: tokenizer.encode(example["problem"]),
        score=score,
        answer=gym_checker.extract,
        demonstration=lambda example, rng: gym.demonstration(
            example, rng, scratchpad=scratchpad, sloppiness=sloppiness, flaws=flaws, slips=slips
        ),
        solution=_solution,
        perturb=surgery.make_perturb(tokenizer, _answer_span, score),
        closed_hint=lambda example, tokens: [
            *tokenizer.encode(example["problem"]),
            *tokens,
            tokenizer.eos_token_id,
        ],
        warm_start=gym.source(warm_levels, train_size, seed) if warm_levels else None,
    )


def _solution(example: Example) -> tuple[str, str]:
    """The worked solution as steps and the answer behind its mark."""
    steps, mark, answer = example["solution"].rpartition("#")
    return steps, mark + answer


def _answer_span(completion: str) -> tuple[int, int] | None:
    """Where the answer stands if it is written in digits."""
    answer = gym_checker.extract(completion)
    return (len(completion) - len(answer), len(completion)) if answer and answer.isdecimal() else None

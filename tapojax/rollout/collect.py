"""One rollout batch: prompts in, scored rows out, groups without a signal replaced where the algorithm asks for it."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tapojax.types import Algorithm, Engine, Example, Prompts, Rollout, Sampling, Scores, Task, TokenStats


class Collected(NamedTuple):
    """A full batch: P * G rows on the host, with what was said about them."""

    rollout: Rollout
    scores: Scores
    prompts: Prompts
    completions: Sequence[str]
    errors: Sequence[str]  # one text for each row that could not be scored, discarded groups included
    sampled_rows: int  # rows generated to fill the batch
    sampled_tokens: int
    seconds: Mapping[str, float]  # spent sampling and scoring
    memory: Any = None  # the algorithm's, as it is after this batch
    version: int | None = None  # of the weights that sampling began with, where somebody has told


def collect(
    engine: Engine,
    weights: Any,
    batches: Iterator[Sequence[Example]],
    task: Task,
    algorithm: Algorithm,
    sampling: Sampling,
    *,
    step: int,
    key: jax.Array,
    carry: Any = (),
    memory: Any = None,
    score: Callable[..., TokenStats] | None = None,
    max_rounds: int = 10,
    max_error_share: float = 0.2,
) -> Collected:
    """Samples and scores G completions of each of the next P prompts; refills until P groups are kept.

    `memory` and `score(tokens, mask)`, the policy behind `weights`, are for an algorithm that injects rows.

    Raises:
      ValueError: a channel the algorithm needs is missing; more than max_error_share of a round's rows could not be
        scored; max_rounds rounds did not fill the batch.
    """
    kept: list[Collected] = []
    share: list[float] = []  # of each round's groups that were kept
    num_prompts = rounds = 0
    while not kept or sum(len(part.prompts.tokens) for part in kept) < num_prompts:
        if rounds == max_rounds:
            found = sum(len(part.prompts.tokens) for part in kept)
            raise ValueError(
                f"step {step}: {rounds} rounds of {num_prompts} prompts gave {found} groups worth keeping (share of "
                f"the last rounds {share[-3:]}): the problems are too easy or too hard for this policy; change the "
                "data, raise collect.max_rounds, or turn dynamic sampling off"
            )
        examples = next(batches)
        num_prompts = len(examples)
        part = _one_round(
            engine,
            weights,
            examples,
            task,
            algorithm,
            sampling,
            step,
            jax.random.fold_in(key, rounds),
            carry,
            memory,
            score,
        )
        rounds, memory = rounds + 1, part.memory
        _check_errors(part, algorithm.needs, max_error_share)
        keep = np.ones(num_prompts, bool)
        if algorithm.keep is not None:
            keep = np.asarray(algorithm.keep(algorithm.rewards(part.scores, part.rollout, step), part.scores))
        share.append(round(float(keep.mean()), 3))
        kept.append(select(part, np.flatnonzero(keep).tolist(), algorithm.group_size))
    return select(concatenate(kept), range(num_prompts), algorithm.group_size)


def _one_round(engine, weights, examples, task, algorithm, sampling, step, key, carry, memory, score) -> Collected:
    prompts = Prompts(examples, [task.prompt(example) for example in examples])
    if algorithm.prompts is not None:
        prompts = algorithm.prompts(prompts, step)
    started = time.perf_counter()
    how = dict(group_size=algorithm.group_size, sampling=sampling, temperature=algorithm.temperature, carry=carry)
    scored = None
    if engine.generate_scored is None:
        rollout = engine.generate(weights, prompts, key, **how)
    else:
        rollout, *scored = engine.generate_scored(weights, prompts, key, **how)
    sampled = time.perf_counter()
    rows = [example for example in examples for _ in range(algorithm.group_size)]
    completions = decode(task.tokenizer, rollout)
    scores, errors = scored or task.score(rows, completions)
    sampled_tokens = int(rollout.mask.sum())
    if missing := algorithm.needs - scores.keys():
        raise ValueError(
            f"the algorithm needs the score channels {sorted(missing)}, the task gives {sorted(scores)}: "
            "choose a task or reward that provides them"
        )
    if algorithm.inject is not None:
        rollout, scores, memory = algorithm.inject(rollout, scores, prompts, key, memory, score)
        completions = decode(task.tokenizer, rollout)
    return Collected(
        rollout=rollout,
        scores=scores,
        prompts=prompts,
        completions=completions,
        errors=[error for error in errors if error is not None],
        sampled_rows=len(rows),
        sampled_tokens=sampled_tokens,
        seconds={"sample": sampled - started, "reward": time.perf_counter() - sampled},
        memory=memory,
    )


def decode(tokenizer, rollout: Rollout) -> list[str]:
    """The completions as text."""
    return [
        tokenizer.decode(tokens[mask].tolist(), skip_special_tokens=True)
        for tokens, mask in zip(rollout.tokens, rollout.mask, strict=True)
    ]


def _check_errors(part: Collected, needs: frozenset[str], max_error_share: float):
    unscored = np.any([np.isnan(part.scores[name]) for name in needs], axis=0)
    if np.mean(unscored) > max_error_share:
        raise ValueError(
            f"{int(unscored.sum())} of {part.sampled_rows} rows could not be scored (collect.max_error_share is "
            f"{max_error_share}); the first error: {[*part.errors, 'the task gave NaN and no reason'][0]}"
        )


def select(part: Collected, groups: Sequence[int], group_size: int) -> Collected:
    """The given groups, in that order; errors and counts of the whole are kept."""
    rows = [group * group_size + i for group in groups for i in range(group_size)]
    return part._replace(
        rollout=jax.tree.map(lambda x: np.asarray(x)[rows], part.rollout),
        scores={name: np.asarray(values)[rows] for name, values in part.scores.items()},
        prompts=Prompts([part.prompts.examples[i] for i in groups], [part.prompts.tokens[i] for i in groups]),
        completions=[part.completions[i] for i in rows],
    )


def concatenate(parts: Sequence[Collected]) -> Collected:
    """One batch out of several rounds."""
    if len(parts) == 1:
        return parts[0]
    return Collected(
        rollout=jax.tree.map(lambda *xs: np.concatenate(xs), *(part.rollout for part in parts)),
        scores={name: np.concatenate([part.scores[name] for part in parts]) for name in parts[0].scores},
        prompts=Prompts(
            [example for part in parts for example in part.prompts.examples],
            [tokens for part in parts for tokens in part.prompts.tokens],
        ),
        completions=[text for part in parts for text in part.completions],
        errors=[error for part in parts for error in part.errors],
        sampled_rows=sum(part.sampled_rows for part in parts),
        sampled_tokens=sum(part.sampled_tokens for part in parts),
        seconds={stage: sum(part.seconds[stage] for part in parts) for stage in parts[0].seconds},
        memory=parts[-1].memory,
    )

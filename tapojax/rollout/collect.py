"""One rollout batch: prompts in, scored rows out, groups without a signal replaced where the algorithm asks for it."""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tapojax.rewards import loop
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
    seconds: Mapping[str, float]  # spent sampling, and waiting for scores after that
    memory: Any = None  # the algorithm's, as it is after this batch
    version: int | None = None  # of the weights that sampling began with, where somebody has told
    call_seconds: Sequence[float] = ()  # that each call of the task's score function took


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
    observe: Callable[[Sequence[Example], Any, Any], None] | None = None,
    max_rounds: int = 10,
    max_error_share: float = 0.2,
    reward: loop.Options = loop.Options(),  # noqa: B008  an immutable value
) -> Collected:
    """Samples and scores G completions of each of the next P prompts; refills until P groups are kept.

    `memory` and `score(tokens, mask)`, the policy behind `weights`, are for an algorithm that injects rows.
    `observe(examples, correct[B], source[B])` is told of every round, of the groups that are not kept too.

    Raises:
      ValueError: a channel the algorithm needs is missing; more than max_error_share of a round's rows, or of the
        first ones that were scored, got no score (see `loop.Limit`); max_rounds rounds did not fill the batch.
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
            loop.Limit(max_error_share),
            reward,
        )
        rounds, memory = rounds + 1, part.memory
        if observe is not None:
            observe(examples, part.scores["correct"], part.rollout.source)
        keep = np.ones(num_prompts, bool)
        if algorithm.keep is not None:
            keep = np.asarray(algorithm.keep(algorithm.rewards(part.scores, part.rollout, step), part.scores))
        share.append(round(float(keep.mean()), 3))
        kept.append(select(part, np.flatnonzero(keep).tolist(), algorithm.group_size))
    return select(concatenate(kept), range(num_prompts), algorithm.group_size)


def _one_round(
    engine, weights, examples, task, algorithm, sampling, step, key, carry, memory, score, limit, reward
) -> Collected:
    prompts = Prompts(examples, [task.prompt(example) for example in examples])
    if algorithm.prompts is not None:
        prompts = algorithm.prompts(prompts, step)
    rows = [example for example in examples for _ in range(algorithm.group_size)]
    how = dict(group_size=algorithm.group_size, sampling=sampling, temperature=algorithm.temperature, carry=carry)
    started = time.perf_counter()
    if engine.generate_scored is None:
        generate = functools.partial(engine.generate, weights, prompts, key, **how)
        rollout, sampled, scored = _generate_and_score(generate, task, rows, algorithm.needs, limit, reward)
    else:
        rollout, scores, errors = engine.generate_scored(weights, prompts, key, **how)
        sampled = time.perf_counter()
        scored = loop.Scored(decode(task.tokenizer, rollout), scores, errors, [])
        loop.check(scores, errors, algorithm.needs, limit)
    completions, scores, errors, call_seconds = scored
    sampled_tokens = int(rollout.mask.sum())
    if algorithm.inject is not None:
        before = rollout
        rollout, scores, memory = algorithm.inject(rollout, scores, prompts, key, memory, score)
        completions = _decode_changed(task.tokenizer, before, rollout, completions)
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
        call_seconds=call_seconds,
    )


def _generate_and_score(generate, task: Task, rows, needs, limit, reward) -> tuple[Rollout, float, loop.Scored]:
    """The rollout, the time at which it was there, and its rows' scores; with overlap most are there by then."""
    text = functools.partial(task.tokenizer.decode, skip_special_tokens=True)
    with loop.scoring(task.score, text, rows, needs=needs, limit=limit, options=reward) as scoring:
        if reward.overlap:
            rollout = generate(finished=functools.partial(loop.add, scoring))
        else:
            rollout = generate()
            for row, (tokens, mask) in enumerate(zip(rollout.tokens, rollout.mask, strict=True)):
                loop.add(scoring, row, tokens[mask].tolist())
        return rollout, time.perf_counter(), loop.result(scoring)


def _decode_changed(tokenizer, before: Rollout, after: Rollout, completions: Sequence[str]) -> list[str]:
    """The completions of the rows as they are now."""
    changed = np.any((before.tokens != after.tokens) | (before.mask != after.mask), axis=1)
    new = iter(decode(tokenizer, jax.tree.map(lambda x: np.asarray(x)[changed], after)))
    return [next(new) if row else text for row, text in zip(changed, completions, strict=True)]


def decode(tokenizer, rollout: Rollout) -> list[str]:
    """The completions as text."""
    return [
        tokenizer.decode(tokens[mask].tolist(), skip_special_tokens=True)
        for tokens, mask in zip(rollout.tokens, rollout.mask, strict=True)
    ]


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
    names = dict.fromkeys(name for part in parts for name in part.scores)
    return Collected(
        rollout=jax.tree.map(lambda *xs: np.concatenate(xs), *(part.rollout for part in parts)),
        scores={name: np.concatenate([_channel(part, name) for part in parts]) for name in names},
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
        call_seconds=[seconds for part in parts for seconds in part.call_seconds],
    )


def _channel(part: Collected, name: str) -> np.ndarray:
    """NaN where a round has no such channel: a judge that was not asked has no costs."""
    rows = len(part.rollout.tokens)
    return np.asarray(part.scores[name] if name in part.scores else np.full(rows, np.nan, np.float32))

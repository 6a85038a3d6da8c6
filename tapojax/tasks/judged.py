"""A generative reward model as judge: right answers through a wrong step are flawed positives (FAPO, arXiv 2510.22543).

`judged` gives a task the verdicts of any judge, `critic` is the judge that runs on an engine of this process.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32

from tapojax.rollout import collect
from tapojax.tasks import critiques, gym_tokenizer
from tapojax.types import Engine, Example, Prompts, Sampling, Task

# (examples, completions with the right answer) -> (1 flawed, 0 not, NaN no verdict; why there is none, by row)
Judge = Callable[[Sequence[Example], Sequence[str]], tuple[Float32[np.ndarray, "B"], Sequence[str | None]]]


def judged(task: Task, judge: Judge) -> Task:
    """The same task with the judge's verdicts in channel "flawed"; wrong rows are not judged and not flawed.

    A right row without verdict is NaN, so that training leaves it out; the published code takes it for flawless. Where
    the task has an exact flag of its own it stays as "flawed_exact", and the means of two more channels are the judge's
    precision and recall: "judge_precision" exists where the judge says flawed, "judge_recall" where the row is flawed.
    """

    def score(examples, completions):
        scores, errors = task.score(examples, completions)
        correct = np.asarray(scores["correct"])
        right = np.flatnonzero(correct == 1).tolist()
        flawed = np.where(np.isnan(correct), np.float32("nan"), np.float32(0))
        flawed[right], reasons = judge([examples[row] for row in right], [completions[row] for row in right])
        said = dict(zip(right, reasons, strict=True))
        errors = [error or said.get(row) for row, error in enumerate(errors)]
        return {**scores, "flawed": flawed, **_quality(flawed, scores.get("flawed"))}, errors

    return task._replace(score=score)


def _quality(flawed, exact) -> dict[str, Float32[np.ndarray, "B"]]:
    if exact is None:
        return {}
    return {
        "flawed_exact": exact,
        "judge_precision": np.where(flawed == 1, exact, np.nan).astype(np.float32),
        "judge_recall": np.where(exact == 1, flawed, np.nan).astype(np.float32),
    }


def critic(engine: Engine, weights: Any, sampling: Sampling, *, max_prompt_tokens: int, batch_rows: int) -> Judge:
    """The judge that lets a policy trained on the task "critiques" criticise each solution once.

    Calls of the engine hold batch_rows prompts, filled up with repeats, so that all share one compiled shape. What is
    drawn depends on the solutions alone: a resumed run gets the same verdicts. A solution without a step has no wrong
    one, and the critic is not asked.
    """

    def judge(examples, completions):
        verdicts = np.full(len(completions), np.nan, np.float32)
        errors: list[str | None] = [None] * len(completions)
        asked: dict[int, list[int]] = {}
        for row, (example, completion) in enumerate(zip(examples, completions, strict=True)):
            if critiques.num_steps(completion) == 0:
                verdicts[row] = 0
                continue
            try:
                asked[row] = _prompt(example["problem"], completion, max_prompt_tokens)
            except ValueError as error:
                errors[row] = f"not judged: {error}"
        said = _critiques(engine, weights, sampling, list(asked.values()), batch_rows)
        for row, critique in zip(asked, said, strict=True):
            index = critiques.verdict(critique, critiques.num_steps(completions[row]))
            verdicts[row] = np.nan if index is None else index != -1
            errors[row] = f"the judge gave no verdict: {critique!r}" if index is None else None
        return verdicts, errors

    return judge


def _prompt(problem: str, completion: str, max_prompt_tokens: int) -> list[int]:
    """Raises ValueError saying why the critic cannot be asked about this completion."""
    if critiques.END in completion:  # what follows it would pass for the critique
        raise ValueError(f"the solution contains {critiques.END!r}, which ends it: {completion!r}")
    tokens = critiques.prompt(problem, completion)
    if len(tokens) > max_prompt_tokens:
        raise ValueError(f"problem and solution have {len(tokens)} tokens, the judge reads {max_prompt_tokens}")
    return tokens


def _critiques(engine, weights, sampling: Sampling, prompts: Sequence[list[int]], batch_rows: int) -> list[str]:
    """One critique of each prompt, as text."""
    said: list[str] = []
    for start in range(0, len(prompts), batch_rows):
        part = [*prompts[start : start + batch_rows]]
        part += [part[0]] * (batch_rows - len(part))
        key = jax.random.key(zlib.crc32(repr(part).encode()))
        rollout = engine.generate(
            weights, Prompts([{"id": "judge"}] * batch_rows, part), key, group_size=1, sampling=sampling
        )
        said += collect.decode(gym_tokenizer.TOKENIZER, rollout)
    return said[: len(prompts)]

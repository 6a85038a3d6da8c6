"""A critic that a run of this package has trained, as judge on the devices of this process (FAPO, arXiv 2510.22543)."""

import dataclasses
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tapojax.judges.judged import Judge, Verdicts
from tapojax.rewards import verdicts
from tapojax.rollout import collect
from tapojax.tasks import critique_files, critiques
from tapojax.types import Engine, Example, Prompts, Sampling, Task


class Trained(NamedTuple):
    """A policy as its run left it."""

    engine: Engine
    weights: Any
    sampling: Sampling
    max_prompt_tokens: int
    task: Task  # without problems
    task_name: str  # one of READERS
    mesh: Any  # of devices


class Reader(NamedTuple):
    """How the critics of a task are asked, and what they say."""

    to_criticise: Callable[[Example, str], Example]  # (example, completion) -> row of the critic's task, or ValueError
    verdict: Callable[[str, int], int | None]  # (critique, num_steps) -> first wrong step, -1: none; None: illegible


READERS = {
    "critiques": Reader(critiques.to_criticise, critiques.verdict),
    "critique_files": Reader(critique_files.to_criticise, verdicts.parse),
}


def critic(
    *,
    trained: Callable[[str], Trained],
    workdir: str = "runs/genrm_gym",
    temperature: float = 0.0,
    batch_rows: int = 64,
) -> Judge:
    """1 for a solution with a wrong step, 0 for one without; asked and read as in the critic's own training.

    Calls of the engine hold batch_rows prompts, filled up with repeats, so that all share one compiled shape, and come
    one at a time. What is drawn depends on the solutions of a call alone: a resumed run gets the same verdicts. A
    solution without a step has no wrong one, and the critic is not asked.

    Args:
      trained: opens the run of a folder, which must be of a task in READERS.
      workdir: of a finished run of the task "critiques" (configs/genrm_gym.py) or "critique_files" (genrm_math.py).

    Raises:
      ValueError: batch_rows is below 1, or what `trained` raises.
    """
    if batch_rows < 1:
        raise ValueError(f"judge.batch_rows={batch_rows} must be 1 or more")
    run = trained(workdir)
    sampling = dataclasses.replace(run.sampling, temperature=temperature)
    reader, turn = READERS[run.task_name], threading.Lock()

    def judge(examples, completions):
        values = np.full(len(completions), np.nan, np.float32)
        costs = {name: np.full(len(completions), np.nan, np.float32) for name in ("seconds", "tokens")}
        errors: list[str | None] = [None] * len(completions)
        asked, steps = dict[int, list[int]](), dict[int, int]()
        for row, (example, completion) in enumerate(zip(examples, completions, strict=True)):
            try:
                question = reader.to_criticise(example, completion)
                steps[row] = question["num_steps"]
                if steps[row]:
                    asked[row] = _prompt(run, question)
                else:
                    values[row] = 0
            except ValueError as error:
                errors[row] = f"not judged: {error}"
        with turn, jax.set_mesh(run.mesh):  # of the thread that asks
            said = _critiques(run, sampling, list(asked.values()), batch_rows)
        for row, (critique, *cost) in zip(asked, said, strict=True):
            index = reader.verdict(critique, steps[row])
            values[row] = np.nan if index is None else index != -1
            errors[row] = f"the judge gave no verdict: {critique[-200:]!r}" if index is None else None
            costs["seconds"][row], costs["tokens"][row] = cost
        return Verdicts(values, errors, costs)

    return judge


def _prompt(run: Trained, question: Example) -> list[int]:
    tokens = run.task.prompt(question)
    if len(tokens) > run.max_prompt_tokens:
        raise ValueError(f"problem and solution have {len(tokens)} tokens, the judge reads {run.max_prompt_tokens}")
    return tokens


def _critiques(run: Trained, sampling: Sampling, prompts: Sequence[list[int]], batch_rows: int):
    """One critique of each prompt, as text, with its share of the seconds and its tokens."""
    said: list[tuple[str, float, int]] = []
    for start in range(0, len(prompts), batch_rows):
        part, started = [*prompts[start : start + batch_rows]], time.perf_counter()
        asked = len(part)
        part += [part[0]] * (batch_rows - asked)
        key = jax.random.key(zlib.crc32(repr(part).encode()))
        examples: list[Example] = [{"id": "judge"}] * batch_rows
        rollout = run.engine.generate(run.weights, Prompts(examples, part), key, group_size=1, sampling=sampling)
        texts, tokens = collect.decode(run.task.tokenizer, rollout), np.asarray(rollout.mask).sum(axis=1)
        seconds = (time.perf_counter() - started) / asked
        said += [(texts[row], seconds, int(tokens[row])) for row in range(asked)]
    return said

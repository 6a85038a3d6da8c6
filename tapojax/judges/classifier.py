r"""Discriminative reward models as judges and as critics: outcome models score a solution, process models its steps.

How a row's score comes from those of its steps is chosen by name: their minimum or product (Lightman et al., arXiv
2305.20050), their mean, the last one (Zhang et al., arXiv 2501.07301, compare the first two with it), or whether one
is below a threshold, which is FAPO's flawed flag and, as an index, what ProcessBench asks for.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tapojax import evaluation
from tapojax.judges import reward_model
from tapojax.judges.judged import Judge, Verdicts

OF_STEPS: dict[str, Callable[[Any], Any]] = {
    "min": np.min,
    "product": np.prod,
    "mean": np.mean,
    "last": lambda scores: scores[-1],
}


def outcome_model(
    *,
    path: str = "",
    tokenizer_path: str = "",
    positive: int = 1,
    template: str = "{problem}",
    chat: bool = True,
    system: str = "",
    max_tokens: int = 4096,
    batch_tokens: int = 8192,
    dtype: str = "",
) -> Judge:
    """The judge that an outcome reward model is: one score of problem and completion.

    Of a single label it is the logit as it is, of several the probability of `positive`.

    Args:
      path: a folder of *ForSequenceClassification or Qwen2ForRewardModel; tokenizer_path: "" where it is the same.
      template: the user's message or, without chat, all that precedes the solution.
      chat: wrap both in the tokenizer's chat template; system: its system message, "" for the template's own.
      max_tokens: of problem and solution; longer ones get no verdict.
      batch_tokens: that a device reads at a time, padding included.
      dtype: of parameters and products; "": that of the files.

    Raises:
      ValueError: the folder holds no such model; what it holds is named.
    """
    reading: dict[str, Any] = dict(positive=positive, template=template, chat=chat, system=system)
    size: dict[str, Any] = dict(max_tokens=max_tokens, batch_tokens=batch_tokens, dtype=dtype)
    model = reward_model.load(path, tokenizer_path=tokenizer_path, **reading, **size)
    if model.process:
        raise ValueError(f"judge.path={path!r} is a process reward model: choose judge.name=process_model")
    return lambda examples, completions: _verdicts(model, examples, [[text] for text in completions], lambda s: s[0])


def process_model(
    *,
    path: str = "",
    tokenizer_path: str = "",
    score: str = "min",
    threshold: float = 0.5,
    positive: int = 1,
    separator: str = "<extra_0>",
    split: str = "\n\n",
    template: str = "{problem}",
    chat: bool = True,
    system: str = "",
    max_tokens: int = 4096,
    batch_tokens: int = 8192,
    dtype: str = "",
) -> Judge:
    r"""The judge that a process reward model is: a probability of each step, and of them one score of the row.

    Args:
      path: a folder of *ForTokenClassification or Qwen2ForProcessRewardModel.
      score: min, product, mean or last of the steps' probabilities; flawed: 1 where one is below threshold, else 0.
      separator: the token that stands after each step; split: what separates the steps of a completion.
      others: as for `outcome_model`.

    Raises:
      ValueError: the folder holds no such model, an unknown score, a separator that is not one token; each is named.
    """
    if score not in (*OF_STEPS, "flawed"):
        raise ValueError(f"judge.score={score!r}: choose one of {', '.join(OF_STEPS)}, flawed")
    reading: dict[str, Any] = dict(positive=positive, template=template, chat=chat, system=system)
    size: dict[str, Any] = dict(max_tokens=max_tokens, batch_tokens=batch_tokens, dtype=dtype)
    model = reward_model.load(path, tokenizer_path=tokenizer_path, separator=separator, **reading, **size)
    if not model.process:
        raise ValueError(f"judge.path={path!r} is an outcome reward model: choose judge.name=outcome_model")
    value = OF_STEPS.get(score, lambda scores: evaluation.first_error(scores, threshold) != -1)
    return lambda examples, completions: _verdicts(model, examples, [steps(t, split) for t in completions], value)


def _verdicts(model: reward_model.Model, examples, solutions: Sequence[Sequence[str]], value) -> Verdicts:
    read = model.read([example["problem"] for example in examples], solutions)
    values = np.array([np.nan if scores is None else value(scores) for scores in read.scores], np.float32)
    return Verdicts(values, read.errors, {"tokens": read.tokens, "seconds": read.seconds})


def steps(completion: str, split: str) -> list[str]:
    """The steps of a solution, without the white space around them; what is empty is no step."""
    return [step.strip() for step in completion.split(split) if step.strip()]


def critic_records(
    model: reward_model.Model, rows: Sequence[Mapping[str, Any]], *, threshold: float = 0.5
) -> list[dict[str, Any]]:
    """A process model's records for `evaluation.critic_table`, of rows {"id", "problem", "steps", "label"}.

    "step_scores" is there for `evaluation.critic_threshold`, and "error" says why there are none.
    """
    read = model.read([row["problem"] for row in rows], [[step.strip() for step in row["steps"]] for row in rows])
    return [
        {
            "id": row["id"],
            "label": row["label"],
            "final_answer_correct": row.get("final_answer_correct"),
            "predicted": evaluation.first_error(scores, threshold),
            "step_scores": None if scores is None else scores.tolist(),
            "error": error,
        }
        for row, scores, error in zip(rows, read.scores, read.errors, strict=True)
    ]

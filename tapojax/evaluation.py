"""How good is a policy: unbiased pass@k, avg@k, maj@k, with confidence intervals over problems."""

import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tapojax.rollout import collect
from tapojax.types import Engine, Examples, Prompts, Sampling, Task


def pass_at_k(n, c, k):
    """Probability that k draws without replacement from n samples, c of them right, hold a right one.

    pass@k = 1 - C(n-c, k) / C(n, k), as a product that cannot overflow. Chen et al., arXiv 2107.03374, eq. 1.
    n, c and k broadcast; k <= n.

    Raises:
      ValueError: k is not in 1..n, or c not in 0..n.
    """
    n, c, k = np.broadcast_arrays(*(np.asarray(x) for x in (n, c, k)))
    if np.any((k < 1) | (k > n) | (c < 0) | (c > n)):
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= c <= n, got n={n.tolist()} c={c.tolist()} k={k.tolist()}")
    value = np.ones(n.shape)
    for i in range(int(k.max(initial=0))):
        value = value * np.where(i < k, np.maximum(n - c - i, 0) / np.maximum(n - i, 1), 1.0)
    return 1.0 - value


def average_at_k(correct):
    """Mean over all samples of all problems, correct [problems, k]; NaN entries (not scored) are left out."""
    return _mean(correct)


def majority_at_k(answers: Sequence[Sequence[Any]], correct) -> float:
    """Share of problems whose most frequent answer is right; ties go to the answer seen first, None never wins a vote.

    Samples that were not scored (NaN) have no vote; a problem without any scored sample is left out.

    Args:
      answers: per problem, the k extracted answers (None: no answer).
      correct: [problems, k], whether each sample was right.
    """
    return _mean([_majority_is_right(a, c) for a, c in zip(answers, correct, strict=True)])


def _majority_is_right(answers, correct) -> float:
    scored = [(answer, right) for answer, right in zip(answers, correct, strict=True) if not np.isnan(right)]
    votes = Counter(answer for answer, _ in scored if answer is not None)
    if not votes:
        return 0.0 if scored else float("nan")
    winner, _ = votes.most_common(1)[0]  # ties in the order of first sight
    return float(next(right for answer, right in scored if answer == winner))


def _mean(values) -> float:
    """Mean of what is not NaN; NaN where nothing is."""
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


def confidence_interval(per_problem, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a mean over problems: mean ± z · std(ddof 1) / sqrt(problems), problems being the clusters.

    Where all problems agree the std is 0 and says nothing; then Wilson's interval of the mean is given. NaN are left
    out, and nothing but NaN gives (NaN, NaN).
    """
    values = np.asarray(per_problem, float)
    values = values[~np.isnan(values)]
    n, mean = len(values), _mean(values)
    if n == 0:
        return mean, mean
    if np.ptp(values) > 0:
        half = z * values.std(ddof=1) / np.sqrt(n)
        return max(0.0, mean - half), min(1.0, mean + half)
    centre, half = (
        (mean + z**2 / (2 * n)) / (1 + z**2 / n),
        z / (1 + z**2 / n) * np.sqrt(mean * (1 - mean) / n + z**2 / (4 * n**2)),
    )
    return max(0.0, centre - half), min(1.0, centre + half)


class Estimate(NamedTuple):
    """A mean over problems and its 95 % interval."""

    mean: float
    low: float
    high: float


def critic_scores(predicted, label) -> dict[str, float]:
    """How well a critic finds flawed solutions, and the flaw in them.

    A solution is flawed where label, the index of its first wrong step, is not -1, and is called flawed where predicted
    is not -1. accuracy, precision, recall and f1 are those of the call (FlawedPositiveBench); location is the share of
    exact indices; process_f1 is the harmonic mean of that share among the flawed and among the others (ProcessBench).

    No verdict (NaN or below -1) is taken for the wrong one, where the published script takes it for a call. Rows
    without label (NaN) are left out; a rate of nothing is NaN.

    Source: Zheng et al., arXiv 2412.06559; Ding et al., arXiv 2510.22543.
    """
    predicted, label = (np.asarray(values, float) for values in (predicted, label))
    predicted, label = predicted[~np.isnan(label)], label[~np.isnan(label)]
    flawed, exact = label != -1, predicted == label
    called = np.where(predicted >= -1, predicted != -1, ~flawed)
    precision, recall = _mean(flawed[called]), _mean(called[flawed])
    return {
        "accuracy": _mean(called == flawed),
        "precision": precision,
        "recall": recall,
        "f1": _harmonic_mean(precision, recall),
        "location": _mean(exact),
        "process_f1": _harmonic_mean(_mean(exact[flawed]), _mean(exact[~flawed])),
    }


def _harmonic_mean(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else a + b


def estimate(per_problem) -> Estimate:
    return Estimate(_mean(per_problem), *confidence_interval(per_problem))


def evaluate(
    engine: Engine,
    weights: Any,
    task: Task,
    examples: Examples,
    sampling: Sampling,
    key: jax.Array,
    *,
    samples: int,
    batch_prompts: int,
) -> tuple[dict, list[dict]]:
    """Draws `samples` completions of each example; returns the results and one record a sample.

    Batches hold batch_prompts prompts, the last one filled up with repeats that are thrown away, so that all share
    one compiled shape. A sample that could not be scored counts in `errors` and in no rate; a problem without any
    scored sample leaves the means.

    Raises:
      ValueError: there are no examples.
    """
    if not len(examples):
        raise ValueError("there are no problems to evaluate on: give the task some, such as task.evaluation_path")
    records = []
    for batch, start in enumerate(range(0, len(examples), batch_prompts)):
        chosen = [examples[i] for i in range(start, min(start + batch_prompts, len(examples)))]
        padded = chosen + [chosen[0]] * (batch_prompts - len(chosen))
        rollout = engine.generate(
            weights,
            Prompts(padded, [task.prompt(example) for example in padded]),
            jax.random.fold_in(key, batch),
            group_size=samples,
            sampling=sampling,
        )
        rows = [example for example in chosen for _ in range(samples)]
        rollout = jax.tree.map(operator.itemgetter(slice(len(rows))), rollout)
        completions = collect.decode(task.tokenizer, rollout)
        scores, errors = task.score(rows, completions)
        records += [
            {
                "id": example["id"],
                "completion": completion,
                "answer": task.answer(completion),
                "length": int(mask.sum()),
                "truncated": bool(truncated),
                "error": error,
                **{name: float(values[i]) for name, values in scores.items()},
            }
            for i, (example, completion, mask, truncated, error) in enumerate(
                zip(rows, completions, rollout.mask, rollout.truncated, errors, strict=True)
            )
        ]
    return summarise(records, samples, sorted(scores)), records


def summarise(records: Sequence[dict], samples: int, channels: Sequence[str]) -> dict:
    """pass@k for the powers of two up to `samples`, avg@k, maj@k, channel means, lengths, truncation, error counts.

    Channels "predicted" and "label" are a critic's; they give critic_precision and the others of `critic_scores`.
    """
    table = {name: np.array([r[name] for r in records]).reshape(-1, samples) for name in channels}
    correct = table["correct"]
    scored = np.sum(~np.isnan(correct), axis=1)
    right = np.nansum(correct > 0, axis=1)
    powers = [2**i for i in range(samples.bit_length()) if 2**i <= samples]
    passes = {
        f"pass@{k}": estimate(
            [pass_at_k(n, c, k) if n >= k else np.nan for n, c in zip(scored, right, strict=True)]
        )._asdict()
        for k in powers
    }
    answers = np.array([r["answer"] for r in records], dtype=object).reshape(-1, samples)
    critic = critic_scores(table["predicted"], table["label"]) if {"predicted", "label"} <= set(channels) else {}
    votes = [_majority_is_right(list(a), c) for a, c in zip(answers, correct, strict=True)]
    return {
        **passes,
        f"avg@{samples}": average_at_k(correct),
        f"maj@{samples}": estimate(votes)._asdict(),
        **{f"mean_{name}": _mean(values) for name, values in table.items() if name != "correct"},
        **{f"critic_{name}": value for name, value in critic.items()},
        "problems": len(correct),
        "samples": samples,
        "mean_length": float(np.mean([r["length"] for r in records])),
        "truncated": float(np.mean([r["truncated"] for r in records])),
        "errors": int(np.isnan(correct).sum()),
    }

"""How good is a policy: unbiased pass@k, avg@k, maj@k, with confidence intervals over problems."""

import operator
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tapojax.rewards import spelling
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
    """Share of problems whose most frequent answer is right; ties go to the answer seen first, none never wins a vote.

    All right answers are one candidate, however they are written; the others are told apart by their spelling (our
    choice), so that both have all of their votes. Samples that were not scored (NaN) have no vote; a problem without
    any scored sample is left out.

    Args:
      answers: per problem, the k extracted answers (None or "": no answer).
      correct: [problems, k], whether each sample was right.
    """
    return _mean([_majority_is_right(a, c) for a, c in zip(answers, correct, strict=True)])


def _majority_is_right(answers, correct) -> float:
    scored = [(answer, right) for answer, right in zip(answers, correct, strict=True) if not np.isnan(right)]
    votes = Counter((right > 0, "" if right > 0 else _spelt(answer)) for answer, right in scored if answered(answer))
    if not votes:
        return 0.0 if scored else float("nan")
    (right, _), _ = votes.most_common(1)[0]  # ties in the order of first sight
    return float(right)


def _spelt(answer: Any) -> Any:
    return spelling.key(spelling.tidy(answer)) if isinstance(answer, str) else answer


def answered(answer: Any) -> bool:
    """Whether an extracted answer is one: an empty box says as little as none."""
    return answer is not None and answer != ""


def _mean(values) -> float:
    """Mean of what is not NaN; NaN where nothing is."""
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


def confidence_interval(per_problem, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a mean of shares in [0, 1] over problems, the clusters: Wilson's, of as many as they are worth.

    With mean m of n problems and q = m (1 - m), Wilson's interval is of N problems that are right or wrong:

        (m + z²/2N ± z sqrt(q/N + z²/4N²)) / (1 + z²/N),    N = n (n q + ¼) / (Σ (share - m)² + ¼)

    N is n where each problem is wholly right or wrong, and where none or all are. Shares in between vary less, and N is
    n q / variance of them: away from 0 and 1 the interval is m ± z · std / sqrt(n). The ¼, the variance of one more
    problem that is right half of the time, keeps a few equal shares from being sure (our choice). NaN are left out, and
    nothing but NaN gives (NaN, NaN).

    Source: Wilson, JASA 22 (1927); the effective number as in Korn and Graubard, Survey Methodology 24 (1998).
    """
    values = np.asarray(per_problem, float)
    values = values[~np.isnan(values)]
    n, mean = len(values), _mean(values)
    if n == 0:
        return mean, mean
    spread = mean * (1 - mean)
    effective = n * (n * spread + 0.25) / (np.sum((values - mean) ** 2) + 0.25)
    doubt = z**2 / effective
    centre, half = mean + doubt / 2, z * np.sqrt(spread / effective + doubt / (4 * effective))
    low, high = (centre - half) / (1 + doubt), (centre + half) / (1 + doubt)
    return max(0.0, float(low)), min(1.0, float(high))


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


def critic_table(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the papers report of a critic: its scores on each subset of a benchmark, and over all of them.

    A record holds predicted and label as in `critic_scores`, final_answer_correct where it is known, and its subset:
    "subset", or else what its id has before the number ("gsm8k" of "processbench/gsm8k-17"). Rows whose label is
    missing or below -1, unknown, do not count.

    subsets           by name: `critic_scores`, among them process_f1, the harmonic mean of "erroneous" and "correct",
                      the shares of exact verdicts among flawed and other solutions (ProcessBench, arXiv 2412.06559)
    average           unweighted mean over the subsets: ProcessBench's last column
    pooled            all rows as one set, which is what FAPO's script prints as ProcessBench F1
    flawed_positives  those of right final answers as one set: FlawedPositiveBench (FAPO, arXiv 2510.22543)

    All have "rows" and "no_verdict", the share of rows without one. It counts against the critic; the script of FAPO
    counts it as a call, which is found where the solution is flawed, and fails where a rate is 0 / 0.
    """
    subsets: dict[str, list] = {}
    for record in records:
        subsets.setdefault(subset_of(record), []).append(record)
    table = {name: _critic_row(rows) for name, rows in sorted(subsets.items())}
    keys = next(iter(table.values()), {})
    return {
        "subsets": table,
        "average": {key: float(np.mean([row[key] for row in table.values()])) for key in keys if key != "rows"},
        "pooled": _critic_row(records),
        "flawed_positives": _critic_row([r for r in records if r.get("final_answer_correct")]),
    }


def subset_of(record: Mapping[str, Any]) -> str:
    return record.get("subset") or str(record["id"]).rpartition("/")[2].rpartition("-")[0]


def _critic_row(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    predicted, label = (np.array([r[name] for r in records], float) for name in ("predicted", "label"))
    predicted, label = predicted[label >= -1], label[label >= -1]
    exact = predicted == label
    return {
        "rows": len(label),
        "erroneous": _mean(exact[label != -1]),
        "correct": _mean(exact[label == -1]),
        **critic_scores(predicted, label),
        "no_verdict": _mean(~(predicted >= -1)),
    }


def critic_vote(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One record of each id: the verdict that most of its samples give, the first of those that tie.

    Samples without verdict have no vote, and where none has one there is none; as in the published scripts.
    """
    by_id: dict[str, list] = {}
    for record in records:
        by_id.setdefault(record["id"], []).append(record)
    voted = []
    for rows in by_id.values():
        votes = Counter(row["predicted"] for row in rows if np.asarray(row["predicted"], float) >= -1)
        voted.append({**rows[0], "predicted": votes.most_common(1)[0][0] if votes else None})
    return voted


def first_error(scores, threshold: float) -> int | None:
    """The verdict that probabilities of steps are: the first below threshold, -1 where none is; None without any."""
    if scores is None:
        return None
    below = np.flatnonzero(np.asarray(scores) < threshold)
    return int(below[0]) if below.size else -1


def critic_threshold(records: Sequence[Mapping[str, Any]]) -> float:
    """The threshold on "step_scores" under which a process reward model has its best process_f1 on these records.

    ProcessBench finds it on its subset gsm8k and takes it for all. The least of equally good ones; records without
    scores are left out.

    Raises:
      ValueError: no flawed solution among them, or no other.
    """
    known = [record for record in records if record["step_scores"] is not None and record["label"] >= -1]
    label = np.array([record["label"] for record in known])
    if not np.any(label == -1) or np.all(label == -1):
        raise ValueError("a threshold needs flawed and other solutions with scores: take a larger or another subset")
    scores = np.full((len(known), max(len(record["step_scores"]) for record in known)), np.inf)
    for row, record in zip(scores, known, strict=True):
        row[: len(record["step_scores"])] = record["step_scores"]

    def quality(threshold) -> float:
        below = scores < threshold
        return critic_scores(np.where(below.any(axis=1), below.argmax(axis=1), -1), label)["process_f1"]

    return float(max(np.unique([0.0, 1.0, *scores[np.isfinite(scores)]]), key=quality))


def _harmonic_mean(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else a + b


def estimate(per_problem) -> Estimate:
    return Estimate(_mean(per_problem), *confidence_interval(per_problem))


def paired_difference(per_problem, baseline) -> Estimate:
    """Mean over problems of per_problem - baseline and its 95 % interval, of the problems that have both.

    mean ± z · std(ddof 1) / sqrt(problems). Where all differences are equal the half width is z² / (n + z²), Wilson's
    bound of a share of which none of n was seen (our choice). The problem is the unit, so samples of one count once.
    """
    found = np.asarray(per_problem, float) - np.asarray(baseline, float)
    found = found[~np.isnan(found)]
    n, mean, z = len(found), _mean(found), 1.96
    if n == 0:
        return Estimate(mean, mean, mean)
    half = z * found.std(ddof=1) / np.sqrt(n) if np.ptp(found) > 0 else z**2 / (n + z**2)
    return Estimate(mean, max(-1.0, mean - half), min(1.0, mean + half))


def mean_of_sets(sets: Sequence[Estimate]) -> Estimate:
    """Unweighted mean of estimates of different problems; each half of the interval is sqrt(Σ half²) / sets.

    The lower halves make the lower one, the upper halves the upper one. An estimate that is NaN makes all of it NaN.
    """
    mean, low, high = np.array(sets, float).T
    centre = float(np.mean(mean))
    below, above = (float(np.hypot.reduce(half)) / len(sets) for half in (mean - low, high - mean))
    return Estimate(centre, centre - below, centre + above)


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
    how = dict(samples=samples, batch_prompts=batch_prompts)
    done = list(parts(engine, weights, task, examples, sampling, key, **how))
    records = [record for part in done for record in part.records]
    return summarise(records, samples, done[-1].channels), records


class Part(NamedTuple):
    """One batch of an evaluation: a record a sample, the score channels among their keys, seconds by stage."""

    records: list[dict]
    channels: list[str]
    seconds: dict[str, float]


def parts(
    engine: Engine,
    weights: Any,
    task: Task,
    examples: Examples,
    sampling: Sampling,
    key: jax.Array,
    *,
    samples: int,
    batch_prompts: int,
    start: int = 0,
) -> Iterator[Part]:
    """The batches of `evaluate` from the one called `start` on; what a batch draws depends on key and its number."""
    for batch, first in list(enumerate(range(0, len(examples), batch_prompts)))[start:]:
        chosen = [examples[i] for i in range(first, min(first + batch_prompts, len(examples)))]
        padded = chosen + [chosen[0]] * (batch_prompts - len(chosen))
        began = time.perf_counter()
        rollout = engine.generate(
            weights,
            Prompts(padded, [task.prompt(example) for example in padded]),
            jax.random.fold_in(key, batch),
            group_size=samples,
            sampling=sampling,
        )
        sampled = time.perf_counter()
        rows = [example for example in chosen for _ in range(samples)]
        rollout = jax.tree.map(operator.itemgetter(slice(len(rows))), rollout)
        completions = collect.decode(task.tokenizer, rollout)
        scores, errors = task.score(rows, completions)
        seconds = {"sample": sampled - began, "score": time.perf_counter() - sampled}
        records = [
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
        yield Part(records, sorted(scores), seconds)


def summarise(records: Sequence[dict], samples: int, channels: Sequence[str], ks: Sequence[int] = ()) -> dict:
    """pass@k, avg@k, maj@k, channel means, lengths, truncation, error counts; pass@k for ks [powers of two].

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
        for k in ks or powers
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


def per_problem(records: Sequence[Mapping], samples: int) -> list[float]:
    """The share of right samples of each problem, NaN where none was scored; a sample's score may be NaN or None."""
    rows = np.array([r["correct"] for r in records], float).reshape(-1, samples)
    return [_mean(row) for row in rows]


def completion_rates(records: Sequence[dict]) -> dict[str, float]:
    """Median and 95th percentile of the lengths, and the share of completions that an answer could be read from."""
    median, high = np.percentile([r["length"] for r in records], [50, 95])
    share = np.mean([answered(r["answer"]) for r in records])
    return {"median_length": float(median), "p95_length": float(high), "answered": float(share)}

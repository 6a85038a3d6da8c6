"""The estimators agree with enumeration, the intervals cover, and a sample without a score counts in no rate."""

import itertools

import jax
import numpy as np
import pytest

from tapojax import evaluation
from tapojax.types import Engine, Rollout, Sampling, Task

NAN = float("nan")


# ---- pass@k


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_sample(n):
    for c in range(n + 1):
        samples = [1] * c + [0] * (n - c)
        for k in range(1, n + 1):
            share = np.mean([max(subset) for subset in itertools.combinations(samples, k)])
            np.testing.assert_allclose(evaluation.pass_at_k(n, c, k), share, atol=1e-12, err_msg=f"{n=} {c=} {k=}")


def test_pass_at_k_edges():
    assert evaluation.pass_at_k(8, 0, 3) == 0, "nothing right"
    assert evaluation.pass_at_k(8, 8, 1) == 1, "all right"
    assert evaluation.pass_at_k(8, 1, 8) == 1 and evaluation.pass_at_k(8, 0, 8) == 0, "k = n takes all samples"
    np.testing.assert_allclose(evaluation.pass_at_k(200, 7, 1), 7 / 200, rtol=1e-12)
    assert 0.999 < evaluation.pass_at_k(100_000, 100, 10_000) < 1, "factorials would overflow"


def test_pass_at_k_broadcasts():
    got = evaluation.pass_at_k(np.array([[4], [6]]), np.array([0, 1, 3]), 2)
    want = [[evaluation.pass_at_k(n, c, 2) for c in (0, 1, 3)] for n in (4, 6)]
    np.testing.assert_allclose(got, want)
    np.testing.assert_allclose(evaluation.pass_at_k(4, 2, np.array([1, 2, 4])), [0.5, 1 - 1 / 6, 1])


@pytest.mark.parametrize("n, c, k", [(4, 2, 0), (4, 2, 5), (4, 5, 1), (4, -1, 1), (4, [1, 9], 2)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match="1 <= k <= n and 0 <= c <= n"):
        evaluation.pass_at_k(n, c, k)


# ---- avg@k, maj@k


def test_average_at_k_leaves_out_what_was_not_scored():
    assert evaluation.average_at_k([[1, 0], [1, 1]]) == 0.75
    assert evaluation.average_at_k([[1, NAN], [0, 1]]) == pytest.approx(2 / 3)
    assert np.isnan(evaluation.average_at_k([[NAN, NAN]]))


@pytest.mark.parametrize(
    "answers, correct, want, why",
    [
        (["4", "5", "5"], [0, 1, 1], 1, "the most frequent answer wins"),
        (["4", "5", "5", "4"], [1, 0, 0, 1], 1, "a tie goes to the answer seen first"),
        (["5", "4", "5", "4"], [0, 1, 0, 1], 0, "a tie goes to the answer seen first"),
        ([None, None, None, "7"], [0, 0, 0, 1], 1, "None never wins a vote"),
        ([None, None], [0, 0], 0, "nobody answered"),
        (["5", "5", "4"], [NAN, NAN, 1], 1, "unscored samples have no vote"),
        (["5", "5", "4"], [NAN, 1, 0], 1, "the winner's verdict comes from a sample that has one"),
        ([None, "4"], [0, NAN], 0, "no answer among the scored samples"),
        (["", "", "", "7"], [0, 0, 0, 1], 1, "an empty box has no vote"),
        (["", ""], [0, 0], 0, "nobody answered"),
        (["7", "7", "1/2", "0.5"], [0, 0, 1, 1], 0, "a tie of two right ones and two of 7"),
        (["7", "7", "1/2", "0.5", r"\frac12"], [0, 0, 1, 1, 1], 1, "right answers are one candidate"),
        (["1/2", "0.5", "7", "$7$", "7."], [1, 1, 0, 0, 0], 0, "wrong ones are told apart by their spelling"),
        ([3, 3, 4], [0, 0, 1], 0, "answers may be no texts"),
        (["4", "5"], [NAN, NAN], NAN, "nothing was scored"),
    ],
)
def test_majority_at_k(answers, correct, want, why):
    np.testing.assert_equal(evaluation.majority_at_k([answers], [correct]), float(want), err_msg=why)


def test_majority_at_k_is_a_share_of_scored_problems():
    answers = [["1", "1"], ["2", "3"], ["4", "4"], ["5", "5"]]
    correct = [[1, 1], [1, 0], [0, 0], [NAN, NAN]]
    assert evaluation.majority_at_k(answers, correct) == pytest.approx(2 / 3)


# ---- confidence intervals


@pytest.mark.parametrize("problems, draw", [(30, "binary"), (200, "binary"), (60, "rates")])
def test_intervals_cover_the_truth(problems, draw):
    """2,000 simulated evaluations; the 95 % interval holds the true mean in 92 to 98 % of them."""
    rng, truth = np.random.default_rng(0), 0.4
    rates = rng.beta(0.8, 1.2, (2000, problems))  # problems differ in difficulty; the mean of the beta is 0.4
    values = rng.random((2000, problems)) < truth if draw == "binary" else rng.binomial(8, rates) / 8
    intervals = np.array([evaluation.confidence_interval(v) for v in values])
    coverage = np.mean((intervals[:, 0] <= truth) & (truth <= intervals[:, 1]))
    assert 0.92 < coverage < 0.98, f"coverage {coverage:.3f}"


def test_interval_by_hand():
    """q = 1/4, squares add to 1/2: N = 4 (1 + 1/4) / (1/2 + 1/4) = 20/3; Wilson's half at 1/2 is z / 2 sqrt(N + z²)."""
    low, high = evaluation.confidence_interval([0.0, 0.5, 1.0, 0.5])
    half = 1.96 / 2 / np.sqrt(20 / 3 + 1.96**2)
    np.testing.assert_allclose([low, high], [0.5 - half, 0.5 + half])
    assert evaluation.confidence_interval([0.0, 0.5, NAN, 1.0, 0.5]) == (low, high), "NaN problems are left out"


def wilson(mean, n, z=1.96):
    """The roots of (mean - x)² = z² x (1 - x) / n."""
    return np.sort(np.roots([1 + z**2 / n, -2 * mean - z**2 / n, mean**2]))


@pytest.mark.parametrize("right", [1, 2, 15, 29])
def test_problems_that_are_right_or_wrong_have_wilsons_interval(right):
    got = evaluation.confidence_interval([1.0] * right + [0.0] * (30 - right))
    np.testing.assert_allclose(got, wilson(right / 30, 30), rtol=1e-9)


def test_intervals_near_the_ends_by_hand():
    """Of 30 problems x 8 samples. One sample right: n q = 239/1920, squares add to 29/1920, so N = 30 · 719/509."""
    none, sample, problem = ([value] + [0.0] * 29 for value in (0.0, 1 / 8, 1.0))
    np.testing.assert_allclose(evaluation.confidence_interval(none), [0, 1.96**2 / (30 + 1.96**2)])
    np.testing.assert_allclose(evaluation.confidence_interval(sample), wilson(1 / 240, 30 * 719 / 509), rtol=1e-9)
    np.testing.assert_allclose(evaluation.confidence_interval(problem), [0.005908, 0.166708], atol=1e-6)
    mirrored = evaluation.confidence_interval([1 - value for value in sample])
    np.testing.assert_allclose(mirrored[::-1], 1 - np.array(evaluation.confidence_interval(sample)))


@pytest.mark.parametrize("n, value", [(30, 0.0), (30, 0.5), (200, 1.0)])
def test_intervals_have_no_jump_where_problems_agree(n, value):
    agree = evaluation.confidence_interval([value] * n)
    almost = evaluation.confidence_interval([value] * (n - 1) + [abs(value - 1e-6)])
    np.testing.assert_allclose(almost, agree, atol=1e-5)


def test_away_from_the_ends_the_interval_is_that_of_the_mean():
    rates = np.random.default_rng(0).binomial(4, 0.3 + 0.4 * (np.arange(2000) % 2)) / 4
    half = 1.96 * rates.std(ddof=1) / np.sqrt(2000)
    got = evaluation.confidence_interval(rates)
    np.testing.assert_allclose(got, [rates.mean() - half, rates.mean() + half], atol=0.005 * half)


@pytest.mark.parametrize("mean, total", [(0.02, 2.5), (0.05, 2.0), (0.95, 2.0), (0.95, 20.0)])
def test_intervals_cover_near_the_ends(mean, total):
    """30 problems x 8 samples, 1,000 times: mean ± z · std / sqrt(n) holds the truth in 82 % of the first of these."""
    rng = np.random.default_rng(0)
    values = rng.binomial(8, rng.beta(mean * total, (1 - mean) * total, (1000, 30))) / 8
    intervals = np.array([evaluation.confidence_interval(v) for v in values])
    assert np.mean((intervals[:, 0] <= mean) & (mean <= intervals[:, 1])) > 0.94


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1.0])
def test_problems_that_agree_still_leave_doubt(value):
    """Squares add to 0: N = 10 (10 q + ¼) / ¼; also where rounding makes the std of equal numbers more than 0."""
    low, high = evaluation.confidence_interval([value] * 10)
    np.testing.assert_allclose([low, high], wilson(value, 10 * (40 * value * (1 - value) + 1)), atol=1e-12)
    assert 0 <= low <= value <= high <= 1 and high - low > 0.17
    wide, narrow = (np.ptp(evaluation.confidence_interval([value] * n)) for n in (10, 1000))
    assert narrow < wide / 5, "more problems, less doubt"


def test_wilson_by_hand():
    """10 of 10: the lower limit is n / (n + z²)."""
    np.testing.assert_allclose(evaluation.confidence_interval([1.0] * 10), [10 / (10 + 1.96**2), 1.0])


def test_one_problem_and_none():
    low, high = evaluation.confidence_interval([1.0])
    assert 0 < low < 0.5 and high == 1
    assert np.isnan(evaluation.confidence_interval([NAN, NAN])).all()
    assert np.isnan(evaluation.estimate([NAN])).all()


# ---- evaluate


class Letters:
    """Token 65 is "A"; token 0 ends a completion."""

    eos_token_id = pad_token_id = 0

    def __len__(self):
        return 128

    def encode(self, text):
        return [ord(letter) for letter in text]

    def decode(self, token_ids, skip_special_tokens=True):
        return "".join(chr(t) for t in token_ids if t)


def fake_engine(calls):
    """Completes prompt "q<number>" with the letters A, B, C, ... by place in the group; C is cut off."""

    def generate(weights, prompts, key, *, group_size, sampling, temperature=None, carry=()):
        calls.append((weights, prompts, jax.random.key_data(key).tolist(), group_size, sampling))
        rows = len(prompts.tokens) * group_size
        letters = np.tile(np.arange(65, 65 + group_size), len(prompts.tokens))
        tokens = np.zeros((rows, 4), np.int32)
        tokens[:, 0], tokens[:, 1] = 113, letters
        mask = np.tile([False, True, True, False], (rows, 1))
        mask[letters == 67, 2] = False
        zeros = np.zeros((rows, 4), np.float32)
        return Rollout(tokens, mask, zeros, zeros, np.ones(rows, np.int32), letters == 67, np.zeros(rows, np.int32))

    return Engine(load=lambda params, version: params, generate=generate)


def fake_task(verdict):
    def score(examples, completions):
        correct = np.array([verdict(e, c) for e, c in zip(examples, completions, strict=True)], np.float32)
        errors = ["judge down" if np.isnan(v) else None for v in correct]
        return {"correct": correct, "style": np.arange(len(correct), dtype=np.float32)}, errors

    return Task(
        tokenizer=Letters(),
        train=[],
        evaluation=[],
        prompt=lambda example: [113],
        score=score,
        answer=lambda completion: None if completion == "D" else completion,
    )


def problems(count):
    return [{"id": f"p{i}", "problem": "q", "answer": "A"} for i in range(count)]


def run(verdict, count, *, samples=2, batch_prompts=3, calls=None):
    return evaluation.evaluate(
        fake_engine([] if calls is None else calls),
        "weights",
        fake_task(verdict),
        problems(count),
        Sampling(2),
        jax.random.key(0),
        samples=samples,
        batch_prompts=batch_prompts,
    )


def is_answer(example, completion):
    return float(completion == example["answer"])


def test_the_last_batch_is_filled_up_and_thrown_away():
    calls = []
    results, records = run(is_answer, 7, calls=calls)
    assert [len(prompts.tokens) for _, prompts, *_ in calls] == [3, 3, 3], "all batches share one shape"
    assert [example["id"] for example in calls[-1][1].examples] == ["p6", "p6", "p6"]
    assert [record["id"] for record in records] == [f"p{i}" for i in range(7) for _ in range(2)]
    assert results["problems"] == 7 and results["samples"] == 2
    assert len({tuple(key) for _, _, key, *_ in calls}) == 3, "each batch has its own key"
    assert {weights for weights, *_ in calls} == {"weights"}


def test_one_record_a_sample():
    _, records = run(is_answer, 2, samples=3)
    assert records[2] == {
        "id": "p0",
        "completion": "C",
        "answer": "C",
        "length": 1,
        "truncated": True,
        "error": None,
        "correct": 0.0,
        "style": 2.0,
    }
    assert [r["completion"] for r in records] == list("ABCABC")


def test_rates_of_a_scored_evaluation():
    """One of four samples is right in every problem, and D gives no answer."""
    results, _ = run(is_answer, 5, samples=4)
    assert results["pass@1"]["mean"] == 0.25 and results["pass@4"]["mean"] == 1.0
    assert results["pass@2"]["mean"] == pytest.approx(evaluation.pass_at_k(4, 1, 2))
    assert results["avg@4"] == 0.25
    assert results["maj@4"]["mean"] == 1.0, "A, B and C tie, A was first"
    assert results["errors"] == 0 and results["truncated"] == 0.25
    assert results["mean_length"] == pytest.approx(1.75)
    assert results["mean_style"] == pytest.approx(np.mean([*range(12), *range(8)])), "of both batches"
    assert {"pass@1", "pass@2", "pass@4", "avg@4", "maj@4"} <= results.keys() and "mean_correct" not in results


def test_errors_count_in_no_rate():
    """p0: one of two samples unscored; p1: both; p2: none."""

    def verdict(example, completion):
        failed = example["id"] == "p1" or (example["id"] == "p0" and completion == "B")
        return NAN if failed else is_answer(example, completion)

    results, records = run(verdict, 3)
    assert results["errors"] == 3 and [r["error"] for r in records].count("judge down") == 3
    assert results["pass@1"]["mean"] == pytest.approx(0.75), "p0 is 1 of 1, p2 is 1 of 2, p1 is left out"
    assert results["pass@2"]["mean"] == 1.0, "only p2 has two scored samples"
    assert results["avg@2"] == pytest.approx(2 / 3)
    assert results["maj@2"]["mean"] == 1.0
    assert results["problems"] == 3


def test_an_evaluation_that_scored_nothing_says_so():
    results, _ = run(lambda example, completion: NAN, 2)
    assert results["errors"] == 4
    for name in ("pass@1", "pass@2", "maj@2"):
        assert np.isnan(results[name]["mean"]), f"{name} of nothing"


def test_samples_that_are_no_power_of_two():
    results, _ = run(is_answer, 2, samples=3)
    assert [name for name in results if name.startswith("pass@")] == ["pass@1", "pass@2"]
    assert "avg@3" in results and "maj@3" in results


def test_no_problems_is_an_error():
    with pytest.raises(ValueError, match="no problems to evaluate on"):
        run(is_answer, 0)


def test_an_evaluation_goes_on_in_the_middle_with_the_same_draws():
    calls = []
    given = ("weights", fake_task(is_answer), problems(7), Sampling(2), jax.random.key(0))
    whole = list(evaluation.parts(fake_engine(calls), *given, samples=2, batch_prompts=3))
    rest = list(evaluation.parts(fake_engine(calls), *given, samples=2, batch_prompts=3, start=1))
    assert [part.records for part in rest] == [part.records for part in whole[1:]]
    keys = [key for _, _, key, *_ in calls]
    assert keys[3:] == keys[1:3], "a batch's key depends on its number"
    assert whole[0].channels == ["correct", "style"] and whole[0].seconds.keys() == {"sample", "score"}


def test_pass_at_the_asked_ks():
    records = run(is_answer, 2, samples=3)[1]
    results = evaluation.summarise(records, 3, ["correct", "style"], [1, 3])
    assert [name for name in results if name.startswith("pass@")] == ["pass@1", "pass@3"]
    assert results["pass@3"]["mean"] == 1.0


def test_what_completions_are_like():
    """Of A, B, C, D: C is cut off and one token shorter, D gives no answer."""
    records = run(is_answer, 5, samples=4)[1]
    rates = evaluation.completion_rates(records)
    assert rates == {"median_length": 2.0, "p95_length": 2.0, "answered": 0.75}
    empty = [{**record, "answer": ""} if record["answer"] == "C" else record for record in records]
    assert evaluation.completion_rates(empty)["answered"] == 0.5, "an empty box is no answer"
    assert evaluation.per_problem(records, 4) == [0.25] * 5
    records[0]["correct"] = records[1]["correct"] = NAN
    assert evaluation.per_problem(records, 4)[0] == 0.0, "of the scored ones"
    assert np.isnan(evaluation.per_problem([{"correct": NAN}], 1)[0])


# ---- differences and means over sets


def test_a_paired_difference_by_hand():
    ours, theirs = [1.0, 0.5, 0.75, NAN, 1.0], [0.5, 0.5, 0.25, 1.0, NAN]
    mean, low, high = evaluation.paired_difference(ours, theirs)
    half = 1.96 * np.std([0.5, 0.0, 0.5], ddof=1) / np.sqrt(3)
    np.testing.assert_allclose([mean, low, high], [1 / 3, 1 / 3 - half, 1 / 3 + half])
    back = evaluation.paired_difference(theirs, ours)
    np.testing.assert_allclose([back.mean, back.low, back.high], [-mean, -high, -low])


def test_equal_differences_still_leave_doubt():
    n, bound = 30, 1.96**2 / (30 + 1.96**2)
    np.testing.assert_allclose(evaluation.paired_difference([0.5] * n, [0.5] * n), [0, -bound, bound])
    np.testing.assert_allclose(evaluation.paired_difference([1.0] * n, [0.0] * n), [1, 1 - bound, 1])
    assert np.isnan(evaluation.paired_difference([NAN], [1.0])).all()


def test_pairing_sees_what_two_intervals_do_not():
    """Problems differ much in difficulty, the policies by 0.05 on each."""
    rng = np.random.default_rng(0)
    base = rng.uniform(0.1, 0.8, 60)
    ours = base + 0.05 + rng.normal(0, 0.05, 60)
    assert evaluation.paired_difference(ours, base).low > 0
    assert evaluation.estimate(ours).low < evaluation.estimate(base).high


def test_paired_intervals_cover_the_truth():
    rng, covered = np.random.default_rng(1), 0
    for _ in range(1000):
        p = rng.beta(0.8, 1.2, 50)
        a, b = rng.binomial(8, p) / 8, rng.binomial(8, np.clip(p + 0.1, 0, 1)) / 8
        _, low, high = evaluation.paired_difference(b, a)
        covered += low <= np.mean(np.clip(p + 0.1, 0, 1) - p) <= high
    assert covered > 930


def test_the_mean_over_sets_by_hand():
    """Lower halves 0.1 and 0.2 of two sets: sqrt(0.01 + 0.04) / 2; upper halves 0.3 and 0.4: 0.25."""
    sets = [evaluation.Estimate(0.5, 0.4, 0.8), evaluation.Estimate(0.3, 0.1, 0.7)]
    np.testing.assert_allclose(evaluation.mean_of_sets(sets), [0.4, 0.4 - np.sqrt(0.05) / 2, 0.4 + 0.25])
    assert evaluation.mean_of_sets(sets[:1]) == pytest.approx(sets[0])
    assert evaluation.mean_of_sets([evaluation.Estimate(0.0, -0.2, 0.2)]).low == pytest.approx(-0.2)
    assert evaluation.mean_of_sets([evaluation.Estimate(0.0, 0.0, 0.2)]).low == 0.0
    assert evaluation.mean_of_sets([evaluation.Estimate(0.0, 0.0, 0.2)] * 3)[::2] == pytest.approx((0, 0.2 / 3**0.5))
    assert np.isnan(evaluation.mean_of_sets([*sets, evaluation.estimate([NAN])])).all()


# ---- critics


def test_critic_scores_by_hand():
    """2 of 3 flawed found, one of them at its place; 1 of 3 others called; one of each without verdict."""
    label = [1, 0, 2, -1, -1, -1, 1, -1]
    predicted = [1, 2, -1, -1, -1, 0, -2, NAN]
    scores = evaluation.critic_scores(predicted, label)
    precision, recall = 2 / 4, 2 / 4  # called are 2 flawed and 2 others, the one without verdict among them
    expected = {
        "accuracy": 4 / 8,
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall),
        "location": 3 / 8,
        "process_f1": 2 * (1 / 4) * (2 / 4) / (1 / 4 + 2 / 4),
    }
    assert scores == pytest.approx(expected)
    assert evaluation.critic_scores([*predicted, 0], [*label, NAN]) == scores, "no label, no score"


def test_critic_scores_at_their_ends():
    label = np.array([-1, 0, 1])
    assert set(evaluation.critic_scores(label, label).values()) == {1.0}
    assert set(evaluation.critic_scores([1, -1, -1], label).values()) == {0.0}
    silent = evaluation.critic_scores([-1, -1, -1], label)
    assert np.isnan(silent["precision"]) and np.isnan(silent["f1"]) and silent["recall"] == 0, "nothing was called"
    assert all(np.isnan(value) for value in evaluation.critic_scores([], []).values())


def test_a_critics_evaluation_has_its_scores():
    records = [
        {"correct": 1.0, "predicted": p, "label": y, "answer": str(p), "length": 1, "truncated": False}
        for p, y in ((1.0, 1.0), (-1.0, 0.0), (-1.0, -1.0), (0.0, 0.0))
    ]
    results = evaluation.summarise(records, 2, ["correct", "label", "predicted"])
    want = evaluation.critic_scores([1, -1, -1, 0], [1, 0, -1, 0])
    assert {name: results[f"critic_{name}"] for name in want} == want
    plain = evaluation.summarise(records, 2, ["correct", "label"])
    assert not any(name.startswith("critic_") for name in plain)

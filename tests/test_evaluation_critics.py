"""Tables of critics by hand: what ProcessBench and FlawedPositiveBench report, and where the published scripts fail."""

import collections
import gzip
import json

import numpy as np
import pytest

from tapojax import evaluation
from tapojax.tasks.critique_files import critique_files
from tests.tasks.test_files import save_tokenizer


def record(id, label, predicted, right=True, **keys):
    return {"id": id, "label": label, "predicted": predicted, "final_answer_correct": right, **keys}


RECORDS = [
    record("bench/gsm8k-0", 1, 1),
    record("bench/gsm8k-1", 0, 2),  # called, at the wrong step
    record("bench/gsm8k-2", -1, -1),
    record("bench/gsm8k-3", -1, -1),
    record("bench/gsm8k-4", -1, 0),
    record("math-0", 3, 3, right=False),
    record("math-1", 2, None),  # no verdict
    record("math-2", 1, -1, right=False),
    record("math-3", -1, -1),
    record("math-4", -1, float("nan")),
]


def test_subsets_by_hand():
    table = evaluation.critic_table(RECORDS)
    assert list(table["subsets"]) == ["gsm8k", "math"]
    gsm8k, math = table["subsets"]["gsm8k"], table["subsets"]["math"]
    assert (gsm8k["rows"], gsm8k["erroneous"], gsm8k["correct"]) == (5, 1 / 2, pytest.approx(2 / 3))
    assert gsm8k["process_f1"] == pytest.approx(2 * (1 / 2) * (2 / 3) / (1 / 2 + 2 / 3)), "harmonic mean"
    assert (math["erroneous"], math["correct"]) == (pytest.approx(1 / 3), 1 / 2)
    assert math["process_f1"] == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)), "no verdict is never exact"
    assert (gsm8k["no_verdict"], math["no_verdict"]) == (0, 2 / 5)


def test_the_average_is_over_subsets_and_pooled_is_over_rows():
    table = evaluation.critic_table(RECORDS)
    of_sets = [row["process_f1"] for row in table["subsets"].values()]
    assert table["average"]["process_f1"] == pytest.approx(np.mean(of_sets)) and "rows" not in table["average"]
    erroneous, correct = 2 / 5, 3 / 5
    assert table["pooled"]["process_f1"] == pytest.approx(2 * erroneous * correct / (erroneous + correct))
    assert table["pooled"]["rows"] == 10


def test_flawed_positives_by_hand():
    """Right final answers alone: flawed are gsm8k-0, gsm8k-1, math-1; called are gsm8k-0, -1, -4 and math-4."""
    row = evaluation.critic_table(RECORDS)["flawed_positives"]
    assert row["rows"] == 8
    assert (row["precision"], row["recall"], row["accuracy"]) == (2 / 4, pytest.approx(2 / 3), 5 / 8)
    assert row["f1"] == pytest.approx(2 * (1 / 2) * (2 / 3) / (1 / 2 + 2 / 3))


def published_flawed_positives(records):
    """FAPO's script, in numbers: no verdict is a call, as None != -1."""
    rows = [r for r in records if r["final_answer_correct"]]
    called = [r for r in rows if r["predicted"] != -1]
    flawed = [r for r in rows if r["label"] != -1]
    both = [r for r in called if r["label"] != -1]
    precision, recall = len(both) / len(called), len(both) / len(flawed)
    return precision, recall, 2 * precision * recall / (precision + recall)


def test_where_every_critique_has_a_verdict_the_published_script_agrees():
    rng = np.random.default_rng(0)
    records = [record(f"s-{i}", *rng.integers(-1, 3, 2).tolist(), right=bool(rng.random() < 0.6)) for i in range(300)]
    row = evaluation.critic_table(records)["flawed_positives"]
    np.testing.assert_allclose([row["precision"], row["recall"], row["f1"]], published_flawed_positives(records))
    silent = [r | {"predicted": None} if i % 3 == 0 else r for i, r in enumerate(records)]
    assert published_flawed_positives(silent)[1] > evaluation.critic_table(silent)["flawed_positives"]["recall"], (
        "a critic without verdict finds flaws by the script"
    )


def test_a_critic_that_is_never_right_has_f1_0_where_the_published_script_divides_by_0():
    table = evaluation.critic_table([record("a-0", 1, -1), record("a-1", -1, 0)])
    assert table["average"]["process_f1"] == 0 and table["flawed_positives"]["f1"] == 0


def test_a_set_without_flawed_solutions_has_no_f1_and_rows_without_label_do_not_count():
    table = evaluation.critic_table(
        [record("a-0", -1, -1), record("a-1", None, 3), record("a-2", -2, -1), record("b-0", 1, 1)]
    )
    assert table["subsets"]["a"]["rows"] == 1 and table["subsets"]["a"]["correct"] == 1
    assert np.isnan(table["subsets"]["a"]["process_f1"]) and np.isnan(table["average"]["process_f1"])
    assert evaluation.critic_table([])["subsets"] == {}


def test_names_of_subsets():
    names = [{"id": "processbench/gsm8k-17"}, {"id": "olympiadbench-3"}, {"id": "7"}, {"id": "x-1", "subset": "own"}]
    assert [evaluation.subset_of(r) for r in names] == ["gsm8k", "olympiadbench", "", "own"]


def test_the_vote_of_samples():
    samples = [3, 1, 1, None, -2, 3]  # 3 and 1 tie, 3 was first
    records = [record("a-0", 3, p) for p in samples] + [record("a-1", 0, p) for p in (None, -2)]
    voted = evaluation.critic_vote(records)
    assert [r["predicted"] for r in voted] == [3, None] and [r["id"] for r in voted] == ["a-0", "a-1"]
    assert evaluation.critic_table(voted)["pooled"]["erroneous"] == 1 / 2


# ---- process reward models


def test_the_first_step_below_the_threshold():
    assert evaluation.first_error([0.9, 0.4, 0.1], 0.5) == 1
    assert evaluation.first_error([0.9, 0.5], 0.5) == -1, "a score at the threshold is right"
    assert evaluation.first_error(None, 0.5) is None


def scored(label, *scores):
    return record("gsm8k-0", label, None, step_scores=list(scores))


def test_the_best_threshold():
    """Above .3 and up to .6 all three are exact; below the first error is missed, above a right step is called."""
    records = [scored(1, 0.8, 0.3), scored(-1, 0.7, 0.6), scored(0, 0.2, 0.1)]
    threshold = evaluation.critic_threshold([*records, record("gsm8k-9", 1, None, step_scores=None)])
    assert threshold == 0.6, "of the scores themselves, the least that is best"
    predicted = [evaluation.first_error(r["step_scores"], threshold) for r in records]
    assert predicted == [1, -1, 0]


def test_a_threshold_agrees_with_trying_all():
    rng = np.random.default_rng(1)
    records = [scored(int(rng.integers(-1, n)), *rng.random(n)) for n in rng.integers(1, 6, 60)]

    def f1(threshold):
        found = [r | {"predicted": evaluation.first_error(r["step_scores"], threshold)} for r in records]
        return evaluation.critic_table(found)["pooled"]["process_f1"]

    assert f1(evaluation.critic_threshold(records)) == max(f1(s) for r in records for s in r["step_scores"])


def test_a_threshold_needs_both_kinds():
    for label in (-1, 0):
        with pytest.raises(ValueError, match="flawed and other solutions"):
            evaluation.critic_threshold([scored(label, 0.5)])


# ---- the benchmark itself


def test_processbench_has_its_published_subsets(shared):
    """Counts and erroneous ones as in the paper; a critic that says what the labels say has 1 everywhere."""
    with gzip.open(shared / "processbench.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    records = [{**row, "predicted": row["label"]} for row in rows]
    table = evaluation.critic_table(records)
    assert {name: row["rows"] for name, row in table["subsets"].items()} == {
        "gsm8k": 400, "math": 1000, "olympiadbench": 1000, "omnimath": 1000,
    }  # fmt: skip
    flawed = collections.Counter(evaluation.subset_of(r) for r in records if r["label"] != -1)
    assert flawed == {"gsm8k": 207, "math": 594, "olympiadbench": 661, "omnimath": 759}
    assert table["average"]["process_f1"] == table["flawed_positives"]["f1"] == 1
    assert table["flawed_positives"]["rows"] == 1700
    silent = evaluation.critic_table([{**row, "predicted": -1} for row in rows])
    assert silent["average"]["process_f1"] == 0 and silent["average"]["correct"] == 1


def test_processbench_through_the_task_of_critics(shared, tmp_path):
    """What launch.evaluate does with a critic's verdicts: the examples know their subset, the scores the verdicts."""
    with gzip.open(shared / "processbench.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[::200]))
    task = critique_files(
        seed=0,
        max_prompt_tokens=100_000,
        tokenizer_path=save_tokenizer(tmp_path / "tokenizer"),
        evaluation_path=str(path),
    )
    examples = list(task.evaluation)
    said = [rf"So \boxed{{{example['label']}}}." for example in examples]
    scores, _ = task.score(examples, ["I cannot say.", *said[1:]])
    records = [
        {**example, "predicted": predicted, "label": label}
        for example, predicted, label in zip(examples, scores["predicted"], scores["label"], strict=True)
    ]
    table = evaluation.critic_table(records)
    assert [row["rows"] for row in table["subsets"].values()] == [2, 5, 5, 5]
    assert table["pooled"]["location"] == 16 / 17 and table["pooled"]["no_verdict"] == 1 / 17
    assert table["flawed_positives"]["rows"] == sum(row["final_answer_correct"] for row in rows[::200])

"""Solutions in steps of every layout become the same rows; a label that is no step is named."""

import collections

import pytest

from tapojax.datasets import labelled, reading
from tests.datasets.layouts import CRITIC_PROMPT, PRM800K, PRMBENCH, PROCESSBENCH, critic, verl


def read(row):
    return labelled.critique(row, "file, row 3", "file/2")


def test_processbench_is_as_it_is():
    assert read({**PROCESSBENCH, "label": 1}) == {
        "id": "gsm8k-0",
        "problem": "1+1?",
        "answer": "",
        "steps": ["a", "b"],
        "label": 1,
        "final_answer_correct": False,
    }
    assert read({**PROCESSBENCH, "label": None})["label"] == labelled.UNKNOWN
    assert "final_answer_correct" not in read({**PROCESSBENCH, "label": -1, "final_answer_correct": -1})
    assert read({**PROCESSBENCH, "label": 0, "answer": 7})["answer"] == "7"


def test_fapos_critic_rows_come_apart_into_problem_answer_and_paragraphs():
    found = read(critic())
    assert found["problem"] == "1+1?" and found["answer"] == "2" and found["label"] == 1
    assert found["steps"] == ["One and one.\nTogether.", "so 2"]
    assert found["prompt"] == CRITIC_PROMPT and found["final_answer_correct"] is True and found["id"] == "file/2"
    flawed = critic()
    flawed["extra_info"]["raw_info"] = {"label": 1, "final_answer_correct": False}
    assert read(flawed)["final_answer_correct"] is False


@pytest.mark.parametrize("row", [critic(total=3), critic(prompt=CRITIC_PROMPT.replace("[Ground Truth]", ""))])
def test_a_critics_prompt_that_does_not_come_apart_is_named(row):
    with pytest.raises(ValueError, match=r"file, row 3: its prompt holds paragraphs \['0', '1'\], total_steps is"):
        read(row)


@pytest.mark.parametrize(
    ("error_steps", "label"), [([2, 3, 9], 1), ([3], 2), ([9], labelled.UNKNOWN), ([], -1), (None, -1)]
)
def test_prmbench_counts_from_one_and_past_the_end(error_steps, label):
    found = read({**PRMBENCH, "error_steps": error_steps})
    assert found["label"] == label and found["steps"] == ["a", "x", "y"] and found["problem"] == "1+1?"


def test_prm800k_is_the_path_its_labeller_took():
    found = read(PRM800K)
    assert found["steps"] == ["yes", "by hand", "so 3"] and found["label"] == 2 and found["answer"] == "2"
    good = {**PRM800K, "label": {"steps": PRM800K["label"]["steps"][:2]}}
    assert read(good)["label"] == -1
    assert read({**PRM800K, "label": {"steps": [{"completions": [], "human_completion": "by hand"}]}})["steps"] == [
        "by hand"
    ]


def prm800k(finish_reason, *steps):
    return {**PRM800K, "label": {"finish_reason": finish_reason, "steps": [*PRM800K["label"]["steps"][:2], *steps]}}


@pytest.mark.parametrize(
    ("finish_reason", "label"), [("give_up", -2), ("bad_problem", -2), ("solution", -1), ("found_error", -1)]
)
def test_who_gives_up_says_nothing_of_errors(finish_reason, label):
    assert read(prm800k(finish_reason))["label"] == label
    assert read(prm800k(finish_reason, PRM800K["label"]["steps"][2]))["label"] == 2, "found before"


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"completions": [], "chosen_completion": None}, "0 completions, none of a human, and None is chosen"),
        ({"completions": [{"text": "a", "rating": 1}], "chosen_completion": 3}, "1 completions, .* 3 is chosen"),
    ],
)
def test_a_step_that_nobody_wrote_is_named(step, said):
    with pytest.raises(ValueError, match=f"file, row 3, step 2: it has {said}"):
        read(prm800k("solution", step))


@pytest.mark.parametrize("label", [2, -3, "1", True, 0.0])
def test_a_label_that_is_no_step_is_named(label):
    with pytest.raises(
        ValueError, match="file, row 3: expected steps, a list of texts, and label, .*it has label .*2 steps"
    ):
        read({**PROCESSBENCH, "label": label})


@pytest.mark.parametrize("steps", [[], [1, 2], ["a", None]])
def test_steps_are_texts(steps):
    with pytest.raises(ValueError, match="file, row 3: expected steps, .* and no steps"):
        read({**PROCESSBENCH, "steps": steps, "label": -1})


@pytest.mark.parametrize("row", [{"problem": "1?", "answer": "1"}, {**PROCESSBENCH}, verl("1?", "1")])
def test_a_row_without_steps_is_named(row):
    assert not labelled.holds_steps(row)
    with pytest.raises(ValueError, match="file, row 3: expected steps, a list of texts, and label"):
        read(row)


def test_a_solution_of_no_problem_is_named():
    with pytest.raises(ValueError, match="file, row 3: no problem"):
        read({**PROCESSBENCH, "label": 0, "problem": ""})


# ---- real files


def test_the_published_critic_data_comes_apart_as_it_is_known(shared):
    found = [read(row) for row in reading.iterate(shared / "native" / "fapo-critic.100lines.jsonl")]
    known = reading.read_rows(shared / "fapo_critic_100.jsonl.gz")
    for field in ("problem", "answer", "steps", "label", "prompt"):
        assert [row[field] for row in found] == [row[field] for row in known], field


def test_published_processbench(shared):
    found = [read(row) for row in reading.iterate(shared / "native" / "ProcessBench_gsm8k.5rows.json")]
    known = reading.read_rows(shared / "processbench.jsonl.gz")[:5]
    for field in ("problem", "steps", "label", "final_answer_correct"):
        assert [row[field] for row in found] == [row[field] for row in known], field


def test_flawed_solutions_are_as_many_as_published(shared):
    """ProcessBench's Table 1: 207, 594, 661 and 759 erroneous solutions."""
    rows = [labelled.critique(row, "", "") for row in reading.iterate(shared / "processbench.jsonl.gz")]
    wrong = collections.Counter(row["id"].split("/")[1].split("-")[0] for row in rows if row["label"] >= 0)
    assert wrong == {"gsm8k": 207, "math": 594, "olympiadbench": 661, "omnimath": 759}

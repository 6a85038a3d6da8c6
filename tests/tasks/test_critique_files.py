"""Critiques from files: how a solution is shown to a critic and how its verdict is scored."""

import json
from pathlib import Path

import numpy as np
import pytest

from tapojax.tasks.critique_files import critique_files
from tests.tasks.test_files import save_tokenizer

ROW = {"id": "a", "problem": "1+1+1?", "answer": "3", "steps": ["1+1=2", "2+1=4", "so 3"], "label": 1}
CRITIC_DATA = Path(__file__).parents[3] / "shared" / "data" / "fapo_critic_100.jsonl.gz"


@pytest.fixture
def make(tmp_path):
    save_tokenizer(tmp_path / "tokenizer")

    def task(*rows, **options):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = dict(train_path=str(tmp_path / "rows.jsonl"), chat=False, max_prompt_tokens=4096) | options
        return critique_files(seed=0, tokenizer_path=str(tmp_path / "tokenizer"), **options)

    return task


def test_the_question_shows_problem_answer_and_numbered_steps(make):
    question = make(ROW).train[0]["question"]
    for part in ("1+1+1?", "[Answer]\n3", "<step 0>\n1+1=2\n</step 0>", "<step 2>\nso 3", r"\boxed{}", "-1"):
        assert part in question
    without = make({**ROW, "answer": None}).train[0]["question"]
    assert "[Answer]" not in without and "right answer" not in without
    assert make({**ROW, "prompt": "as released"}).train[0]["question"] == "as released"


def test_verdicts_are_scored_strictly(make):
    task = make(ROW, {**ROW, "label": -1})
    flawed, clean = task.train
    said = [r"\boxed{1}", r"\boxed{2}", r"\boxed{-1}", r"\boxed{7}", "no idea"]
    scores, errors = task.score([flawed] * 5 + [clean], [*said, r"\boxed{-1}"])
    np.testing.assert_array_equal(scores["correct"], [1, 1, 0, 0, 0, 1])
    np.testing.assert_array_equal(scores["location"], [1, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(scores["label"], [1] * 5 + [-1])
    np.testing.assert_array_equal(scores["num_steps"], [3] * 6)
    assert errors == [None] * 6 and task.answer(r"so \boxed{ 2 }") == "2" and task.answer("none") is None


@pytest.mark.parametrize("bad", [{"label": 3}, {"label": "1"}, {"steps": "1+1=2"}, {"label": None}])
def test_a_row_that_is_no_labelled_solution_is_named(make, bad):
    with pytest.raises(ValueError, match="row 2: expected steps"):
        make(ROW, {**ROW, **bad})


def test_fapos_critic_data_loads(make):
    if not CRITIC_DATA.exists():
        pytest.skip(f"no critic data at {CRITIC_DATA}")
    task = make(ROW, train_path=str(CRITIC_DATA), max_prompt_tokens=100_000)
    assert len(task.train) == 100 and all("[AI Solution]" in example["question"] for example in task.train)
    scores, _ = task.score(task.train, [rf"\boxed{{{example['label']}}}" for example in task.train])
    assert scores["location"].all() and scores["correct"].all()

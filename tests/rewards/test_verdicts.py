"""What a judge's reply says, against the published parsers; a reply that says nothing is None and never a verdict."""

from pathlib import Path

import numpy as np
import pytest

from tapojax.judges import rubric
from tapojax.rewards import answers, spans, verdicts

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name):
    return np.load(GOLDEN / f"{name}.npz", allow_pickle=False)


# ---- FAPO: index of the first wrong step


def test_critiques_are_read_as_in_the_training_of_the_published_critic():
    data = golden("fapo_genrm_reward")
    for text, index in zip(data["text"].tolist(), data["text_pred"].tolist(), strict=True):
        assert verdicts.parse(text, 7) == (None if index == -99 else index), text


def test_the_range_is_that_of_the_published_critic():
    """Grid of indices: -1, 0 ... beyond the number of steps, -2."""
    data = golden("fapo_genrm_reward")
    columns = (data[name].tolist() for name in ("pred_raw", "label", "total_steps", "reward"))
    for index, label, steps, reward in zip(*columns, strict=True):
        read = verdicts.parse(f"\\boxed{{{index}}}", steps)
        assert read == (index if -1 <= index < steps else None)
        if read is None:
            assert reward == -1, "theirs had no verdict either"
        else:
            assert (reward > -1) == ((read == -1) == (label == -1))


NO_VERDICT = {  # reply of the judge: whether the published scorers, in-process and remote, called the solution flawed
    "\\boxed{999}": (True, True),
    "\\boxed{-2}": (True, True),
    "\\boxed{2.0}": (False, True),
    "\\boxed{1+1}": (False, True),
    "\\boxed{-1.0}": (False, False),
    "\\boxed{\\text{-1}}": (False, False),
    "\\boxed{abc}": (False, False),
    "\\boxed{3": (False, False),
    "no verdict": (False, False),
    "": (False, False),
    "\\boxed{}": (False, False),
    "<NONE>": (False, False),
}


def test_a_legible_verdict_is_read_as_published_and_the_others_are_none():
    data, silent = golden("fapo_reward"), {}
    rows = data["rule_correct"] & (data["split"] == "train")
    replies = data["grm_response"][rows].tolist()
    flags = zip(data["recipe_flawed"][rows].tolist(), data["remote_flawed"][rows].tolist(), strict=True)
    for reply, theirs in zip(replies, flags, strict=True):
        index = verdicts.parse(reply, 5)
        if index is None:
            silent[reply] = theirs
        else:
            assert theirs == (index != -1, index != -1), reply
    assert silent == NO_VERDICT, "on purpose: they take some for flawed and the rest for flawless"
    assert len(replies) - len(silent) == 6


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("\\boxed{1} or \\boxed{never closed", 1),
        ("\\boxed{1} or \\boxed{\\text{2}}", None),
        ("\\boxed{1} or \\fbox{2}", None),
        ("\\boxed 2", None),
        ("\\boxed{\n2\t}", 2),
        ("\\boxed{٣}", None),
        ("\\boxed{1_0}", None),
        ("\\boxed{--1}", None),
        ("\\boxed{" + "0" * 280 + "3}", 3),
        ("\\boxed{" + "9" * 5000 + "}", None),
        ("\\boxed{2}" + "x" * 291, 2),
        ("\\boxed{2}" + "x" * 292, None),
        ("{" * 1_000_000 + "\\boxed{2}", 2),
    ],
)
def test_verdicts_are_strict(text, index):
    assert verdicts.parse(text, 11) == index


def test_a_solution_without_steps_can_only_be_flawless():
    assert verdicts.parse("\\boxed{-1}", 0) == -1 and verdicts.parse("\\boxed{0}", 0) is None


# ---- PAPO: the three levels of the rubric


def test_marks_are_read_as_published_and_what_has_none_is_none():
    data, silent = golden("papo_grader_parsers"), []
    for text, theirs in zip(data["texts_3tier"].tolist(), data["score_3tier"].tolist(), strict=True):
        mark = verdicts.parse_rubric(text)
        if mark is None:
            silent.append(text)
            assert theirs == 0, f"{text!r}: on purpose, no mark is no mark of 0"
        else:
            assert mark == theirs, text
    assert silent == ["Score: \\boxed{0.7}", "", "no verdict", "\\boxed{1", "SCORE: 1"]


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("<think>\\boxed{1}</think>Score: \\boxed{0.5}", 0.5),
        ("<think>\\boxed{1}</think>I cannot say.", None),
        ("<think>so the score is 1", None),
        ("</think><think>\\boxed{1}", None),
        ("Score: \\boxed{2}. The score is 0.5, the score is 1.", 0.5),
        ("Score: \\boxed{nan}", None),
        ("Score: \\boxed{inf}", None),
        ("Score: 10", None),
        ("Score: -1", None),
        ("scores: 1", None),
    ],
)
def test_marks_are_strict(text, mark):
    assert verdicts.parse_rubric(text) == mark


def test_hostile_replies_are_read_in_linear_time():
    for piece in ("\\boxed{", "{", "}", "\\", "score is", "<think>", "Score: ", " "):
        assert verdicts.parse_rubric("score is" + piece * 100_000) is None
    for piece in ("<points>", "final grade", "final grade: ", "<points>7 out of 7 ", " ", "<think>"):
        assert verdicts.parse_points("<points>" + piece * 100_000) is None
        assert verdicts.parse_grade("final grade" + piece * 100_000) is None


# ---- PAPO: points and grades


def test_points_are_read_as_published_where_they_are_legible():
    """Both published readings: four grades, and sevenths."""
    data, silent = golden("papo_grader_parsers"), []
    columns = (data[name].tolist() for name in ("texts_imobench", "score_imobench", "score_imo7_norm"))
    for text, grade, share in zip(*columns, strict=True):
        if verdicts.parse_points(text) is None:
            silent.append(text)
        else:
            assert rubric.imo_bench(text) == grade and rubric.checkpoints(text) == pytest.approx(share), text
    assert silent == ["<points>9 out of 7</points>", "I give 6 out of 7", "<points>6.5 out of 7</points>", "", "none"]
    assert rubric.imo_bench("none") is None and rubric.checkpoints("none") is None, "where theirs gives 0"


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("<points>1 out of 7</points> no, <points> 7  out of 7 </points>", 7),
        ("<think><points>7 out of 7</points></think>hm", None),
        ("<think><points>7 out of 7</points>", None),
        ("<points>07 out of 7</points>", None),
        ("<points>-1 out of 7</points>", None),
        ("<points>7</points>", None),
        ("<points>7 out of 10</points>", None),
        ("<points>٣ out of 7</points>", None),
    ],
)
def test_points_are_strict(text, points):
    assert verdicts.parse_points(text) == points


def test_a_grade_must_be_said_and_only_one():
    """Published: a mere CORRECT will do, and what says nothing is incorrect; ours has no verdict on both."""
    data, silent = golden("papo_grader_parsers"), []
    for text, theirs in zip(data["texts_grade"].tolist(), data["grade"].tolist(), strict=True):
        grade = verdicts.parse_grade(text)
        if grade is None:
            silent.append((text, theirs))
        else:
            assert grade == theirs, text
    assert silent == [
        ("It is CORRECT", True),
        ("It is INCORRECT", False),
        ("CORRECT or INCORRECT?", False),
        ("", False),
        ("Final Grade: INCORRECT ... Final Grade: CORRECT", False),
    ]
    assert verdicts.parse_grade("<think>Final Grade: CORRECT</think>Final Grade: INCORRECT") is False
    assert verdicts.parse_grade("Final Grade: CORRECTED") is None


# ---- where both look


def test_boxes_are_found_where_papo_finds_them():
    data = golden("papo_grader_parsers")
    columns = (data[name].tolist() for name in ("texts_extract", "extract_is_boxed", "extract_answer"))
    for text, boxed, content in zip(*columns, strict=True):
        assert (spans.boxed(text, text.rfind("</think>") + 1) is not None) == boxed, text
        if boxed:
            assert answers.extract(text) == content

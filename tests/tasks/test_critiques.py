"""Critiques: flaws in one place, labels that the checker agrees with, strict verdicts, right demonstrations."""

import numpy as np
import pytest

from tapojax.tasks import critiques, gym, gym_checker, gym_levels, gym_tokenizer

PROBLEM, CLEAN = "57+86?", "7+6+0=13,5+8+1=14#143"
FLAWED = "7+6+0=13,5+8+1=15#143"


def task(**knobs):
    return critiques.critiques(**{"seed": 0, "max_prompt_tokens": 40, **knobs})


def example(solution):
    label = gym_checker.first_error(PROBLEM, solution)
    return {"gym": PROBLEM, "solution": solution, "label": label, "num_steps": critiques.num_steps(solution)}


# ---- solutions


@pytest.mark.parametrize("level", gym_levels.LEVELS)
def test_a_flaw_is_one_wrong_step_before_the_right_answer(level):
    rng = np.random.default_rng(level)
    for row in gym.source([level], 40, 0):
        solution = critiques.with_flaw(row, rng)
        written, prescribed = (text.rpartition("#")[0].split(",") for text in (solution, row["solution"]))
        changed = [i for i, (a, b) in enumerate(zip(written, prescribed, strict=True)) if a != b]
        assert changed == [gym_checker.first_error(row["problem"], solution)], solution
        assert gym_checker.check(row["problem"], solution).flawed and len(solution) == len(row["solution"])


def test_flaws_are_wrong_digits_and_true_steps_that_are_not_called_for():
    rng = np.random.default_rng(0)
    rows = list(gym.source([2], 400, 0))
    verdicts = [gym_checker.check(row["problem"], critiques.with_flaw(row, rng)) for row in rows]
    wrong = [step.true for verdict in verdicts for step in verdict.steps if not step.right]
    assert 0.3 < np.mean(wrong) < 0.5, "half are meant to be true; some cannot be"


@pytest.mark.parametrize("step", ["10-9-0=1", "1-0-1=0", "7+6+0=13", "7*6+0=42", "12*30=360"])
def test_a_slip_keeps_its_length_and_is_an_equation_with_another_left_side(step):
    rng = np.random.default_rng(0)
    for _ in range(100):
        slipped = critiques.slip(step, rng)
        assert len(slipped) == len(step) and slipped.partition("=")[0] != step.partition("=")[0]


@pytest.mark.parametrize("flaws", [0.0, 0.25, 0.5, 1.0])
def test_the_share_of_flawed_solutions_is_exact_in_every_stretch(flaws):
    source = task(flaws=flaws, levels=(2, 3)).train
    for start in (0, 80, 8000):
        assert np.mean([source[i]["label"] >= 0 for i in range(start, start + 80)]) == flaws


def test_examples_are_functions_of_seed_and_index_and_labelled_by_the_checker():
    source, again, other = task().train, task().train, task(seed=1).train
    assert [source[i] for i in range(50)] == [again[i] for i in reversed(range(50))][::-1]
    assert [source[i] for i in range(50)] != [other[i] for i in range(50)]
    for row in (source[i] for i in range(50)):
        assert row["label"] == gym_checker.first_error(row["gym"], row["solution"]) < row["num_steps"] == 2
        assert row["problem"] == gym_tokenizer.TOKENIZER.decode(task().prompt(row))
        assert row["answer"] == str(row["label"]) and row["id"].endswith(row["solution"])
        assert gym_checker.check(row["gym"], row["solution"]).correct, "the answer is right in all"
    assert source[-1] == source[len(source) - 1]


def test_evaluation_problems_are_held_out():
    built = task(evaluation_levels=(3,))
    assert not any(gym.held_out(built.train[i]["gym"]) for i in range(100))
    assert all(gym.held_out(built.evaluation[i]["gym"]) for i in range(100))
    assert built.evaluation[0] == task(evaluation_levels=(3,), seed=5).evaluation[0], "whatever the seed"


# ---- critiques


@pytest.mark.parametrize(
    ("solution", "critique"),
    [
        (CLEAN, "7+6+0=13T5+8+1=14T#-1"),
        (FLAWED, "7+6+0=13T5+8+1=1F#1"),
        ("8+6+0=14,5+8+1=14#143", "F#0"),  # true, but of another problem
        ("7+6+0=13,5+8+0=13#143", "7+6+0=13T5+8+F#1"),
    ],
)
def test_a_worked_critique_breaks_off_where_the_solution_departs(solution, critique):
    assert critiques.worked(PROBLEM, solution) == critique


def test_worked_critiques_fit_and_are_right():
    built = task(levels=(2, 3), scratchpad=1.0)
    rows = [built.train[i] for i in range(300)]
    texts = [built.demonstration(row, np.random.default_rng(0)) for row in rows]
    assert all(built.tokenizer.encode(text) for text in texts)
    scores, errors = built.score(rows, texts)
    for name in ("correct", "location"):
        assert scores[name].all(), name
    assert errors == [None] * 300 and [built.answer(text) for text in texts] == [row["answer"] for row in rows]
    for row, text in zip(rows, texts, strict=True):
        assert text.count("T") == (row["label"] if row["label"] >= 0 else row["num_steps"])


def test_demonstrations_have_the_recipe_shares():
    built, rng = task(scratchpad=0.4, sloppiness=0.8), np.random.default_rng(0)
    rows = [built.train[i] for i in range(3000)]
    texts = [built.demonstration(row, rng) for row in rows]
    immediate = np.array([text.startswith("#") for text in texts])
    wrong = built.score(rows, texts)[0]["location"] == 0
    assert abs(immediate.mean() - 0.6) < 0.03 and abs(wrong.mean() - 0.6 * 0.8) < 0.03
    assert (built.score(rows, texts)[0]["predicted"] >= -1).all(), "wrong verdicts are legal ones"


@pytest.mark.parametrize(
    ("critique", "want"),
    [("7T#-1", -1), ("#0", 0), ("#0#2", 2), ("#3", None), ("#-2", None), ("", None), ("1", None), ("#", None),
     ("#01", None), ("#1 ", None), ("#1.", None), ("#" + "9" * 5000, None)],
)  # fmt: skip
def test_a_verdict_is_an_index_in_range_or_none(critique, want):
    assert critiques.verdict(critique, 3) == want


@pytest.mark.parametrize(("solution", "want"), [(CLEAN, 2), ("7+6+0=13#143", 1), ("1,#2", 2), ("#143", 0), ("", 0)])
def test_steps_are_counted_as_the_checker_does(solution, want):
    assert critiques.num_steps(solution) == want == len(gym_checker.check(PROBLEM, solution).steps)


def test_channels_by_hand():
    rows = [example(solution) for solution in (CLEAN, CLEAN, FLAWED, FLAWED, FLAWED, CLEAN)]
    scores, _ = task().score(rows, ["#-1", "#0", "#1", "#0", "F", "#7"])
    expected = {
        "predicted": [-1, 0, 1, 0, -2, -2],
        "label": [-1, -1, 1, 1, 1, -1],
        "num_steps": [2] * 6,
        "correct": [1, 0, 1, 1, 0, 0],  # same class
        "location": [1, 0, 1, 0, 0, 0],
    }
    assert scores.keys() == expected.keys()
    for name, values in expected.items():
        assert scores[name].dtype == np.float32
        np.testing.assert_array_equal(scores[name], values, err_msg=name)


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"max_prompt_tokens": 27}, "level 2 has problems with solutions of up to 28 tokens"),
        ({"levels": (99,)}, "99"),
        ({"flaws": 1.5}, "task.flaws=1.5"),
    ],
)
def test_mistakes_are_named(knobs, said):
    with pytest.raises(ValueError, match=said):
        task(**knobs)

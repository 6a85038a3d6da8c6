import time

import numpy as np
import pytest

from tapojax.tasks import gym, gym_checker, gym_levels, gym_solutions, gym_tokenizer

LEVELS = list(gym_levels.LEVELS)
PROBLEM = "57+86?"  # 7+6+0=13,5+8+1=14#143


def rights(problem, completion):
    return [step.right for step in gym_checker.check(problem, completion).steps]


def with_digit(text, position, digit):
    return text[:position] + str(digit) + text[position + 1 :]


@pytest.mark.parametrize("level", LEVELS)
def test_worked_solutions_are_fully_right(level):
    for i in range(1000):
        problem = gym.problem(level, 5, i)
        solution = gym_solutions.solve(problem)
        verdict = gym_checker.check(problem, solution.text)
        assert verdict.correct and verdict.format_ok and not verdict.flawed and not verdict.unsupported, problem
        assert verdict.process == 1.0 and [step.text for step in verdict.steps] == list(solution.steps)
        assert i % 10 or gym_checker.first_error(problem, solution.text) == -1


@pytest.mark.parametrize("level", LEVELS)
def test_every_single_digit_corruption_is_caught_where_it_is(level):
    """Every digit of every step, and of the answer, replaced by a random other digit."""
    rng = np.random.default_rng(level)
    for i in range(8):
        problem = gym.problem(level, 6, i)
        text = gym_solutions.solve(problem).text
        for position in [p for p, character in enumerate(text) if character.isdigit()]:
            corrupted = with_digit(text, position, (int(text[position]) + rng.integers(1, 10)) % 10)
            verdict = gym_checker.check(problem, corrupted)
            index = text[:position].count(",") if position < text.index("#") else len(verdict.steps)
            where = f"{problem} {corrupted}"
            assert gym_checker.first_error(problem, corrupted) == index, where
            assert sum(not step.right for step in verdict.steps) == (index < len(verdict.steps)), where
            assert verdict.flawed == verdict.correct == (index < len(verdict.steps)), where
            assert (verdict.process < 1) == (index < len(verdict.steps)), where


def test_flawed_demonstrations_are_flawed_positives():
    rng = np.random.default_rng(0)
    for example in gym.source(LEVELS, 360, 0):
        text = gym.demonstration(example, rng, scratchpad=1.0, sloppiness=0.0, flaws=1.0)
        verdict = gym_checker.check(example["problem"], text)
        assert verdict.correct and verdict.flawed and verdict.process < 1, f"{example['problem']} {text}"


@pytest.mark.parametrize(
    ("completion", "steps", "correct", "process", "flawed", "unsupported", "format_ok", "first_error"),
    [
        ("7+6+0=13,5+8+1=14#143", [1, 1], 1, 1.0, 0, 0, 1, -1),
        ("6+7+0=13,1+8+5=14#143", [1, 1], 1, 1.0, 0, 0, 1, -1),  # the order of terms is free
        ("#143", [], 1, 0.0, 0, 1, 1, -1),  # right at once: unsupported, not flawed
        ("#153", [], 0, 0.0, 0, 0, 1, 0),
        ("7+6+0=13,5+8+1=14#153", [1, 1], 0, 1.0, 0, 0, 1, 2),  # only the answer is wrong
        ("7+6+0=13,5+8+1=14", [1, 1], 0, 1.0, 0, 0, 0, 2),  # no answer
        ("7+6+0=13#143", [1], 1, 0.5, 0, 1, 1, -1),  # a step is missing
        ("5+8+1=14#143", [1], 1, 0.5, 0, 1, 1, -1),
        ("7+6+0=12,5+8+1=14#143", [0, 1], 1, 0.5, 1, 0, 1, 0),  # wrong result, right by luck
        ("7+6+0=13,5+8+0=13#143", [1, 0], 1, 0.5, 1, 0, 1, 1),  # true, but drops the carry
        ("7+6+0=23,5+8+2=15#153", [0, 0], 0, 0.0, 0, 0, 1, 0),  # true, but builds on a wrong step
        ("2+2+0=4,7+6+0=13,5+8+1=14#143", [0, 1, 1], 1, 2 / 3, 1, 0, 1, 0),  # true, but of another problem
        ("7+6+0=13,5+8+1=14,5+8+1=14#143", [1, 1, 0], 1, 2 / 3, 1, 0, 1, 2),  # repeated
        ("5+8+1=14,7+6+0=13#143", [1, 0], 1, 0.5, 1, 0, 1, 1),  # out of order
        ("7+6+0=12,7+6+0=13,5+8+1=14#143", [0, 1, 1], 1, 2 / 3, 1, 0, 1, 0),  # a correction does not undo the mistake
        ("7+6=13,5+8+1=14#143", [0, 1], 1, 0.5, 1, 0, 1, 0),  # not the prescribed step
        ("7+6+0=13,5+8+1=14,#143", [1, 1, 0], 1, 2 / 3, 1, 0, 0, 2),  # an empty step
        ("7+6+0=13,5+8+1=14#143#143", [1, 0], 1, 0.5, 1, 0, 0, 1),  # two answers
        ("7+6+0=13,5+8+1=14#143.", [1, 1], 0, 1.0, 0, 0, 0, 2),  # text after the answer
        ("7+6+0=13,5+8", [1, 0], 0, 0.5, 0, 0, 0, 1),  # cut off
        ("7+6+0=013,5+8+1=14#143", [0, 1], 1, 0.5, 1, 0, 0, 0),  # leading zero
        ("", [], 0, 0.0, 0, 0, 0, 0),
    ],
)
def test_verdicts_by_hand(completion, steps, correct, process, flawed, unsupported, format_ok, first_error):
    verdict = gym_checker.check(PROBLEM, completion)
    assert rights(PROBLEM, completion) == [bool(step) for step in steps]
    assert verdict.correct == bool(correct) and verdict.process == pytest.approx(process)
    assert verdict.flawed == bool(flawed) and verdict.unsupported == bool(unsupported)
    assert verdict.format_ok == bool(format_ok)
    assert gym_checker.first_error(PROBLEM, completion) == first_error


def test_a_step_can_be_true_and_not_right():
    verdict = gym_checker.check(PROBLEM, "7+6+0=13,5+8+0=13#143")
    assert [(step.true, step.right) for step in verdict.steps] == [(True, True), (True, False)]


def test_equal_columns_are_counted_one_by_one():
    step = "2+2+0=4"
    assert gym_checker.check("22+22?", f"{step}#44").process == 0.5
    assert gym_checker.check("22+22?", f"{step},{step}#44").process == 1.0
    assert rights("22+22?", ",".join([step] * 3) + "#44") == [True, True, False]


def test_writing_out_every_guess_does_not_pay():
    guesses = [f"7+6+0={n}" for n in range(20)] + [f"5+8+1={n}" for n in range(20)]
    assert gym_checker.check(PROBLEM, ",".join(guesses) + "#143").process == 2 / 40


@pytest.mark.parametrize(
    ("text", "answer"),
    [("#143", "143"), ("1,2#0", "0"), ("#1#-7", "-7"), ("143", None), ("#", None), ("# 143", None), ("#143 ", None),
     ("#0143", None), ("#-0", None), ("#1+1", None), ("#143#", None), ("#143\n", None), ("#١٤٣", None)],
)  # fmt: skip
def test_extract_is_strict(text, answer):
    assert gym_checker.extract(text) == answer


@pytest.mark.parametrize("level", LEVELS)
def test_answers_are_graded_as_python_evaluates(level):
    rng = np.random.default_rng(level)
    for i in range(25):
        problem = gym.problem(level, 8, i)
        value = eval(problem[:-1])
        for guess in {value, value + 1, -value - 1, int(rng.integers(0, 10**6))}:
            assert gym_checker.check(problem, f"#{guess}").correct == (guess == value)


def test_garbage_never_raises():
    rng = np.random.default_rng(0)
    alphabets = [gym_tokenizer.CHARACTERS, "0123456789+-*=,#", "1=,#+", "\x00\n é²٣\ud800😀#=,1"]
    for i in range(2000):
        alphabet = alphabets[i % len(alphabets)]
        text = "".join(rng.choice(list(alphabet), size=rng.integers(0, 60)))
        level = LEVELS[i % len(LEVELS)]
        problem = gym_levels.LEVELS[level].example
        verdict = gym_checker.check(problem, text)
        assert 0.0 <= verdict.process <= 1.0 and not (verdict.flawed and not verdict.correct)
        assert -1 <= gym_checker.first_error(problem, text) <= len(verdict.steps)


@pytest.mark.parametrize("piece", ["9", "9*", "1+", "#", ",", "=", "(", "1=1,", "7+6+0=13,", "#1", "-"])
def test_megabytes_of_garbage_take_linear_time(piece):
    text = piece * (2_000_000 // len(piece))
    start = time.process_time()
    verdict = gym_checker.check(PROBLEM, text)
    assert time.process_time() - start < 1.0
    assert not verdict.correct and len(verdict.steps) <= gym_checker.MAX_STEPS + 1


def test_score_makes_float32_channels_aligned_with_rows():
    examples = [{"problem": PROBLEM}] * 5
    completions = ["7+6+0=13,5+8+1=14#143", "#143", "7+6+0=12,5+8+1=14#143", "7+6+0=13,5+8", "#153"]
    scores = gym_checker.score(examples, completions)
    expected = {
        "correct": [1, 1, 1, 0, 0],
        "process": [1, 0, 0.5, 0.5, 0],
        "flawed": [0, 0, 1, 0, 0],
        "format": [1, 1, 1, 0, 1],
    }
    assert set(scores) == set(expected)
    for name, values in expected.items():
        assert scores[name].dtype == np.float32, name
        np.testing.assert_array_equal(scores[name], values, err_msg=name)
    assert gym_checker.score([], [])["correct"].shape == (0,)


def test_score_names_a_mismatch():
    with pytest.raises(ValueError, match="1 examples for 2 completions"):
        gym_checker.score([{"problem": PROBLEM}], ["#1", "#2"])


def test_a_problem_that_is_none_is_an_error():
    with pytest.raises(ValueError, match="not a problem of the gym"):
        gym_checker.check("what is 2 and 2?", "#4")

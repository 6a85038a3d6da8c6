"""The gym as a task: what it demonstrates, how its solutions come apart, and how a hint becomes a turn."""

import numpy as np
import pytest

from tapojax.tasks import gym_checker
from tapojax.tasks.arithmetic import arithmetic

TASK = arithmetic(seed=0, max_prompt_tokens=8)


def test_a_solution_is_its_steps_and_the_answer_behind_its_mark():
    example = {"id": "a", "problem": "57+86?", "answer": "143", "solution": "7+6+0=13,5+8+1=14#143"}
    assert TASK.solution(example) == ("7+6+0=13,5+8+1=14", "#143")


def test_solutions_are_right_and_their_reasoning_does_not_answer():
    for example in (TASK.train[i] for i in range(50)):
        reasoning, closing = TASK.solution(example)
        assert gym_checker.check(example["problem"], reasoning + closing).process == 1
        assert gym_checker.extract(reasoning) is None


def test_a_closed_hint_ends_like_a_completion():
    example = TASK.train[0]
    tokens = TASK.closed_hint(example, TASK.tokenizer.encode("7+6"))
    assert TASK.tokenizer.decode(tokens, skip_special_tokens=False) == example["problem"] + "7+6<eos>"


def test_a_level_beyond_the_budget_is_named():
    with pytest.raises(ValueError, match="level 4 has prompts of up to 10 tokens, sampling.max_prompt_tokens is 8"):
        arithmetic(seed=0, max_prompt_tokens=8, levels=(2, 4))


def test_warm_levels_are_those_of_the_demonstrations_only():
    task = arithmetic(seed=0, max_prompt_tokens=8, levels=(3,), warm_levels=(1, 2))
    assert {task.train[i]["level"] for i in range(10)} == {3}
    assert {task.warm_start[i]["level"] for i in range(10)} == {1, 2}
    assert TASK.warm_start is None, "without them the warm start takes the training problems"
    with pytest.raises(ValueError, match="level 4 has prompts"):
        arithmetic(seed=0, max_prompt_tokens=8, warm_levels=(4,))


@pytest.mark.parametrize("level", range(1, 13))
def test_slips_spoil_columns_one_by_one_and_the_answer_with_them(level):
    task = arithmetic(seed=0, max_prompt_tokens=16, levels=(level,), scratchpad=1.0, slips=0.3)
    rng, wrong, columns, right = np.random.default_rng(0), 0, 0, 0
    for example in (task.train[i] for i in range(200)):
        verdict = gym_checker.check(example["problem"], task.demonstration(example, rng))
        assert verdict.format_ok and len(verdict.steps) == example["solution"].count(",") + 1
        assert verdict.correct == all(step.right for step in verdict.steps), "a slip is never without consequence"
        wrong, columns = wrong + sum(not step.right for step in verdict.steps), columns + len(verdict.steps)
        right += verdict.correct
    assert abs(wrong / columns - 0.3) < 5 * 0.46 / columns**0.5, "five standard errors"
    assert 0 < right < 200


def test_slips_need_columns():
    task = arithmetic(seed=0, max_prompt_tokens=16, levels=(16,), scratchpad=1.0, slips=0.3)
    with pytest.raises(ValueError, match=r"slips=0.3: '\d\d\*\d\d\?' is not worked in columns; choose levels 1 to 12"):
        task.demonstration(task.train[0], np.random.default_rng(0))

"""A judge on top of a task: its verdicts reach the right rows, and so do the reasons and the costs."""

import numpy as np
import pytest

from tapojax.judges import judged
from tests.judges.test_critic import CLEAN, FLAWED, NAN, WRONG, critic, gym, rows

# ---- the task


def test_only_right_rows_are_judged_and_the_exact_flag_stays_beside():
    asked = []

    def judge(examples, completions):
        asked.extend(completions)
        return judged.Verdicts(np.array([1, 0, 0, NAN], np.float32), [None, None, None, "too hard"], {})

    scores, errors = judged.judged(gym(), judge, channel="flawed").score(*rows(CLEAN, WRONG, FLAWED, CLEAN, FLAWED))
    assert asked == [CLEAN, FLAWED, CLEAN, FLAWED] and errors == [None] * 4 + ["too hard"]
    expected = {
        "correct": [1, 0, 1, 1, 1],
        "flawed": [1, 0, 0, 0, NAN],
        "flawed_exact": [0, 0, 1, 0, 1],
        "judge_precision": [0, NAN, NAN, NAN, NAN],  # 1 where it says flawed and is right
        "judge_recall": [NAN, NAN, 0, NAN, NAN],  # 1 where a flawed row is found
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(scores[name], values, err_msg=name)
    assert {"process", "format"} <= scores.keys(), "the task's own channels stay"


def test_means_of_the_two_channels_are_precision_and_recall():
    completions = [CLEAN] * 5 + [FLAWED] * 4
    said = np.array([1, 0, 0, 0, NAN, 1, 1, 0, NAN], np.float32)
    scores, _ = judged.judged(gym(), lambda *_: judged.Verdicts(said, [None] * 9, {}), channel="flawed").score(
        *rows(*completions)
    )
    assert np.nanmean(scores["judge_precision"]) == pytest.approx(2 / 3)  # of 3 called, 2 flawed
    assert np.nanmean(scores["judge_recall"]) == pytest.approx(2 / 3)  # of 3 flawed with a verdict, 2 called


def test_a_perfect_critic_changes_nothing():
    completions = [CLEAN, FLAWED, WRONG, "#143", "#153", "7+6+0=13,5+8+1=14"]
    scores, errors = judged.judged(gym(), critic(), channel="flawed").score(*rows(*completions))
    np.testing.assert_array_equal(scores["flawed"], gym().score(*rows(*completions))[0]["flawed"])
    np.testing.assert_array_equal(scores["flawed"], scores["flawed_exact"])
    assert errors == [None] * 6


def test_rows_that_the_task_could_not_score_are_not_judged_and_keep_their_reason():
    def score(examples, completions):
        return {"correct": np.array([NAN, 1], np.float32)}, ["killed", None]

    scores, errors = judged.judged(gym()._replace(score=score), critic(), channel="flawed").score(*rows(CLEAN, FLAWED))
    np.testing.assert_array_equal(scores["flawed"], [NAN, 1])
    assert errors == ["killed", None]
    said = {"correct", "flawed", "flawed_asked", "flawed_seconds", "flawed_tokens"}
    assert scores.keys() == said, "no exact flag, no quality"


def test_costs_are_channels_where_something_was_asked():
    def judge(examples, completions):
        costs = {"seconds": np.arange(len(completions), dtype=np.float32) + 1}
        return judged.Verdicts(np.full(len(completions), 0.5, np.float32), [None] * len(completions), costs)

    scores, _ = judged.judged(gym(), judge, channel="process").score(*rows(CLEAN, WRONG, FLAWED))
    for name, values in {
        "process": [0.5, 0, 0.5],
        "process_asked": [1, 0, 1],
        "process_seconds": [1, NAN, 2],
        "flawed": [0, 0, 1],  # the task's own
    }.items():
        np.testing.assert_array_equal(scores[name], values, err_msg=name)
        assert scores[name].dtype == np.float32
    assert "flawed_exact" not in scores
    none, _ = judged.judged(gym(), judge, channel="process").score(*rows(WRONG))
    assert none.keys() == scores.keys(), "the channels do not depend on the rows"


def test_a_judge_of_all_rows_is_given_the_wrong_ones_too():
    def score(examples, completions):
        return {"correct": np.array([NAN, 1, 0], np.float32)}, ["killed", None, None]

    def judge(examples, completions):
        assert completions == [FLAWED, WRONG], "what has no score is not judged"
        return judged.Verdicts(np.array([0.5, 0.25], np.float32), [None] * 2, {})

    task = judged.judged(gym()._replace(score=score), judge, channel="reward", only_right=False)
    scores, errors = task.score(*rows(CLEAN, FLAWED, WRONG))
    np.testing.assert_array_equal(scores["reward"], [NAN, 0.5, 0.25])
    np.testing.assert_array_equal(scores["reward_asked"], [0, 1, 1])
    assert errors == ["killed", None, None]

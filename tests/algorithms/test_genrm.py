"""The training of the generative reward model: DAPO with FAPO's reward for critiques."""

import numpy as np
import pytest

from tapojax import advantages, shaping, weights
from tapojax.algorithms.dapo import dapo
from tapojax.algorithms.genrm import genrm
from tapojax.rewards import loop
from tests.algorithms import checks
from tests.algorithms.test_papo import row_advantages
from tests.algorithms.test_parents import assert_identical

SHAPE = dict(group_size=4, max_tokens=8)
NAN = float("nan")
COLUMNS = ("predicted", "label", "num_steps")


def test_a_critic_of_single_steps_is_trained_by_dapo():
    """Where there is one place only, the reward is ± 1 by whether, which is what `correct` says."""
    judged = checks.scores()
    judged |= {"predicted": judged["correct"] - 1, "label": 0 * judged["label"], "num_steps": 0 * judged["label"] + 1}
    for knobs in ({}, {"overlong_buffer": 4}):
        got = row_advantages(genrm(**SHAPE, **knobs), judged)
        want = row_advantages(dapo(**SHAPE, **knobs), judged)
        np.testing.assert_allclose(got, want, 1e-5, 1e-5)


def test_defaults_are_the_published_settings():
    algorithm = genrm(**SHAPE)
    assert algorithm.keep is None and algorithm.weights is weights.token_mean
    assert genrm(**SHAPE, dynamic_sampling=True).keep is not None
    parent = dapo(**SHAPE, dual_clip=10.0, dynamic_sampling=False)
    assert_identical(algorithm._replace(rewards=parent.rewards), parent)
    with pytest.raises(AssertionError):
        assert_identical(algorithm, parent)


def test_the_reward_is_that_of_the_critique_and_its_length():
    scores, rollout = checks.scores(), checks.rollout()
    want = shaping.genrm_reward(*(scores[name] for name in COLUMNS))
    np.testing.assert_array_equal(genrm(**SHAPE).rewards(scores, rollout, 0), want)
    penalty = shaping.overlong_penalty(rollout.mask.sum(axis=1), max_length=8, buffer=4, factor=0.5)
    longer = genrm(**SHAPE, overlong_buffer=4, overlong_factor=0.5)
    np.testing.assert_array_equal(longer.rewards(scores, rollout, 0), want + penalty)


def test_nearer_critiques_are_better():
    """Wrong steps named 0, 1 and 3 beside the true one, and the critic that saw none."""
    scores = checks.scores() | {"predicted": np.array([2, 1, 5, -1] * 4, np.float32)}
    scores |= {"label": np.full(16, 2, np.float32), "num_steps": np.full(16, 6, np.float32)}
    want = advantages.group_normalize(np.array([1, 1 - 1 / 6, 1 - 3 / 6, -1], np.float32), 4)
    np.testing.assert_allclose(row_advantages(genrm(**SHAPE), scores)[:4], want, 1e-5)


def test_an_illegible_verdict_is_punished_and_is_no_failure_of_the_scorer():
    """However many there are: a critic that cannot write verdicts yet must be able to learn it."""
    algorithm, scores = genrm(**SHAPE), checks.scores() | {"predicted": np.full(16, NAN, np.float32)}
    assert algorithm.needs == {"correct", "label", "num_steps"}
    np.testing.assert_array_equal(algorithm.rewards(scores, checks.rollout(), 0), -1)
    loop.check(scores, [None] * 16, algorithm.needs, loop.Limit(share=0.2))

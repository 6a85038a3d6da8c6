"""PAPO: what its signals reward, what they leave unread, and that it is DAPO at process_weight = 0."""

import numpy as np
import pytest

from tapojax import advantages, weights
from tapojax.algorithms.dapo import dapo
from tapojax.algorithms.papo import papo
from tapojax.algorithms.papo_signals import SIGNALS
from tests.algorithms import checks
from tests.algorithms.test_parents import assert_identical

SHAPE = dict(group_size=4, max_tokens=8)
PARENT = dict(dual_clip=3.0, dynamic_sampling=False)
NAN = float("nan")


def row_advantages(algorithm, scores, rollout=None):
    """[B]: the advantage of each row's tokens."""
    batch = checks.batch_of(algorithm, rollout or checks.rollout(), scores)
    return np.asarray(batch.advantages).sum(axis=1) / np.maximum(np.asarray(batch.mask).sum(axis=1), 1)


@pytest.mark.parametrize("knobs", [{}, {"overlong_buffer": 4}, {"token_mean": False}])
def test_without_process_weight_it_is_dapo(knobs):
    assert_identical(papo(**SHAPE, process_weight=0.0, **knobs), dapo(**SHAPE, **PARENT, **knobs))
    assert_identical(papo(**SHAPE, signal="outcome", **knobs), dapo(**SHAPE, **PARENT, **knobs))


def test_defaults_are_the_published_settings():
    algorithm = papo(**SHAPE)
    assert algorithm.keep is None and algorithm.weights is weights.token_mean
    assert algorithm.needs == {"correct", "process"}
    with pytest.raises(AssertionError):
        assert_identical(algorithm, dapo(**SHAPE, **PARENT))


@pytest.mark.parametrize("signal", SIGNALS)
def test_each_signal_is_its_definition(signal):
    scores = checks.scores(seed=1)
    outcome, process = scores["correct"], scores["process"]
    want = {
        "decoupled": lambda: advantages.decoupled(outcome, process, outcome, 4),
        "full_norm": lambda: advantages.full_norm(outcome, process, outcome, 4),
        "outcome": lambda: advantages.group_normalize(outcome, 4),
        "process": lambda: advantages.process_only(process, 4),
        "multiplicative": lambda: advantages.multiplicative(outcome, process, 4),
    }[signal]()
    np.testing.assert_allclose(row_advantages(papo(**SHAPE, signal=signal), scores), want, 1e-6, 1e-6)


@pytest.mark.parametrize("signal", [name for name in SIGNALS if name != "process"])
@pytest.mark.parametrize("value", [0.0, 1.0, -7.0, NAN])
def test_process_scores_of_wrong_rows_are_not_read(signal, value):
    scores = checks.scores(seed=1)
    other = scores | {"process": np.where(scores["correct"] == 0, value, scores["process"]).astype(np.float32)}
    algorithm = papo(**SHAPE, signal=signal)
    np.testing.assert_array_equal(row_advantages(algorithm, other), row_advantages(algorithm, scores))


def test_correctness_comes_from_its_channel_and_not_from_the_shaped_reward():
    """A right row with a length penalty is still compared with the right rows (in the code `reward == 1` loses it)."""
    algorithm, scores = papo(**SHAPE, overlong_buffer=8), checks.scores(seed=1)
    rewards = np.asarray(algorithm.rewards(scores, checks.rollout(), 0))
    assert (rewards[scores["correct"] == 1] < 1).all(), "every right row pays for its length"
    want = advantages.decoupled(rewards, scores["process"], scores["correct"], 4)
    np.testing.assert_allclose(row_advantages(algorithm, scores), want, 1e-5, 1e-6)
    assert np.abs(want - advantages.group_normalize(rewards, 4)).max() > 0.5


def test_a_right_row_whose_judge_failed_keeps_its_outcome_advantage():
    scores = checks.scores([1, 1, 1, 0] * 4) | {"process": np.array([1, 0.5, NAN, NAN] * 4, np.float32)}
    got = row_advantages(papo(**SHAPE), scores)[:4]
    np.testing.assert_allclose(got, [0.5 + 0.70711, 0.5 - 0.70711, 0.5, -1.5], atol=1e-4)


@pytest.mark.parametrize(("signal", "left_out"), [("process", [1, 2]), ("multiplicative", [1])])
def test_a_row_whose_reward_needs_a_failed_judge_is_left_out(signal, left_out):
    scores = checks.scores([1, 1, 0, 0] * 4) | {"process": np.array([1, NAN, NAN, 0] * 4, np.float32)}
    batch = checks.batch_of(papo(**SHAPE, signal=signal), checks.rollout(), scores)
    assert np.flatnonzero(~np.asarray(batch.mask).any(axis=1))[: len(left_out)].tolist() == left_out


def test_an_all_right_group_still_teaches():
    scores = checks.scores([1] * 16) | {"process": np.array([1, 0.5, 0.5, 0] * 4, np.float32)}
    assert (row_advantages(dapo(**SHAPE), scores) == 0).all()
    got = row_advantages(papo(**SHAPE), scores)
    np.testing.assert_allclose(got[:4], np.array([0.5, 0, 0, -0.5]) / np.std([1, 0.5, 0.5, 0], ddof=1), atol=1e-4)


def test_an_unknown_signal_names_the_choices():
    with pytest.raises(ValueError, match=r"signal='dual': choose one of \['decoupled', 'full_norm', 'outcome'"):
        papo(**SHAPE, signal="dual")


@pytest.mark.parametrize("signal", ["outcome", "process", "multiplicative"])
def test_a_weight_that_nobody_reads_is_an_error(signal):
    with pytest.raises(ValueError, match=rf"process_weight=0.6 is not read by signal='{signal}': leave it out"):
        papo(**SHAPE, signal=signal, process_weight=0.6)

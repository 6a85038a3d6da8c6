"""FAPO: flawed right rows are worth less; DAPO at flaw_penalty = 0."""

import numpy as np
import pytest

from tapojax import advantages, shaping, weights
from tapojax.algorithms.dapo import dapo
from tapojax.algorithms.fapo import fapo
from tests.algorithms import checks
from tests.algorithms.test_papo import row_advantages
from tests.algorithms.test_parents import assert_identical

SHAPE = dict(group_size=4, max_tokens=8)
PARENT = dict(dual_clip=10.0, dynamic_sampling=False)
NAN = float("nan")


@pytest.mark.parametrize("knobs", [{}, {"overlong_buffer": 4, "overlong_factor": 0.5}, {"token_mean": False}])
def test_without_penalty_it_is_dapo(knobs):
    assert_identical(fapo(**SHAPE, flaw_penalty=0.0, **knobs), dapo(**SHAPE, **PARENT, **knobs))


def test_without_penalty_a_missing_verdict_costs_nothing():
    scores = checks.scores() | {"flawed": np.full(16, NAN, np.float32)}
    np.testing.assert_array_equal(
        row_advantages(fapo(**SHAPE, flaw_penalty=0.0), scores), row_advantages(dapo(**SHAPE), scores)
    )


def test_defaults_are_the_published_settings():
    algorithm = fapo(**SHAPE)
    assert algorithm.keep is None and algorithm.weights is weights.token_mean
    assert algorithm.needs == {"correct", "flawed"}
    assert fapo(**SHAPE, dynamic_sampling=True).keep is not None
    with pytest.raises(AssertionError):
        assert_identical(algorithm, dapo(**SHAPE, **PARENT))


def test_a_flawed_row_helps_early_and_hurts_late():
    """Its advantage changes sign where right and flawless rows outnumber the wrong ones (flaw_penalty = 1)."""
    flawed = np.array([0, 1, 0, 0] * 4, np.float32)
    early = row_advantages(fapo(**SHAPE), checks.scores([1, 1, 0, 0] * 4) | {"flawed": flawed})
    late = row_advantages(fapo(**SHAPE), checks.scores([1, 1, 1, 0] * 4) | {"flawed": flawed})
    assert early[1] > 0 > late[1]
    np.testing.assert_allclose(early[:4], advantages.group_normalize(np.array([1.0, 0, -1, -1], np.float32), 4), 1e-5)


def test_the_length_penalty_comes_on_top():
    algorithm, scores, rollout = (
        fapo(**SHAPE, overlong_buffer=4, overlong_factor=0.5),
        checks.scores(),
        checks.rollout(),
    )
    penalty = shaping.overlong_penalty(rollout.mask.sum(axis=1), max_length=8, buffer=4, factor=0.5)
    want = shaping.flawed_positive(scores["correct"], scores["flawed"]) + penalty
    np.testing.assert_array_equal(algorithm.rewards(scores, rollout, 0), want)
    assert (np.asarray(penalty) < 0).any()


def test_verdicts_on_wrong_rows_are_not_read_and_missing_ones_leave_right_rows_out():
    scores = checks.scores([1, 1, 0, 0] * 4) | {"flawed": np.array([NAN, 0, NAN, 1] * 4, np.float32)}
    batch = checks.batch_of(fapo(**SHAPE), checks.rollout(), scores)
    np.testing.assert_array_equal(np.asarray(batch.mask).any(axis=1), [False, True, True, True] * 4)


def test_diagnostics_by_hand():
    algorithm = fapo(**SHAPE)
    assert algorithm.diagnostics is not None
    scores = {
        "correct": np.array([1, 1, 1, 1, 0, 0, NAN, 1], np.float32),
        "flawed": np.array([1, 0, 0, NAN, 1, NAN, 1, 0], np.float32),
    }
    assert algorithm.diagnostics(None, scores, None, 0) == {"flawed_among_right": 0.25}
    none = algorithm.diagnostics(None, {name: 0 * x for name, x in scores.items()}, None, 0)
    assert np.isnan(none["flawed_among_right"]), "no right row, no share"

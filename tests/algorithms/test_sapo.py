"""SAPO's soft gate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tapojax.algorithms.grpo import grpo
from tapojax.algorithms.sapo import sapo
from tapojax.types import Batch, TokenStats


def loss_of(algorithm, logprobs, advantage):
    ones = jnp.ones(logprobs.shape)
    batch = Batch(ones, ones > 0, advantage * ones, 0 * ones, 0 * ones, None, None, {})
    return algorithm.loss(TokenStats(logprobs, 0 * ones), batch)[0]


@pytest.mark.parametrize(("advantage", "tau"), [(1.5, 1.0), (-2.0, 1.05)])
def test_formula(advantage, tau):
    """L = -A sigmoid(tau (r - 1)) 4 / tau, tau by the sign of A."""
    ratio = np.array([[0.2, 0.9, 1.0, 1.3, 5.0]])
    got = loss_of(sapo(group_size=2), jnp.log(ratio), advantage)
    np.testing.assert_allclose(got, -advantage * 4 / tau / (1 + np.exp(-tau * (ratio - 1))), rtol=1e-6)


def test_gradient_is_grpos_at_ratio_one_and_fades_away_from_it():
    def slope(algorithm, x, advantage):
        return float(jax.grad(lambda lp: loss_of(algorithm, lp, advantage).sum())(jnp.full((1, 1), x))[0, 0])

    for advantage in (1.0, -1.0):
        soft, hard = sapo(group_size=2), grpo(group_size=2)
        assert slope(soft, 0.0, advantage) == pytest.approx(slope(hard, 0.0, advantage))
        far, near = (abs(slope(soft, x, advantage)) / np.exp(x) for x in (1.5, 0.3))
        assert 0 < far < near < 1, "it fades and never stops"
    positive, negative = (abs(slope(sapo(group_size=2), 1.5, sign)) for sign in (1.0, -1.0))
    assert negative < positive, "a bad token's gradient fades faster"


def test_a_ratio_past_all_bounds_stays_finite():
    got = loss_of(sapo(group_size=2), jnp.array([[500.0, -500.0]]), -1.0)
    assert np.isfinite(got).all()


def test_tau_must_be_positive():
    with pytest.raises(ValueError, match="tau_negative=0.0"):
        sapo(group_size=2, tau_negative=0.0)

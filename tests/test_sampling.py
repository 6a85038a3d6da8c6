"""Filters keep what they promise; the inverse-CDF sampler draws from softmax(logits)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tapojax import sampling


def test_top_k_keeps_the_k_largest():
    logits = jnp.array([[0.0, 3.0, 1.0, 2.0]])
    np.testing.assert_array_equal(jnp.isfinite(sampling.top_k(logits, 2)), [[False, True, False, True]])
    np.testing.assert_array_equal(sampling.top_k(logits, 0), logits)
    np.testing.assert_array_equal(sampling.top_k(logits, 9), logits)


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3], [0.97, 0.01, 0.01, 0.01]]))
    kept = jnp.isfinite(sampling.top_p(logits, 0.6))
    np.testing.assert_array_equal(kept, [[False, True, False, True], [True, False, False, False]])
    np.testing.assert_array_equal(sampling.top_p(logits, 1.0), logits)
    assert jnp.isfinite(sampling.top_p(logits, 1e-9)).sum() == 2, "the most likely token always stays"


@pytest.mark.parametrize("vocab", [5, 64, 200])
def test_categorical_draws_from_the_softmax(vocab):
    """Chi-squared over 40,000 draws stays below its mean + 5 standard deviations."""
    draws = 40_000
    logits = jax.random.normal(jax.random.key(1), (vocab,)) * 1.5
    logits = logits.at[1].set(-jnp.inf)
    tokens = jax.jit(sampling.categorical)(jax.random.key(2), jnp.broadcast_to(logits, (draws, vocab)))
    counts, expected = np.bincount(tokens, minlength=vocab), draws * np.asarray(jax.nn.softmax(logits))
    assert counts[1] == 0, "a token of probability 0 was drawn"
    positive = expected > 0
    chi2 = np.sum((counts[positive] - expected[positive]) ** 2 / expected[positive])
    freedom = positive.sum() - 1
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom), f"chi2 {chi2:.1f} with {freedom} degrees of freedom"


def test_categorical_depends_on_the_key_only():
    logits = jax.random.normal(jax.random.key(0), (8, 100))
    first, again, other = (sampling.categorical(jax.random.key(k), logits) for k in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()

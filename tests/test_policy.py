"""`score` is the log-softmax of the full logits at the masked tokens, and 0 elsewhere, however it is cut up."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tapojax import policy
from tapojax.models import decoder
from tapojax.models.config import DecoderConfig

MODEL = DecoderConfig(40, 16, 24, 1, 2, 1, 8, initializer_range=0.5)
ROWS, LENGTH = 8, 12


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: decoder.init(MODEL, jax.random.key(0)))()


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (ROWS, LENGTH), 0, 40)


@pytest.fixture(scope="module")
def mask():
    """Completions of several lengths; row 2 has holes, row 5 is empty, row 6 goes to the end."""
    mask = np.zeros((ROWS, LENGTH), bool)
    for row, (start, stop) in enumerate([(3, 7), (1, 4), (2, 9), (4, 5), (5, 9), (0, 0), (6, 12), (2, 8)]):
        mask[row, start:stop] = True
    mask[2, [3, 4, 6]] = False
    return jnp.asarray(mask)


@pytest.fixture(scope="module")
def score():
    return jax.jit(policy.make_score(MODEL, max_scored=6))


@functools.partial(jax.jit, static_argnums=2)
def full(params, tokens, temperature):
    """log p and H of every token from all logits at once."""
    logits = decoder.hidden_states(MODEL, params, tokens) @ decoder.head(params) / temperature
    log_p = jax.nn.log_softmax(logits[:, :-1])
    chosen = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
    entropies = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    return tuple(jnp.pad(x, ((0, 0), (1, 0))) for x in (chosen, entropies))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_score_is_the_log_softmax_of_the_full_logits(params, tokens, mask, temperature):
    stats = jax.jit(policy.make_score(MODEL, max_scored=6, temperature=temperature))(params, tokens, mask)
    logprobs, entropies = full(params, tokens, temperature)
    np.testing.assert_allclose(stats.logprobs, jnp.where(mask, logprobs, 0), atol=2e-5)
    np.testing.assert_allclose(stats.entropies, jnp.where(mask, entropies, 0), atol=2e-5)
    assert stats.logprobs.dtype == stats.entropies.dtype == jnp.float32


def test_zero_outside_the_mask(score, params, tokens, mask):
    for values in score(params, tokens, mask):
        assert np.all(np.asarray(values)[~mask] == 0)
        assert np.all(np.asarray(values)[mask] != 0)


def test_each_masked_token_is_scored_alone(params, tokens, mask):
    """A hole in the mask changes nothing at the tokens that stay."""
    score = jax.jit(policy.make_score(MODEL, max_scored=LENGTH))
    everything = score(params, tokens, jnp.ones_like(mask).at[:, 0].set(False))
    for got, want in zip(score(params, tokens, mask), everything, strict=True):
        np.testing.assert_allclose(got, jnp.where(mask, want, 0), atol=1e-5)


@pytest.mark.parametrize("max_scored", [7, 100])
def test_a_larger_budget_changes_nothing(score, params, tokens, mask, max_scored):
    got = jax.jit(policy.make_score(MODEL, max_scored=max_scored))(params, tokens, mask)
    np.testing.assert_allclose(got.logprobs, score(params, tokens, mask).logprobs, atol=1e-5)


def test_gradient_is_that_of_the_full_logits(score, params, tokens, mask):
    upstream = jnp.where(mask, jax.random.normal(jax.random.key(2), mask.shape), 0)
    got = jax.jit(jax.grad(lambda p: jnp.sum(upstream * score(p, tokens, mask).logprobs)))(params)
    want = jax.jit(jax.grad(lambda p: jnp.sum(upstream * full(p, tokens, 1.0)[0])))(params)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_in_microbatches_is_the_same_function(score, params, tokens, mask, parts):
    got = jax.jit(policy.in_microbatches(score, parts))(params, tokens, mask)
    for a, b in zip(got, score(params, tokens, mask), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_microbatches_take_every_parts_th_row():
    """So that each part has rows of every device when rows are split over devices in runs."""
    parts = policy.split_rows(jnp.arange(12), 3)
    np.testing.assert_array_equal(parts, [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]])


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_join_rows_inverts_split_rows(parts):
    tree = {"a": jnp.arange(30.0).reshape(6, 5), "b": (jnp.arange(6), None)}
    back = policy.join_rows(policy.split_rows(tree, parts))
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(got, want)


def test_rows_that_do_not_divide_are_refused(score, params, tokens, mask):
    with pytest.raises(ValueError, match="8 rows do not divide into 3 micro-batches"):
        policy.split_rows((tokens, mask), 3)
    with pytest.raises(ValueError, match="8 rows do not divide into 5 micro-batches"):
        policy.in_microbatches(score, 5)(params, tokens, mask)

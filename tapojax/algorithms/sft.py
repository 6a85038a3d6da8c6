"""Supervised warm start in the same train step: imitate the masked tokens, averaged over all of them."""

import jax.numpy as jnp

from tapojax import weights
from tapojax.types import Algorithm, Batch


def sft() -> Algorithm:
    """loss = -log p(token); there are no rewards, so no advantages."""
    return Algorithm(
        group_size=1,
        needs=frozenset(),
        advantages=lambda rewards, scores, rollout: jnp.zeros(rollout.mask.shape),
        loss=lambda stats, batch: (-stats.logprobs, {}),
        weights=weights.token_mean,
    )


def make_batch(tokens, mask) -> Batch:
    """Demonstrations as a batch: what the policy loss would need besides is empty."""
    zeros = jnp.zeros(mask.shape)
    return Batch(tokens, mask, zeros, zeros, None, None, None, {})

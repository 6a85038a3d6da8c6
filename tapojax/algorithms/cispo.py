"""CISPO: clips the importance weight, never the token's gradient. MiniMax, arXiv 2506.13585, eq. 4-5.

Differs from GRPO: loss = -sg[clip(ratio)] A logprob; token-mean aggregation.
"""

import jax.numpy as jnp

from tapojax import losses, weights
from tapojax.algorithms.grpo import grpo
from tapojax.types import Algorithm


def cispo(*, group_size: int, clip_low: float = 1.0, clip_high: float = 4.0) -> Algorithm:
    """Weights are clipped to [1 - clip_low, 1 + clip_high]; clip_low = 1 leaves the lower side open (paper)."""

    def loss(stats, batch):
        ratio = jnp.exp(stats.logprobs - batch.old_logprobs)
        outside = (ratio < 1 - clip_low) | (ratio > 1 + clip_high)
        per_token = losses.cispo(
            stats.logprobs, batch.old_logprobs, batch.advantages, clip_low=clip_low, clip_high=clip_high
        )
        return per_token, {"clip_fraction": outside.astype(ratio.dtype)}

    return grpo(group_size=group_size)._replace(loss=loss, weights=weights.token_mean)

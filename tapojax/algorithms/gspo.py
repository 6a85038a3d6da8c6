"""GSPO: one importance ratio a sequence. Zheng et al., arXiv 2507.18071, eq. 5-7.

Differs from GRPO: the ratio is the geometric mean of the row's token ratios; so the clip range is far smaller.
"""

import jax.numpy as jnp

from tapojax import advantages, losses
from tapojax.algorithms.grpo import grpo
from tapojax.types import Algorithm


def gspo(*, group_size: int, clip_low: float = 3e-4, clip_high: float = 4e-4) -> Algorithm:
    """GRPO with sequence-level ratio and clipping."""

    def loss(stats, batch):
        clip = dict(clip_low=clip_low, clip_high=clip_high)
        per_token = losses.sequence_clipped(stats.logprobs, batch.old_logprobs, batch.advantages, batch.mask, **clip)
        log_ratio = (stats.logprobs - batch.old_logprobs).sum(axis=1) / jnp.maximum(batch.mask.sum(axis=1), 1)
        log_ratio = advantages.per_token(log_ratio, batch.mask)
        clipped = losses.clip_fraction(log_ratio, jnp.zeros_like(log_ratio), batch.advantages, **clip)
        return per_token, {"clip_fraction": clipped}

    return grpo(group_size=group_size)._replace(loss=loss)

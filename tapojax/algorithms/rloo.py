"""RLOO: REINFORCE with the mean of the other rows as baseline. Ahmadian et al., arXiv 2402.14740, eq. 8.

Differs from GRPO: A = R - mean of the others; the whole completion is one action, so its ratio is the sequence's.
"""

import jax.numpy as jnp

from tapojax import advantages, losses
from tapojax.algorithms.grpo import grpo
from tapojax.types import Algorithm


def rloo(*, group_size: int, clip_low: float = 0.2, clip_high: float = 0.2) -> Algorithm:
    """Leave-one-out advantages, PPO's clip on the sequence ratio, mean over rows."""

    def advantage(rewards, scores, rollout):
        return advantages.per_token(advantages.leave_one_out(rewards, group_size), rollout.mask)

    def loss(stats, batch):
        clip = dict(clip_low=clip_low, clip_high=clip_high)
        inputs = stats.logprobs, batch.old_logprobs, batch.advantages, batch.mask
        log_ratio = advantages.per_token((stats.logprobs - batch.old_logprobs).sum(axis=1), batch.mask)
        clipped = losses.clip_fraction(log_ratio, jnp.zeros_like(log_ratio), batch.advantages, **clip)
        return losses.sequence_product_clipped(*inputs, **clip), {"clip_fraction": clipped}

    return grpo(group_size=group_size)._replace(advantages=advantage, loss=loss)

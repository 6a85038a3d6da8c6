"""Dr.GRPO: no division by the group's std, none by the row's length. Liu et al., arXiv 2503.20783.

Differs from GRPO: A = R - mean; the loss divides by the completion budget, so long wrong rows are not favoured.
"""

import functools

from tapojax import advantages, weights
from tapojax.algorithms.grpo import grpo
from tapojax.types import Algorithm


def dr_grpo(*, group_size: int, max_tokens: int, clip_low: float = 0.2, clip_high: float = 0.2) -> Algorithm:
    """GRPO with centred rewards and a constant length normaliser."""

    def advantage(rewards, scores, rollout):
        return advantages.per_token(advantages.group_normalize(rewards, group_size, scale=False), rollout.mask)

    return grpo(group_size=group_size, clip_low=clip_low, clip_high=clip_high)._replace(
        advantages=advantage, weights=functools.partial(weights.constant_length, length=max_tokens)
    )

"""PKPO: rewards that make the policy gradient one of pass@k. Walder and Karkhanis, arXiv 2505.15201.

Differs from Dr.GRPO: of n rows with c right ones a right row is worth 1 and a wrong row the chance that k - 1 of the
other rows hold a right one, 1 - C(n - 1 - c, k - 1) / C(n - 1, k - 1); so groups that mostly succeed teach little, and
the policy need not give up its variety. (The paper's reward is this times k / n.)
"""

import jax.numpy as jnp
import numpy as np

from tapojax.algorithms.dr_grpo import dr_grpo
from tapojax.types import Algorithm


def pkpo(*, group_size: int, max_tokens: int, k: int = 4, clip_low: float = 0.2, clip_high: float = 0.2) -> Algorithm:
    """Neutral: k = 1. The group's std must not divide: of two-valued rewards it would undo the transformation.

    Rewards count as right above 0.5. Raises: ValueError unless 1 <= k <= group_size.
    """
    if not 1 <= k <= group_size:
        raise ValueError(f"k={k} must be between 1 and group_size={group_size}: k rows are drawn from a group")

    def rewards(scores, rollout, step):
        correct = jnp.asarray(scores["correct"]).reshape(-1, group_size)
        valid = ~jnp.isnan(correct)
        others = jnp.sum(valid, axis=1, keepdims=True) - 1
        right = jnp.sum(correct > 0.5, axis=1, keepdims=True)
        drawn = np.arange(k - 1)
        left, pool = jnp.maximum(others - right - drawn[:, None, None], 0), others - drawn[:, None, None]
        none_right = jnp.prod(left / jnp.maximum(pool, 1), axis=0)  # k - 1 draws without replacement, all wrong
        worth = jnp.where(correct > 0.5, 1.0, 1 - none_right)
        return jnp.where(valid, worth, jnp.nan).reshape(-1)

    parent = dr_grpo(group_size=group_size, max_tokens=max_tokens, clip_low=clip_low, clip_high=clip_high)
    return parent._replace(rewards=rewards)

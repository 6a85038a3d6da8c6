"""EDGE-GRPO's entropy-driven advantage: surer rows count more. Zhang et al., arXiv 2507.21848.

Differs from GRPO: A' = A · (mean entropy of all rows / mean entropy of the row); token-mean aggregation. The paper's
guided error correction writes reflections and solutions into prompts: a step of data generation, not part of it here.
"""

import jax.numpy as jnp

from tapojax import advantages
from tapojax.algorithms.dapo import dapo
from tapojax.types import Algorithm


def edge_grpo(
    *, group_size: int, max_tokens: int, strength: float = 1.0, clip_low: float = 0.2, clip_high: float = 0.2
) -> Algorithm:
    """The factor to the power of `strength`. Neutral: strength = 0, then DAPO with these clips and no other part."""
    parent = dapo(
        group_size=group_size, max_tokens=max_tokens, clip_low=clip_low, clip_high=clip_high, dynamic_sampling=False
    )

    def signals(old_stats, rollout):
        ones = jnp.ones(rollout.mask.shape[0])
        factor = advantages.entropy_scaled(ones, old_stats.entropies, rollout.mask) ** strength
        return {"entropy_factor": advantages.per_token(factor, rollout.mask)}

    def loss(stats, batch):
        factor = batch.signals["entropy_factor"]
        per_token, diagnostics = parent.loss(stats, batch._replace(advantages=factor * batch.advantages))
        return per_token, {**diagnostics, "entropy_factor": factor}

    return parent._replace(signals=signals, loss=loss) if strength else parent

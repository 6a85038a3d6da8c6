"""Forking-token DAPO: only the tokens of highest entropy are trained on. Wang et al., "Beyond the 80/20 Rule",
arXiv 2506.01939.

Differs from DAPO: the loss is the mean over the kept tokens.
"""

from typing import Any

import jax.numpy as jnp

from tapojax import entropy
from tapojax.algorithms.dapo import dapo
from tapojax.types import Algorithm


def forking(
    *,
    group_size: int,
    max_tokens: int,
    fraction: float = 0.2,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float = 10.0,
    dynamic_sampling: bool = True,
    overlong_buffer: int = 0,
    overlong_factor: float = 1.0,
) -> Algorithm:
    """Neutral: fraction = 1. Chosen by the old policy's entropies among the whole rollout batch (our choice; the code
    takes the current policy's and each micro-batch by itself)."""
    knobs: dict[str, Any] = dict(
        dynamic_sampling=dynamic_sampling, overlong_buffer=overlong_buffer, overlong_factor=overlong_factor
    )
    clips: dict[str, Any] = dict(clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    parent = dapo(group_size=group_size, max_tokens=max_tokens, **clips, **knobs)

    def signals(old_stats, rollout):
        """N / K at the K kept of N tokens: the mean over all tokens is then that over the kept ones."""
        kept = entropy.top_fraction(old_stats.entropies, rollout.mask, fraction)
        return {"forking": kept * (jnp.sum(rollout.mask) / jnp.maximum(jnp.sum(kept), 1))}

    def loss(stats, batch):
        per_token, diagnostics = parent.loss(stats, batch)
        return batch.signals["forking"] * per_token, diagnostics

    return parent._replace(signals=signals, loss=loss) if fraction < 1 else parent

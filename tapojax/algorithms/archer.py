"""Archer: each row's high-entropy (reasoning) tokens get a wider clip range and less KL than its low-entropy
(knowledge) tokens. Wang et al., arXiv 2507.15778, with the released code.

Differs from DAPO: clip range and KL coefficient of the two classes of tokens; symmetric clips.
"""

from typing import Any

import jax.numpy as jnp

from tapojax import entropy, losses
from tapojax.algorithms.dapo import dapo
from tapojax.types import Algorithm


def archer(
    *,
    group_size: int,
    max_tokens: int,
    quantile: float = 0.8,
    low_entropy_clip: float = 0.2,
    high_entropy_clip: float = 0.5,
    low_entropy_kl: float = 0.001,
    high_entropy_kl: float = 0.0,
    dual_clip: float = 10.0,
    dynamic_sampling: bool = True,
    overlong_buffer: int = 0,
    overlong_factor: float = 1.0,
) -> Algorithm:
    """Neutral: both clips equal, both KL coefficients 0. The KL (k3) is averaged within each class of tokens. Classes
    are those of the old policy on the whole rollout batch (our choice; the code takes the current policy's)."""
    knobs: dict[str, Any] = dict(
        dynamic_sampling=dynamic_sampling, overlong_buffer=overlong_buffer, overlong_factor=overlong_factor
    )
    clips: dict[str, Any] = dict(clip_low=low_entropy_clip, clip_high=low_entropy_clip, dual_clip=dual_clip)
    parent = dapo(group_size=group_size, max_tokens=max_tokens, **clips, **knobs)
    needs_reference = low_entropy_kl != 0 or high_entropy_kl != 0

    def signals(old_stats, rollout):
        high = entropy.above_quantile(old_stats.entropies, rollout.mask, quantile)
        low, tokens = rollout.mask & ~high, jnp.sum(rollout.mask)
        kl = sum(
            coef * of_class * (tokens / jnp.maximum(jnp.sum(of_class), 1))
            for coef, of_class in ((low_entropy_kl, low), (high_entropy_kl, high))
        )
        return {"high_entropy": high.astype(float), "kl_coef": kl}

    def loss(stats, batch):
        clip = jnp.where(batch.signals["high_entropy"] > 0, high_entropy_clip, low_entropy_clip)
        inputs, bounds = (stats.logprobs, batch.old_logprobs, batch.advantages), dict(clip_low=clip, clip_high=clip)
        per_token = losses.clipped_surrogate(*inputs, **bounds, dual_clip=dual_clip or None)
        diagnostics = {"clip_fraction": losses.clip_fraction(*inputs, **bounds)}
        if needs_reference:
            kl = losses.kl_k3(stats.logprobs, batch.ref_logprobs)
            per_token, diagnostics["reference_kl"] = per_token + batch.signals["kl_coef"] * kl, kl
        return per_token, diagnostics

    return parent._replace(signals=signals, loss=loss, needs_reference=needs_reference)

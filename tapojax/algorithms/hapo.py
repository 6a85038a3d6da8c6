"""HAPO: temperature, advantages and clip range follow each token's entropy. Liu et al., arXiv 2509.16591, and its code.

Differs from DAPO: adaptive temperature, token-level group average, redistributed advantages and asymmetric adaptive
clipping, each with a neutral value; all neutral it is DAPO.
"""

from typing import Any

import jax
import jax.numpy as jnp

from tapojax import advantages, entropy, losses
from tapojax.algorithms.dapo import dapo
from tapojax.types import Algorithm


def hapo(
    *,
    group_size: int,
    max_tokens: int,
    temperature: float,
    temperature_strength: float = 0.05,
    group_average: bool = True,
    redistribution: float = 1.0,
    clip_strength: float = 1.0,
    pivot: float = 0.8,
    signed: bool = True,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 10.0,
    dynamic_sampling: bool = False,
    overlong_buffer: int = 0,
    overlong_factor: float = 1.0,
) -> Algorithm:
    """Neutral: temperature_strength = redistribution = clip_strength = 0, group_average = False.

    Defaults are the released scripts'; the paper has temperature_strength 0.1, clip_high 0.28 and dynamic sampling.
    Entropies are the old policy's and the signal is made once a rollout batch (our choice; the code takes the current
    policy's and each micro-batch by itself); temperatures follow the batch before. Old log-probs are at the base
    `temperature`, as in the code; train.correction weighs the difference to what was sampled from.
    signed = False is the sign that the code gives low-entropy tokens, see `entropy.signal`.
    """
    clips: dict[str, Any] = dict(clip_low=clip_low, clip_high=clip_high)
    knobs = clips | dict(overlong_buffer=overlong_buffer, overlong_factor=overlong_factor, dual_clip=dual_clip)
    algorithm = dapo(group_size=group_size, max_tokens=max_tokens, dynamic_sampling=dynamic_sampling, **knobs)

    def signals(old_stats, rollout):
        return {"entropy_signal": entropy.signal(old_stats.entropies, rollout.mask, pivot=pivot, signed=signed)[0]}

    def update_carry(carry, old_stats, rollout):
        return entropy.signal(old_stats.entropies, rollout.mask, pivot=pivot, signed=signed)[1]

    def advantage(rewards, scores, rollout):
        return advantages.token_group_normalize(rewards, rollout.mask, group_size)

    def loss(stats, batch):
        signal, ratio = batch.signals["entropy_signal"], jnp.exp(stats.logprobs - batch.old_logprobs)
        low, high = losses.adaptive_clip(signal, **clips, strength=clip_strength)
        bounds = dict(clip_low=low, clip_high=high)
        moved = losses.redistribute(batch.advantages, signal, ratio, **bounds, strength=redistribution)
        inputs = stats.logprobs, batch.old_logprobs, moved
        return losses.clipped_surrogate(*inputs, **bounds, dual_clip=dual_clip or None), {
            "clip_fraction": losses.clip_fraction(*inputs, **bounds),
            "entropy_signal": signal,
            "amplified": (jnp.abs(moved) > jnp.abs(batch.advantages)).astype(float),
            "damped": (jnp.abs(moved) < jnp.abs(batch.advantages)).astype(float),
        }

    if temperature_strength:
        adaptive: Any = entropy.AdaptiveTemperature(temperature, temperature_strength)
        algorithm = algorithm._replace(temperature=adaptive, carry=entropy.no_stats())
        algorithm = algorithm._replace(update_carry=jax.jit(update_carry))
    if group_average:
        algorithm = algorithm._replace(advantages=advantage)
    if redistribution or clip_strength:
        algorithm = algorithm._replace(signals=signals, loss=loss)
    return algorithm

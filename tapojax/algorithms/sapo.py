"""SAPO: a soft gate in place of the hard clip. Gao et al., arXiv 2511.20347.

Differs from GRPO: the surrogate is sigmoid(tau (r - 1)) 4 / tau times A, so the gradient fades as r leaves 1 instead of
stopping, faster for bad tokens (tau_negative) than for good ones (tau_positive).
"""

import jax
import jax.numpy as jnp

from tapojax.algorithms.grpo import grpo
from tapojax.types import Algorithm


def sapo(*, group_size: int, tau_positive: float = 1.0, tau_negative: float = 1.05) -> Algorithm:
    """At r = 1 the gradient is that of the unclipped surrogate whatever tau is: d/dr (sigmoid 4 / tau) = 1 there.

    Raises: ValueError if a tau is not positive.
    """
    if min(tau_positive, tau_negative) <= 0:
        raise ValueError(f"tau_positive={tau_positive}, tau_negative={tau_negative}: both must be above 0, such as 1.0")

    def loss(stats, batch):
        ratio = jnp.exp(jnp.clip(stats.logprobs - batch.old_logprobs, -20, 20))
        tau = jnp.where(batch.advantages > 0, tau_positive, tau_negative)
        gate = jax.nn.sigmoid(tau * (ratio - 1))
        slope = 4 * gate * (1 - gate)  # of the gate, 1 at r = 1: how much of the gradient is left
        return -batch.advantages * 4 / tau * gate, {"gate_slope": jnp.where(batch.mask, slope, 0)}

    return grpo(group_size=group_size)._replace(loss=loss)

"""Signals from token entropies: how uncertain the policy was at a token, compared with the others of its batch.

Entropies are those of the whole softmax, in nats, [B, T] and aligned with tokens. All results are constants of the
loss: gradients are stopped here. Statistics run over all tokens in the mask, so take them on the whole rollout batch.
H_t is a token's entropy and N the number of tokens in the mask below.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, ScalarLike


class EntropyStats(NamedTuple):
    """The spread of ln H in one batch, all scalars; NaN where there is no batch yet."""

    quantile: Float[Array, ""]  # Q, of ln H
    scale: Float[Array, ""]  # s, the root mean square distance from Q
    above: Float[Array, ""]  # multiplies a positive distance in units of s, so that the largest becomes 1
    below: Float[Array, ""]  # multiplies a negative one, so that the lowest becomes -1


def no_stats() -> EntropyStats:
    """What there is before the first batch; numpy, so that no device is asked for."""
    return EntropyStats(*np.full(4, np.nan, np.float32))


def signal(
    entropies: Float[ArrayLike, "B T"], mask: Bool[ArrayLike, "B T"], *, pivot: ScalarLike = 0.8, signed: bool = True
) -> tuple[Float[Array, "B T"], EntropyStats]:
    """HAPO's entropy signal ĥ in [-1, 1]: positive where the policy was unsure, 0 at the pivot quantile and outside.

    l = ln max(H, 1e-8),  Q = the round(pivot·(N - 1))-th smallest l (from 0; half to even)
    s = √max(mean (l - Q)², 1e-8),  h = (l - Q) / s
    ĥ = h / max h   where h > 0
    ĥ = h / |min h| elsewhere

    `signed=False` is the released code, which divides the second line by min h itself: low-entropy tokens then get a
    signal in [0, 1] too, the left clip is never widened, and sure tokens are sampled hotter. The paper's formula has
    the same sign, its text says [-1, 1] and its cases need ĥ < 0; so signed is the default, our choice. The paper
    takes the standard deviation for s. Without a valid token ĥ is 0 and the statistics are NaN.

    Source: Liu et al. 2025 (HAPO), arXiv 2509.16591, and its code (starriver030515/HAPO).
    """
    floored = jnp.maximum(jnp.where(mask, _constant(entropies), 1), 1e-8)
    count = jnp.sum(mask)
    # A product in float32: beyond ten million tokens the rank may be a few off, among as many that hardly differ.
    rank = jnp.round(pivot * jnp.maximum(count - 1, 0)).astype(int)
    middle = jnp.sort(jnp.where(mask, floored, jnp.inf), axis=None)[rank]
    # Vector and scalar logarithms may round differently, and ĥ stretches any distance to 1: equal must be exactly 0.
    distance = jnp.where(mask & (floored != middle), jnp.log(floored) - jnp.log(middle), 0)
    scale = jnp.sqrt(jnp.maximum(jnp.sum(distance**2) / jnp.maximum(count, 1), 1e-8))
    distance = distance / scale
    highest, lowest = jnp.maximum(jnp.max(distance), 1e-8), jnp.minimum(jnp.min(distance), -1e-8)
    divisor = jnp.where(distance > 0, highest, -lowest if signed else lowest)
    stats = EntropyStats(jnp.log(middle), scale, 1 / highest, (-1 if signed else 1) / lowest)
    return distance / divisor, jax.tree.map(lambda x: jnp.where(count > 0, x, jnp.nan), stats)


def adaptive_temperature(
    logits: Float[ArrayLike, "B V"], stats: EntropyStats, *, base: ScalarLike, strength: ScalarLike
) -> Float[Array, "B"]:
    """HAPO's sampling temperature of each row at one decode step: hotter where the policy is unsure.

    h = (ln max(H, 1e-6) - Q) / (s + 1e-6)
    T = base · (1 + strength·clip(h·above where h > 0 else h·below, -1, 1))

    H is the entropy of softmax(logits); Q, s, above and below are `stats` of an earlier batch whose entropies were
    taken at the same temperature as `logits`. Without statistics, or with strength = 0, T = base. A logit of -inf (a
    banned token) has p ln p = 0: H is the entropy of the others, where the released code gets NaN and falls back to
    base. The paper states the unbounded h itself for the clipped term, with strength 0.1.

    Source: Liu et al. 2025 (HAPO), arXiv 2509.16591, and the sampler in its code (starriver030515/HAPO).
    """
    logprobs = jax.nn.log_softmax(_constant(logits), axis=-1)
    # No term is negative, so a nearly sure policy's small entropy keeps its digits.
    entropies = jnp.sum(jnp.where(logprobs > -jnp.inf, -jnp.exp(logprobs) * logprobs, 0), axis=-1)
    distance = (jnp.log(jnp.maximum(entropies, 1e-6)) - stats.quantile) / (stats.scale + 1e-6)
    relative = jnp.clip(distance * jnp.where(distance > 0, stats.above, stats.below), -1, 1)
    return jnp.asarray(base * (1 + strength * jnp.where(jnp.isnan(relative), 0, relative)))


class AdaptiveTemperature(NamedTuple):
    """`adaptive_temperature` as a value for an algorithm's `temperature` slot: numbers that a remote sampler can be
    told. Entropies are taken at the base temperature, like those of `score` that the statistics describe."""

    base: float
    strength: float

    def __call__(self, logits: Float[ArrayLike, "B V"], stats: EntropyStats) -> Float[Array, "B"]:
        return adaptive_temperature(jnp.asarray(logits) / self.base, stats, base=self.base, strength=self.strength)


def top_fraction(
    entropies: Float[ArrayLike, "B T"], mask: Bool[ArrayLike, "B T"], fraction: ScalarLike
) -> Bool[Array, "B T"]:
    """The K = max(1, ⌈fraction·N⌉) tokens of highest entropy in the mask, "forking tokens"; all with fraction = 1.

    ⌈x⌉ is taken of x - 1e-4, so that rounding adds no token. Equal entropies go by position, first row first. The paper
    writes a threshold for the batch, its code the K of a micro-batch.

    Source: Wang et al. 2025, "Beyond the 80/20 Rule", arXiv 2506.01939.
    """
    count = jnp.sum(mask)
    # From the dropped part, so that fraction = 1 drops none whatever the precision of the product.
    dropped = jnp.floor((1 - fraction) * count + 1e-4).astype(count.dtype)
    kept = jnp.clip(count - dropped, 1, jnp.maximum(count, 1))
    order = jnp.argsort(jnp.where(mask, -_constant(entropies), jnp.inf), axis=None, stable=True)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
    return jnp.asarray(mask) & (place < kept).reshape(jnp.shape(mask))


def above_quantile(
    entropies: Float[ArrayLike, "B T"], mask: Bool[ArrayLike, "B T"], quantile: ScalarLike
) -> Bool[Array, "B T"]:
    """Archer's reasoning tokens: entropy above the quantile of the row's own tokens, interpolated linearly.

    A row's only token is not above; the row's other tokens in the mask are its knowledge tokens.

    Source: Wang et al. 2025 (Archer), arXiv 2507.15778, and its code (wizard-III/ArcherCodeR).
    """
    entropies = _constant(entropies)
    ordered = jnp.sort(jnp.where(mask, entropies, jnp.inf), axis=1)
    rank = quantile * jnp.maximum(jnp.sum(mask, axis=1, keepdims=True) - 1, 0)
    lower, upper = (jnp.take_along_axis(ordered, f(rank).astype(int), axis=1) for f in (jnp.floor, jnp.ceil))
    weight = rank - jnp.floor(rank)
    threshold = jnp.where(weight > 0, lower + weight * (upper - lower), lower)
    return jnp.asarray(mask) & (entropies > threshold)


def _constant(x: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
    """Without a gradient, in float32 or better."""
    return jax.lax.stop_gradient(jnp.asarray(x, jnp.result_type(x, jnp.float32)))

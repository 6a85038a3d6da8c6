"""Policy losses and KL estimators, per token and to be minimised: loss = sum(weights * per_token).

What every function here expects of its caller:
  * arrays are [B, T] and aligned with tokens; outside the mask they hold 0 (any finite number will do) and the weights
    are 0. The functions that take no mask cannot hide an inf or NaN: 0 · inf is NaN in value and in gradient, so put 0
    there with `where` before the call. Those that take a mask do this themselves and return 0 outside it;
  * old_logprobs, ref_logprobs, advantages and clips are constants of the loss. Their gradients are not stopped here
    (those of HAPO's, which are made inside the loss, are);
  * `clip_low` and `clip_high` are distances from 1, scalars or one a token.

δ_t = logprobs - old_logprobs and r_t = exp(δ_t) below; sg is stop_gradient, m the mask, n = Σ_t m_t a row's length.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, ScalarLike


def clipped_surrogate(
    logprobs: Float[ArrayLike, "B T"],
    old_logprobs: Float[ArrayLike, "B T"],
    advantages: Float[ArrayLike, "B T"],
    *,
    clip_low: ScalarLike | Float[ArrayLike, "B T"],
    clip_high: ScalarLike | Float[ArrayLike, "B T"],
    dual_clip: float | int | None = None,
    max_log_ratio: ScalarLike = 20.0,
) -> Float[Array, "B T"]:
    """PPO's clipped surrogate, the loss of GRPO, Dr.GRPO and DAPO (which sets clip_high > clip_low).

    L_t = max(-r_t·A_t, -clip(r_t, 1 - clip_low, 1 + clip_high)·A_t)
    L_t = min(L_t, -dual_clip·A_t)    where A_t < 0, with `dual_clip`

    `dual_clip` is an absolute ratio above 1 + clip_high; it bounds the loss of a bad token that became far more likely.
    δ is first limited to ±max_log_ratio, which keeps exp finite; inf lifts the limit. The gradient is exactly 0
    wherever one of the three bounds holds.

    Raises: ValueError if dual_clip <= 1.
    Source: Schulman et al. 2017, arXiv 1707.06347, eq. 7; Shao et al. 2024, arXiv 2402.03300; asymmetric clip Yu et
    al. 2025, arXiv 2503.14476; dual clip Ye et al. 2020, arXiv 1912.09729.
    """
    logprobs, old_logprobs, advantages, low, high = _promote(logprobs, old_logprobs, advantages, clip_low, clip_high)
    ratio = jnp.exp(jnp.clip(logprobs - old_logprobs, jnp.negative(max_log_ratio), max_log_ratio))
    loss = _surrogate(ratio, advantages, low, high)
    if dual_clip is None:
        return loss
    if dual_clip <= 1:
        raise ValueError(f"dual_clip={dual_clip} would stop every bad token's gradient; use a ratio above 1, such as 3")
    ceiling = -dual_clip * advantages
    return jnp.where((advantages < 0) & (loss > ceiling), ceiling, loss)


def cispo(
    logprobs: Float[ArrayLike, "B T"],
    old_logprobs: Float[ArrayLike, "B T"],
    advantages: Float[ArrayLike, "B T"],
    *,
    clip_low: ScalarLike | Float[ArrayLike, "B T"],
    clip_high: ScalarLike | Float[ArrayLike, "B T"],
) -> Float[Array, "B T"]:
    """CISPO: REINFORCE with clipped importance weights, so that a clipped token keeps its gradient.

    L_t = -sg[clip(r_t, 1 - clip_low, 1 + clip_high)]·A_t·logprobs_t

    clip_low >= 1 removes the lower bound (a ratio is never negative), as in the paper. TRL states the upper bound as an
    absolute ratio: clip_high = bound - 1.

    Source: MiniMax 2025, arXiv 2506.13585, eq. 4-5.
    """
    logprobs, old_logprobs, advantages, low, high = _promote(logprobs, old_logprobs, advantages, clip_low, clip_high)
    ratio = jnp.exp(jax.lax.stop_gradient(logprobs - old_logprobs))
    return -jnp.clip(ratio, 1 - low, 1 + high) * advantages * logprobs


def sequence_clipped(
    logprobs: Float[ArrayLike, "B T"],
    old_logprobs: Float[ArrayLike, "B T"],
    advantages: Float[ArrayLike, "B T"],
    mask: Bool[ArrayLike, "B T"],
    *,
    clip_low: ScalarLike | Float[ArrayLike, "B T"],
    clip_high: ScalarLike | Float[ArrayLike, "B T"],
    max_log_ratio: ScalarLike = 10.0,
) -> Float[Array, "B T"]:
    """GSPO: the clipped surrogate on the ratio of whole completions, as a geometric mean over their tokens.

    s_t = exp(min(sg[1/n · Σ_u m_u·δ_u] + logprobs_t - sg[logprobs_t], max_log_ratio))
    L_t = max(-s_t·A_t, -clip(s_t, 1 - clip_low, 1 + clip_high)·A_t)

    All s_t of a row have the same value, but each passes its gradient to its own token alone, hence with its own
    advantage. Aggregate with `weights.sequence_mean`; where a row's advantages are equal, value and gradient are then
    those of the plain form, whose gradient runs through the mean. Zero outside the mask.

    Source: Zheng et al. 2025, arXiv 2507.18071, eq. 5-7 and, for the token form, eq. 13-15.
    """
    logprobs, old_logprobs, advantages, low, high = _promote(logprobs, old_logprobs, advantages, clip_low, clip_high)
    mean, own, _ = _sequence_log_ratio(logprobs, old_logprobs, mask)
    ratio = jnp.exp(jnp.minimum(mean + own, max_log_ratio))
    return jnp.where(mask, _surrogate(ratio, jnp.where(mask, advantages, 0), low, high), 0)


def sequence_product_clipped(
    logprobs: Float[ArrayLike, "B T"],
    old_logprobs: Float[ArrayLike, "B T"],
    advantages: Float[ArrayLike, "B T"],
    mask: Bool[ArrayLike, "B T"],
    *,
    clip_low: ScalarLike | Float[ArrayLike, "B T"],
    clip_high: ScalarLike | Float[ArrayLike, "B T"],
    max_log_ratio: ScalarLike = 20.0,
) -> Float[Array, "B T"]:
    """RLOO's loss: the clipped surrogate on the true ratio of whole completions, the product over their tokens.

    s_t = exp(min(sg[Σ_u m_u·δ_u] + n·(logprobs_t - sg[logprobs_t]), max_log_ratio))
    L_t = max(-s_t·A_t, -clip(s_t, 1 - clip_low, 1 + clip_high)·A_t)

    Differs from `sequence_clipped` in that the exponent is n times as large. The factor n cancels the 1/n of
    `weights.sequence_mean`, with which value and gradient are those of one action a completion. Zero outside the mask.

    Source: Ahmadian et al. 2024, arXiv 2402.14740 (the completion as one action), with PPO's clip.
    """
    logprobs, old_logprobs, advantages, low, high = _promote(logprobs, old_logprobs, advantages, clip_low, clip_high)
    mean, own, length = _sequence_log_ratio(logprobs, old_logprobs, mask)
    ratio = jnp.exp(jnp.minimum(length * (mean + own), max_log_ratio))
    return jnp.where(mask, _surrogate(ratio, jnp.where(mask, advantages, 0), low, high), 0)


def clip_fraction(
    logprobs: Float[ArrayLike, "B T"],
    old_logprobs: Float[ArrayLike, "B T"],
    advantages: Float[ArrayLike, "B T"],
    *,
    clip_low: ScalarLike | Float[ArrayLike, "B T"],
    clip_high: ScalarLike | Float[ArrayLike, "B T"],
) -> Float[Array, "B T"]:
    """1 where `clipped_surrogate` takes the clipped branch and so has no gradient, else 0; a metric."""
    logprobs, old_logprobs, advantages, low, high = _promote(logprobs, old_logprobs, advantages, clip_low, clip_high)
    return _clips(jnp.exp(logprobs - old_logprobs), advantages, low, high).astype(logprobs.dtype)


def adaptive_clip(
    signal: Float[ArrayLike, "B T"], *, clip_low: ScalarLike, clip_high: ScalarLike, strength: ScalarLike = 1.0
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """HAPO's asymmetric clip range: unsure tokens may rise further, sure ones fall further.

    low_t  = clip_low · (1 - strength·ĥ_t)  where ĥ_t <= 0, else clip_low
    high_t = clip_high · (1 + strength·ĥ_t) where ĥ_t > 0, else clip_high

    ĥ in [-1, 1] is the signal of `entropy.signal`; its gradient is stopped. strength = 0 gives the plain clips.

    Source: Liu et al. 2025 (HAPO), arXiv 2509.16591, and its code (starriver030515/HAPO).
    """
    signal, low, high = _promote(jax.lax.stop_gradient(signal), clip_low, clip_high)
    return low * (1 + strength * jnp.maximum(-signal, 0)), high * (1 + strength * jnp.maximum(signal, 0))


def redistribute(
    advantages: Float[ArrayLike, "B T"],
    signal: Float[ArrayLike, "B T"],
    ratio: Float[ArrayLike, "B T"],
    *,
    clip_low: ScalarLike | Float[ArrayLike, "B T"],
    clip_high: ScalarLike | Float[ArrayLike, "B T"],
    strength: ScalarLike = 1.0,
) -> Float[Array, "B T"]:
    """HAPO's differential advantages: more for unsure tokens on the move, less for sure tokens that rest.

    A'_t = A_t · (1 + strength·ĥ_t)   where ĥ_t > 0 and r_t outside, or ĥ_t <= 0 and r_t inside, of
           1 - clip_low_t/2 < r_t < 1 + clip_high_t/2
    A'_t = A_t                        elsewhere

    The clips are those of the loss, adaptive ones included, as in the code; the paper does not say which. A constant of
    the loss: all gradients are stopped, also that of r. strength <= 1 keeps every sign; 0 gives A back.

    Source: Liu et al. 2025 (HAPO), arXiv 2509.16591, and its code (starriver030515/HAPO).
    """
    inputs = _promote(advantages, signal, ratio, clip_low, clip_high)
    advantages, signal, ratio, low, high = jax.lax.stop_gradient(inputs)
    resting = (ratio > 1 - low / 2) & (ratio < 1 + high / 2)
    return advantages * jnp.where(resting == (signal <= 0), 1 + strength * signal, 1)


def kl_k1(logprobs: Float[ArrayLike, "B T"], ref_logprobs: Float[ArrayLike, "B T"]) -> Float[Array, "B T"]:
    """KL(π ‖ π_ref) of a sampled token, unbiased but signed and noisy: d = logprobs - ref_logprobs, in nats.

    As a loss its gradient has expectation 0 on-policy; use it in a reward or as a metric.

    Source: Schulman 2020, "Approximating KL divergence".
    """
    logprobs, ref_logprobs = _promote(logprobs, ref_logprobs)
    return logprobs - ref_logprobs


def kl_k2(logprobs: Float[ArrayLike, "B T"], ref_logprobs: Float[ArrayLike, "B T"]) -> Float[Array, "B T"]:
    """½·d² with d = logprobs - ref_logprobs: biased, never negative, and on-policy its gradient is that of the true KL.

    Source: Schulman 2020, "Approximating KL divergence".
    """
    return 0.5 * kl_k1(logprobs, ref_logprobs) ** 2


def kl_k3(
    logprobs: Float[ArrayLike, "B T"],
    ref_logprobs: Float[ArrayLike, "B T"],
    *,
    max_log_ratio: ScalarLike = 20.0,
    max_value: ScalarLike = 10.0,
) -> Float[Array, "B T"]:
    """exp(-d) + d - 1 with d = logprobs - ref_logprobs: unbiased, never negative, the KL term of GRPO.

    d is first limited to ±max_log_ratio and the result to max_value; the gradient is 0 where a limit holds. The
    defaults are verl's; TRL has no limits, which is inf for both.

    Source: Schulman 2020, "Approximating KL divergence"; Shao et al. 2024, arXiv 2402.03300, eq. 4.
    """
    x = jnp.clip(-kl_k1(logprobs, ref_logprobs), jnp.negative(max_log_ratio), max_log_ratio)
    # expm1 keeps the digits of a small d, where exp(x) - 1 - x would cancel to noise.
    return jnp.minimum(jnp.expm1(x) - x, max_value)


def _clips(
    ratio: Float[Array, "B T"], advantages: Float[Array, "B T"], low: Float[Array, "..."], high: Float[Array, "..."]
) -> Bool[Array, "B T"]:
    """Where -clip(r)·A > -r·A strictly: only moving on in the direction of the advantage is clipped."""
    return ((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - low))


def _surrogate(
    ratio: Float[Array, "B T"], advantages: Float[Array, "B T"], low: Float[Array, "..."], high: Float[Array, "..."]
) -> Float[Array, "B T"]:
    """max(-r·A, -clip(r)·A), written as a choice so that a tie keeps the whole gradient."""
    clipped = jnp.clip(ratio, 1 - low, 1 + high)
    return -advantages * jnp.where(_clips(ratio, advantages, low, high), clipped, ratio)


def _sequence_log_ratio(
    logprobs: Float[Array, "B T"], old_logprobs: Float[Array, "B T"], mask: Bool[ArrayLike, "B T"]
) -> tuple[Float[Array, "B 1"], Float[Array, "B T"], Float[Array, "B 1"]]:
    """sg[mean over the row's tokens of δ], logprobs - sg[logprobs] (0 with gradient 1), and the row's length n."""
    logprobs, old_logprobs = jnp.where(mask, logprobs, 0), jnp.where(mask, old_logprobs, 0)
    constant = jax.lax.stop_gradient(logprobs)
    length = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1).astype(logprobs.dtype)
    return jnp.sum(constant - old_logprobs, axis=1, keepdims=True) / length, logprobs - constant, length


def _promote(*arrays: ArrayLike) -> list[Array]:
    """Bring all to one dtype, at least float32: bfloat16 log-probs have 8 bits, too few for ratios near 1."""
    dtype = jnp.result_type(*arrays, jnp.float32)
    return [jnp.asarray(x, dtype) for x in arrays]

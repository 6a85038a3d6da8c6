"""Train/rollout mismatch: the sampler's log-probs of a token differ from the trainer's for the same parameters.

`behaviour_logprobs` come from the sampler, `old_logprobs` from the trainer under the same parameters. Results are
constants of the loss: no gradient passes. Make them once per rollout batch. Entries outside the mask are ignored,
whatever they hold.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, ScalarLike

# exp of this still is a finite float32 that sums safely; a ratio beyond it is garbage anyway
_MAX_LOG_RATIO = 20.0


def truncated_ratio(
    old_logprobs: Float[ArrayLike, "B T"],
    behaviour_logprobs: Float[ArrayLike, "B T"],
    mask: Bool[ArrayLike, "B T"],
    *,
    level: str,
    cap: ScalarLike,
    normalize: bool = False,
) -> Float[Array, "B T"]:
    """Truncated importance weights that correct the per-token loss for rows sampled by another implementation.

    w_t = m_t · min(exp(λ_t), cap)            level "token"
    w_t = m_t · min(exp(Σ_u m_u·λ_u), cap)    level "sequence"

    λ = old_logprobs - behaviour_logprobs; exponents are limited to ±20. `normalize` divides by the mean weight: over
    tokens at level "token", over non-empty rows at level "sequence". cap=inf leaves the ratio untruncated.

    Raises: ValueError for another level.
    Source: Ionides 2008, "Truncated importance sampling"; for rollouts Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training".
    """
    log_ratio = _log_ratio(old_logprobs, behaviour_logprobs, mask)
    if level == "sequence":
        log_ratio = jnp.sum(log_ratio, axis=1, keepdims=True)
        counted = jnp.any(mask, axis=1, keepdims=True)
    elif level == "token":
        counted = jnp.asarray(mask)
    else:
        raise ValueError(f'level={level!r} is unknown; use "token" or "sequence"')
    ratio = jnp.minimum(jnp.exp(jnp.clip(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)), cap)
    if normalize:
        mean = jnp.sum(jnp.where(counted, ratio, 0)) / jnp.maximum(jnp.sum(counted), 1)
        ratio = ratio / jnp.where(mean > 0, mean, 1)
    return jnp.where(mask, ratio, 0)


def rejection_mask(
    old_logprobs: Float[ArrayLike, "B T"],
    behaviour_logprobs: Float[ArrayLike, "B T"],
    mask: Bool[ArrayLike, "B T"],
    *,
    estimator: str,
    level: str,
    low: ScalarLike,
    high: ScalarLike,
) -> Bool[Array, "B T"]:
    """The mask without what trainer and sampler disagree on: kept where low <= statistic <= high (-inf, inf: all).

    estimator  per-token estimate of KL(behaviour ‖ old), in nats, λ = old_logprobs - behaviour_logprobs within ±20
      "k1"     -λ, signed; a ratio range [a, b] of behaviour over old is low=log a, high=log b
      "k2"     ½·λ²
      "k3"     exp(λ) - 1 - λ
    level      what is compared and dropped: "token" each token by itself; "mean", "sum", "max" a whole row, by that
               statistic of its tokens

    Take the weights of the loss from the mask returned if the dropped tokens shall not count in the denominator.

    Raises: ValueError for another estimator or level, and for the maximum of k1, which would miss its negative side.
    Source: Schulman 2020, "Approximating KL divergence" (the estimators).
    """
    log_ratio = jnp.clip(_log_ratio(old_logprobs, behaviour_logprobs, mask), -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    # each is 0 at λ = 0, which is what entries outside the mask were set to
    estimators = {
        "k1": lambda: -log_ratio,
        "k2": lambda: 0.5 * log_ratio**2,
        "k3": lambda: jnp.expm1(log_ratio) - log_ratio,
    }
    length = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
    levels = {
        "token": lambda x: x,
        "mean": lambda x: jnp.sum(x, axis=1, keepdims=True) / length,
        "sum": lambda x: jnp.sum(x, axis=1, keepdims=True),
        "max": lambda x: jnp.max(x, axis=1, keepdims=True),
    }
    if estimator not in estimators or level not in levels:
        raise ValueError(f"estimator={estimator!r}, level={level!r}: use one of {[*estimators]} and one of {[*levels]}")
    if (estimator, level) == ("k1", "max"):
        raise ValueError('the maximum of the signed "k1" misses tokens far below 0; use level="token", or "k2" or "k3"')
    statistic = levels[level](estimators[estimator]())
    return jnp.asarray(mask) & (statistic >= low) & (statistic <= high)


def mismatch(
    old_logprobs: Float[ArrayLike, "B T"], behaviour_logprobs: Float[ArrayLike, "B T"], mask: Bool[ArrayLike, "B T"]
) -> dict[str, Float[Array, ""]]:
    """How far trainer and sampler disagree on the tokens in the mask, in nats; all 0 for an empty mask.

    What was sampled with filters or a temperature of the step's own differs by these, too.

    mismatch_max   max |λ|                     λ = old_logprobs - behaviour_logprobs
    mismatch_mean  mean |λ|
    mismatch_k3    mean of exp(λ) - 1 - λ, an estimate of KL(behaviour ‖ old) that is never negative; λ within ±20

    Source: Schulman 2020, "Approximating KL divergence" (k3).
    """
    log_ratio = _log_ratio(old_logprobs, behaviour_logprobs, mask)
    count = jnp.maximum(jnp.sum(mask), 1)
    bounded = jnp.clip(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return {
        "mismatch_max": jnp.max(jnp.abs(log_ratio)),
        "mismatch_mean": jnp.sum(jnp.abs(log_ratio)) / count,
        "mismatch_k3": jnp.sum(jnp.expm1(bounded) - bounded) / count,
    }


def _log_ratio(
    old_logprobs: Float[ArrayLike, "B T"], behaviour_logprobs: Float[ArrayLike, "B T"], mask: Bool[ArrayLike, "B T"]
) -> Float[Array, "B T"]:
    """λ = old - behaviour inside the mask and 0 outside, in at least float32, without gradient."""
    dtype = jnp.result_type(old_logprobs, behaviour_logprobs, jnp.float32)
    old, behaviour = (jnp.where(mask, x, 0).astype(dtype) for x in (old_logprobs, behaviour_logprobs))
    return jax.lax.stop_gradient(old - behaviour)

"""Aggregation weights: loss = sum(weights * per_token).

Make them once for all rows of an optimizer step, then split them with the rows: the loss and its gradient no longer
depend on how the rows are split over micro-batches or devices. A row without completion tokens (a failed reward) is
empty; weights are 0 outside the mask, and 0 everywhere if the mask is empty.

Written with c_i = Σ_t m_{i,t}, the length of row i in tokens.
"""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float


def token_mean(mask: Bool[ArrayLike, "B T"]) -> Float[Array, "B T"]:
    """Mean over all tokens, so that long completions count more: m / Σ_i c_i.

    Source: Yu et al. 2025 (DAPO), arXiv 2503.14476, eq. 8.
    """
    return jnp.asarray(mask, float) / jnp.maximum(jnp.sum(mask), 1)


def sequence_mean(mask: Bool[ArrayLike, "B T"]) -> Float[Array, "B T"]:
    """Mean over the tokens of each row, then over the non-empty rows: m / (c_i · #{i: c_i > 0}).

    TRL's mean runs over all rows, empty ones counting as 0: multiply by the share of non-empty rows.

    Source: Shao et al. 2024 (GRPO), arXiv 2402.03300, eq. 3.
    """
    length = jnp.sum(mask, axis=1, keepdims=True)
    return jnp.asarray(mask, float) / jnp.maximum(length, 1) / jnp.maximum(jnp.sum(length > 0), 1)


def sequence_sum(mask: Bool[ArrayLike, "B T"]) -> Float[Array, "B T"]:
    """Sum over the tokens of each row, then mean over the non-empty rows: m / #{i: c_i > 0}."""
    return jnp.asarray(mask, float) / jnp.maximum(jnp.sum(jnp.any(mask, axis=1)), 1)


def constant_length(mask: Bool[ArrayLike, "B T"], length: int) -> Float[Array, "B T"]:
    """Sum over the tokens of each row divided by a constant length in tokens, then mean over all rows: m / (B·length).

    No weight depends on how long a completion is. B counts empty rows too, so that a failed row does not make the
    others count more. This is TRL's normalisation; verl ("seq-mean-token-sum-norm") divides by the length alone, which
    makes its loss B times as large and dependent on the number of rows.

    Raises: ValueError if length < 1.
    Source: Liu et al. 2025 (Dr.GRPO), arXiv 2503.20783.
    """
    if length < 1:
        raise ValueError(f"length={length} must be at least 1 token; use the completion budget")
    mask = jnp.asarray(mask, float)
    return mask / (mask.shape[0] * length)

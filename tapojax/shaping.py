"""Reward shaping: terms that are added to a row's reward before advantages are made."""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, ScalarLike


def overlong_penalty(
    lengths: Int[ArrayLike, "B"], *, max_length: int, buffer: int, factor: ScalarLike = 1.0
) -> Float[Array, "B"]:
    """DAPO's soft overlong punishment: 0 up to a soft limit, then linear down to -factor at max_length and beyond.

    penalty = factor · clip((max_length - buffer - length) / buffer, -1, 0)

    lengths, max_length and buffer are in completion tokens, never characters; max_length - buffer is the soft limit.
    Differs from verl beyond max_length: there the line goes on falling without bound. The bound is the paper's and
    TRL's; up to max_length all agree.

    Raises: ValueError unless 1 <= buffer <= max_length.
    Source: Yu et al. 2025, arXiv 2503.14476, eq. 13.
    """
    if not 1 <= buffer <= max_length:
        raise ValueError(f"buffer={buffer} must be between 1 and max_length={max_length} tokens")
    remaining = (max_length - buffer - jnp.asarray(lengths)).astype(float)
    return jnp.clip(remaining / buffer, -1, 0) * factor

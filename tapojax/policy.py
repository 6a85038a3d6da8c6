"""`score(params, tokens, mask) -> TokenStats`: the only bridge from parameters to the mathematics."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from tapojax import logprobs
from tapojax.models import decoder
from tapojax.models.config import DecoderConfig
from tapojax.types import TokenStats

Score = Callable[[Any, Int[Array, "B T"], Bool[Array, "B T"]], TokenStats]


def make_score(
    config: DecoderConfig, *, max_scored: int, temperature: float = 1.0, max_logit_bytes: int = 2**27
) -> Score:
    """Log-prob and entropy of the masked tokens of each row, zeros elsewhere.

    The vocabulary head meets only the positions that are asked for: each row's masked tokens are gathered into
    max_scored columns first. A row with more masked tokens than that would lose the rest, so callers pass the
    completion budget.

    Args:
      temperature: divides the logits, as it did when sampling.
      max_logit_bytes: see `logprobs.token_logprobs_and_entropy`.
    """

    def score(params, tokens, mask):
        rows, length = tokens.shape
        columns = min(max_scored, length)
        hidden = decoder.hidden_states(config, params, tokens)
        at = jax.vmap(lambda m: jnp.nonzero(m, size=columns, fill_value=length)[0])(mask)
        before = jnp.clip(at - 1, 0, length - 1)  # the position that predicts the token
        hidden = jnp.take_along_axis(hidden, before[..., None], axis=1)
        targets = jnp.take_along_axis(tokens, jnp.minimum(at, length - 1), axis=1)
        stats = logprobs.token_logprobs_and_entropy(
            hidden, decoder.head(params), targets, temperature=temperature, max_bytes=max_logit_bytes
        )

        def scatter(values):
            return jnp.zeros((rows, length), jnp.float32).at[jnp.arange(rows)[:, None], at].set(values, mode="drop")

        return TokenStats(*(scatter(values) for values in stats))

    return score


def split_rows(tree: Any, parts: int) -> Any:
    """[B, ...] -> [parts, B / parts, ...]; part m takes the rows b with b % parts == m, so a split over devices stays.

    Raises:
      ValueError: the rows do not divide.
    """

    def split(x):
        if x.shape[0] % parts:
            raise ValueError(f"{x.shape[0]} rows do not divide into {parts} micro-batches")
        return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, tree)


def join_rows(tree: Any) -> Any:
    """The inverse of `split_rows`."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), tree)


def in_microbatches(score: Score, parts: int) -> Score:
    """The same function, a part of the rows at a time: activations of one part live at once."""
    if parts == 1:
        return score
    return lambda params, tokens, mask: join_rows(
        jax.lax.map(lambda part: score(params, *part), split_rows((tokens, mask), parts))
    )

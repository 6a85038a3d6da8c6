"""What our own model says of the rows that vLLM sampled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tapojax.models import decoder

# Both sides compute in float32, in another order of summation: 2.5e-5 is the largest difference measured, on rows of
# 1,500 tokens, and 2^-24 of logits up to 15 through 3 layers says the same. Another model, a stale cache or another
# temperature differ by 0.1 and more.
TOLERANCE = 1e-4


def logits(model, row) -> np.ndarray:
    """[T - 1, V], the logits that row[1:] were drawn from."""
    padded = np.zeros(-(-len(row) // 256) * 256, np.int32)  # few shapes to compile; a causal model ignores the rest
    padded[: len(row)] = row
    return np.asarray(_logits(model.config, model.params, padded[None]))[0, : len(row) - 1]


@functools.partial(jax.jit, static_argnames="config")
def _logits(config, params, tokens):
    return jnp.matmul(decoder.hidden_states(config, params, tokens), decoder.head(params))


def of_tokens(scaled, tokens) -> np.ndarray:
    """Log-probs of tokens under softmax(scaled)."""
    return np.take_along_axis(np.asarray(jax.nn.log_softmax(scaled)), np.asarray(tokens)[:, None], axis=1)[:, 0]


def completion_logits(model, prompt, sample) -> np.ndarray:
    return logits(model, [*prompt, *sample["tokens"]])[len(prompt) - 1 :]


def logprobs(model, prompt, sample) -> np.ndarray:
    """At temperature 1, unfiltered."""
    return of_tokens(completion_logits(model, prompt, sample), sample["tokens"])

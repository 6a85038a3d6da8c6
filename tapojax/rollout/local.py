"""The embedded sampler: prefill once per prompt, decode G completions of each on the device, stop when all are done."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import repeat
from jaxtyping import Array, Bool, Float, Int

from tapojax import sampling as sampling_math
from tapojax import sharding
from tapojax.models import decoder
from tapojax.models.config import DecoderConfig
from tapojax.types import Engine, Prompts, Rollout, Sampling


class _Loop(NamedTuple):
    """State of decoding; `tokens[:, step]` is the newest token of each row and not yet in the caches."""

    step: Int[Array, ""]
    tokens: Int[Array, "B R"]
    mask: Bool[Array, "B R"]
    behaviour_logprobs: Float[Array, "B R"]
    base_logprobs: Float[Array, "B R"]
    done: Bool[Array, "B"]
    caches: Any


def local_engine(config: DecoderConfig, *, max_prompt_tokens: int, dtype: str | None = None) -> Engine:
    """Samples with the given model on the local devices, in `dtype` (the model's own when None).

    Prompts are padded to max_prompt_tokens, so a batch of P prompts has one compiled shape.
    """

    @jax.jit
    def load(params):
        cast = jax.tree.map(lambda leaf: leaf.astype(dtype or config.dtype), params)
        return decoder.unstack_layers(config, cast)

    def generate(weights, prompts: Prompts, key, *, group_size: int, sampling: Sampling, temperature=None, carry=()):
        tokens, lengths = pad_prompts(prompts, max_prompt_tokens, sampling.pad_token_id)
        rollout = sample(
            config,
            weights,
            tokens,
            lengths,
            key,
            carry,
            group_size=group_size,
            sampling=sampling,
            temperature=temperature,
        )
        return jax.tree.map(np.asarray, rollout)

    return Engine(load=lambda params, version: load(params), generate=generate)


def pad_prompts(prompts: Prompts, max_prompt_tokens: int, pad_token_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded tokens [P, S] and lengths [P]; raises like check_prompts."""
    lengths = check_prompts(prompts, max_prompt_tokens)
    tokens = np.full((len(lengths), max_prompt_tokens), pad_token_id, np.int32)
    for row, ids in zip(tokens, prompts.tokens, strict=True):
        row[: len(ids)] = ids
    return tokens, lengths


def check_prompts(prompts: Prompts, max_prompt_tokens: int) -> np.ndarray:
    """The prompts' lengths [P].

    Raises:
      ValueError: a prompt is empty or longer than the budget.
    """
    lengths = np.array([len(ids) for ids in prompts.tokens], np.int32)
    for i in np.flatnonzero((lengths == 0) | (lengths > max_prompt_tokens)).tolist():
        raise ValueError(
            f"prompt {prompts.examples[i]['id']!r} has {lengths[i]} tokens, allowed are 1 to {max_prompt_tokens}: "
            "raise sampling.max_prompt_tokens (a hint counts too), or drop such rows with task.overlong_prompts='drop'"
        )
    return lengths


@functools.partial(jax.jit, static_argnames=("config", "group_size", "sampling", "temperature"))
def sample(
    config: DecoderConfig,
    weights,
    tokens: Int[Array, "P S"],
    lengths: Int[Array, "P"],
    key: Array,
    carry: Any,
    *,
    group_size: int,
    sampling: Sampling,
    temperature=None,
) -> Rollout:
    """G completions of each of P right-padded prompts as rows of length S + R; consumes key.

    `temperature(logits, carry) -> [B]` overrides sampling.temperature at each step (HAPO). Weights come from
    `local_engine(...).load`.
    """
    tokens = sharding.constrain(jnp.asarray(tokens), "batch", None)
    num_rows, budget = tokens.shape[0] * group_size, sampling.max_tokens
    hidden, caches = decoder.prefill(config, weights, tokens, group_size=group_size, max_tokens=max(budget - 1, 1))
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    draw = functools.partial(_draw, weights=weights, key=key, carry=carry, sampling=sampling, temperature=temperature)

    def record(state: _Loop, step, hidden) -> _Loop:
        token, behaviour, base = draw(hidden, step)
        live = ~state.done
        return state._replace(
            step=step,
            tokens=state.tokens.at[:, step].set(jnp.where(live, token, sampling.pad_token_id)),
            mask=state.mask.at[:, step].set(live),
            behaviour_logprobs=state.behaviour_logprobs.at[:, step].set(jnp.where(live, behaviour, 0.0)),
            base_logprobs=state.base_logprobs.at[:, step].set(jnp.where(live, base, 0.0)),
            done=state.done | jnp.isin(token, jnp.array(sampling.stop_token_ids, jnp.int32)),
        )

    def advance(state: _Loop) -> _Loop:
        newest = jax.lax.dynamic_index_in_dim(state.tokens, state.step, axis=1, keepdims=False)
        newest = newest.reshape(-1, group_size)
        hidden, caches = decoder.decode_step(config, weights, state.caches, newest, lengths, state.step)
        return record(state._replace(caches=caches), state.step + 1, hidden.reshape(num_rows, -1))

    zeros = jnp.zeros((num_rows, budget), jnp.float32)
    state = _Loop(
        jnp.int32(0),
        jnp.full((num_rows, budget), sampling.pad_token_id, jnp.int32),
        zeros.astype(bool),
        zeros,
        zeros,
        jnp.zeros(num_rows, bool),
        caches,
    )
    state = record(state, jnp.int32(0), jnp.repeat(last, group_size, axis=0))
    state = jax.lax.while_loop(lambda s: (s.step < budget - 1) & ~jnp.all(s.done), advance, state)
    return _rows(tokens, lengths, state, group_size, sampling.pad_token_id)


def _draw(hidden: Float[Array, "B D"], step, *, weights, key, carry, sampling: Sampling, temperature):
    """Token, its log-prob under the distribution sampled from, and its log-prob at temperature 1; all [B]."""
    logits = jnp.matmul(hidden, decoder.head(weights), preferred_element_type=jnp.float32)
    if sampling.temperature == 0:
        token = jnp.argmax(logits, axis=-1)
        base = _logprob(logits, token)
        return token, base, base
    scaled = logits / (sampling.temperature if temperature is None else temperature(logits, carry)[:, None])
    filtered = sampling_math.top_p(sampling_math.top_k(scaled, sampling.top_k), sampling.top_p)
    token = sampling_math.categorical(jax.random.fold_in(key, step), filtered)
    base = _logprob(logits, token)
    plain = temperature is None and (sampling.temperature, sampling.top_k, sampling.top_p) == (1.0, 0, 1.0)
    return token, base if plain else _logprob(filtered, token), base


def _logprob(logits: Float[Array, "B V"], token: Int[Array, "B"]) -> Float[Array, "B"]:
    return jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)


def _rows(prompts, lengths, state: _Loop, group_size: int, pad_token_id: int) -> Rollout:
    """Closes the gap between each prompt and its completion: prompt, completion, right padding."""
    prompts, lengths = (repeat(x, "p ... -> (p g) ...", g=group_size) for x in (prompts, lengths))
    positions = jnp.arange(prompts.shape[1] + state.tokens.shape[1])[None]
    index = positions - lengths[:, None]
    inside = (index >= 0) & (index < state.tokens.shape[1])
    index = jnp.clip(index, 0, state.tokens.shape[1] - 1)

    def place(x):
        return jnp.where(inside, jnp.take_along_axis(x, index, axis=1), jnp.zeros((), x.dtype))

    padded = jnp.pad(prompts, ((0, 0), (0, state.tokens.shape[1])), constant_values=pad_token_id)
    mask = place(state.mask)
    return Rollout(
        tokens=jnp.where(mask, place(state.tokens), jnp.where(positions < lengths[:, None], padded, pad_token_id)),
        mask=mask,
        behaviour_logprobs=place(state.behaviour_logprobs),
        base_logprobs=place(state.base_logprobs),
        prompt_lengths=lengths,
        truncated=~state.done,
        source=jnp.zeros(lengths.shape, jnp.int32),
    )

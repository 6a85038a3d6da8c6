"""The embedded sampler: prefill once per prompt, decode G completions of each on the device, stop when all are done."""

import functools
from collections.abc import Callable, Sequence
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

Finished = Callable[[int, Sequence[int]], None]  # (row, its tokens), see types.Engine


class Ended(NamedTuple):
    """A completion of n tokens that has just ended, on the host."""

    tokens: Int[np.ndarray, "n"]
    behaviour_logprobs: Float[np.ndarray, "n"]
    base_logprobs: Float[np.ndarray, "n"]
    stopped: bool  # by a stop token, not by the budget


class _Loop(NamedTuple):
    """State of decoding; `tokens[:, step]` is the newest token of each row and not yet in the caches."""

    step: Int[Array, ""]
    tokens: Int[Array, "B R"]
    mask: Bool[Array, "B R"]
    behaviour_logprobs: Float[Array, "B R"]
    base_logprobs: Float[Array, "B R"]
    done: Bool[Array, "B"]
    caches: Any


def local_engine(
    config: DecoderConfig, *, max_prompt_tokens: int, dtype: str | None = None, stream_tokens: int = 32
) -> Engine:
    """Samples with the given model on the local devices, in `dtype` (the model's own when None).

    Prompts are padded to max_prompt_tokens, so a batch of P prompts has one compiled shape. Whoever asks to be told of
    `finished` rows hears of them each stream_tokens tokens, from the thread that generates; the rows stay the same.

    Raises:
      ValueError: stream_tokens is below 1.
    """
    if stream_tokens < 1:
        raise ValueError(f"sampling.stream_tokens={stream_tokens}: rows are told of after 1 token or more")

    @jax.jit
    def load(params):
        cast = jax.tree.map(lambda leaf: leaf.astype(dtype or config.dtype), params)
        return decoder.unstack_layers(config, cast)

    def generate(
        weights,
        prompts: Prompts,
        key,
        *,
        group_size: int,
        sampling: Sampling,
        temperature=None,
        carry=(),
        finished: Finished | None = None,
    ):
        tokens, lengths = pad_prompts(prompts, max_prompt_tokens, sampling.pad_token_id)
        given = config, weights, tokens, lengths, key, carry
        how = dict(group_size=group_size, sampling=sampling, temperature=temperature)
        if finished is None:
            rollout = sample(*given, **how)
        else:
            rollout = stream(
                *given, lambda row, ended: finished(row, ended.tokens.tolist()), stream_tokens=stream_tokens, **how
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


HOW = ("config", "group_size", "sampling", "temperature")  # static


@functools.partial(jax.jit, static_argnames=HOW)
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
    how = dict(group_size=group_size, sampling=sampling, temperature=temperature)
    state = _begin(config, weights, tokens, lengths, key, carry, **how)
    state = _decode(config, weights, lengths, key, carry, state, sampling.max_tokens - 1, **how)
    return _rows(tokens, lengths, state, group_size, sampling.pad_token_id)


def stream(
    config: DecoderConfig,
    weights,
    tokens,
    lengths,
    key,
    carry,
    told: Callable[[int, Ended], None],
    *,
    stream_tokens: int,
    sampling: Sampling,
    **how,
) -> Rollout:
    """`sample`, and `told(row, completion)` of each row once, soon after it ended; what it raises ends the sampling.

    Segments of stream_tokens steps are compiled, and while one runs, the rows that ended in the one before are told.
    The state stays on the devices; of each segment the new tokens, their log-probs and the flags come to the host.
    """
    how["sampling"], budget = sampling, sampling.max_tokens
    count = min(stream_tokens, budget)
    state = _begin_segments(config, weights, tokens, lengths, key, carry, **how)
    leaves = jax.tree.leaves(state)
    layout = tuple(leaf.sharding for leaf in leaves) if any(len(leaf.devices()) > 1 for leaf in leaves) else None
    said = [np.zeros(x.shape, x.dtype) for x in (state.tokens, state.behaviour_logprobs, state.base_logprobs)]
    known = np.zeros(state.done.shape, bool)

    def tell(until: int, news) -> bool:
        done, ends, *newest = (np.asarray(x) for x in news)
        for whole, part in zip(said, newest, strict=True):
            whole[:, until + 1 - count : until + 1] = part
        over = done | (until == budget - 1)
        for row in np.flatnonzero(over & ~known).tolist():
            ids, behaviour, base = (whole[row, : ends[row]] for whole in said)
            told(row, Ended(ids, behaviour, base, bool(done[row])))
        known[over] = True
        return bool(over.all())

    waiting: tuple = ()
    for until in [*range(count - 1, budget - 1, count), budget - 1]:
        state, news = _segment(
            config, weights, lengths, key, carry, state, np.int32(until), count=count, layout=layout, **how
        )
        if waiting and tell(*waiting):
            break
        waiting = until, news
    else:
        tell(*waiting)
    return _finish_segments(tokens, lengths, state, group_size=how["group_size"], pad_token_id=sampling.pad_token_id)


def _begin(config, weights, tokens, lengths, key, carry, *, group_size: int, sampling: Sampling, temperature) -> _Loop:
    """Prefill, and the first token of each row."""
    tokens = sharding.constrain(jnp.asarray(tokens), "batch", None)
    num_rows, budget = tokens.shape[0] * group_size, sampling.max_tokens
    hidden, caches = decoder.prefill(config, weights, tokens, group_size=group_size, max_tokens=max(budget - 1, 1))
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
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
    draw = functools.partial(_draw, weights=weights, key=key, carry=carry, sampling=sampling, temperature=temperature)
    return _record(state, jnp.int32(0), jnp.repeat(last, group_size, axis=0), draw, sampling)


def _decode(
    config, weights, lengths, key, carry, state: _Loop, until, *, group_size: int, sampling: Sampling, temperature
) -> _Loop:
    """Goes on to step `until`, or to the end of all rows if that comes first."""
    draw = functools.partial(_draw, weights=weights, key=key, carry=carry, sampling=sampling, temperature=temperature)

    def advance(state: _Loop) -> _Loop:
        newest = jax.lax.dynamic_index_in_dim(state.tokens, state.step, axis=1, keepdims=False)
        newest = newest.reshape(-1, group_size)
        hidden, caches = decoder.decode_step(config, weights, state.caches, newest, lengths, state.step)
        hidden = hidden.reshape(state.done.shape[0], -1)
        return _record(state._replace(caches=caches), state.step + 1, hidden, draw, sampling)

    return jax.lax.while_loop(lambda s: (s.step < until) & ~jnp.all(s.done), advance, state)


def _record(state: _Loop, step, hidden, draw, sampling: Sampling) -> _Loop:
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


_begin_segments = jax.jit(_begin, static_argnames=HOW)
_finish_segments = jax.jit(_rows, static_argnames=("group_size", "pad_token_id"))


@functools.partial(jax.jit, static_argnames=(*HOW, "count", "layout"), donate_argnames="state")
def _segment(config, weights, lengths, key, carry, state: _Loop, until, *, count: int, layout, **how):
    """The state at step `until` and what is new: rows that are done, their lengths, the last `count` columns.

    On several devices it comes in the layout that it was given in, so that all segments are one program.
    """
    state = _decode(config, weights, lengths, key, carry, state, until, **how)
    if layout is not None:
        leaves, tree = jax.tree.flatten(state)
        state = jax.tree.unflatten(tree, map(jax.lax.with_sharding_constraint, leaves, layout))
    whole = state.tokens, state.behaviour_logprobs, state.base_logprobs
    newest = [jax.lax.dynamic_slice_in_dim(x, until + 1 - count, count, axis=1) for x in whole]
    return state, (state.done, state.mask.sum(axis=1), *newest)

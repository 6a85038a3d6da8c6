"""One Linen decoder for Qwen2/2.5, Qwen3 and Llama 3.x.

Pure: `hidden_states(config, params, tokens)` maps tokens to the residual stream after the last norm, and
`prefill` / `decode_step` do the same with an explicit key-value cache. The vocabulary head is not applied here; see
`tapojax.logprobs`, which takes it in chunks. Layers are stacked on a leading axis of every leaf under "layers".

Sources: Touvron et al., arXiv 2302.13971 (Llama); Ainslie et al., arXiv 2305.13245 (GQA); Su et al., arXiv 2104.09864
(rotary embedding); Yang et al., arXiv 2412.15115 and 2505.09388 (Qwen2.5, Qwen3).
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from tapojax import sharding
from tapojax.models.config import DecoderConfig


def rotary_tables(
    config: DecoderConfig, positions: Int[Array, "*S"]
) -> tuple[Float[Array, "*S C"], Float[Array, "*S C"]]:
    """cos and sin of position * frequency, C = head_dim / 2, frequencies stretched as the checkpoint asks."""
    frequencies = config.rope_theta ** (-jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    if (scaling := config.rope_scaling) is not None:
        wavelengths = 2 * math.pi / frequencies
        turns = scaling.original_max_position / wavelengths
        keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        keep = jnp.clip(keep, 0.0, 1.0)
        frequencies = frequencies * (keep + (1 - keep) / scaling.factor)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "#B T C"], sin: Float[Array, "#B T C"]
) -> Float[Array, "B T N H"]:
    """Turns channel pairs (i, i + H/2), the layout of Hugging Face checkpoints."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def causal_attention(q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]):
    """Every token sees itself and what came before it in its row. Right padding needs no mask: nobody looks ahead."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True), None


def causal_attention_with_cache(q, k, v):
    """The same, and hands the keys and values out."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True), (k, v)


class Block(nn.Module):
    """Pre-norm attention and gated MLP. `attend` maps (q, k, v) to (mixed values, whatever it wants to hand out)."""

    config: DecoderConfig
    attend: Callable[..., Any]

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], cos: Float[Array, "#B T C"], sin: Float[Array, "#B T C"]):
        config = self.config
        norm = functools.partial(rms_norm, config)
        dense = functools.partial(
            nn.DenseGeneral,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            kernel_init=nn.initializers.normal(config.initializer_range),
        )
        heads, kv_heads = (config.num_heads, config.head_dim), (config.num_kv_heads, config.head_dim)
        batch, length, width = x.shape
        # Matrix products see one axis of tokens: with two, XLA on CPU fuses transposes into the backward pass's
        # element-wise code, and a gated MLP takes twice as long.
        x = x.reshape(-1, width)

        h = norm(name="attention_norm")(x)
        q = dense(heads, use_bias=config.qkv_bias, name="query")(h)
        k = dense(kv_heads, use_bias=config.qkv_bias, name="key")(h)
        v = dense(kv_heads, use_bias=config.qkv_bias, name="value")(h)
        if config.qk_norm:
            q, k = norm(name="query_norm")(q), norm(name="key_norm")(k)
        q, k, v = (y.reshape(batch, length, *y.shape[1:]) for y in (q, k, v))
        mixed, handed_out = self.attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
        mixed = mixed.reshape(-1, *heads)
        x = x + dense(config.hidden_size, axis=(-2, -1), use_bias=config.output_bias, name="output")(mixed)

        h = norm(name="mlp_norm")(x)
        gate = dense(config.intermediate_size, use_bias=config.mlp_bias, name="gate")(h)
        up = dense(config.intermediate_size, use_bias=config.mlp_bias, name="up")(h)
        x = x + dense(config.hidden_size, use_bias=config.mlp_bias, name="down")(nn.silu(gate) * up)
        return sharding.constrain(x.reshape(batch, length, width), "batch", None, None), handed_out


class Decoder(nn.Module):
    """Embedding, a scan over blocks, final norm. The head exists as a parameter here but is applied elsewhere."""

    config: DecoderConfig
    attend: Callable[..., Any] = causal_attention

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"]):
        config = self.config
        init = nn.initializers.normal(config.initializer_range)
        embedding = self.param("embedding", init, (config.vocab_size, config.hidden_size), config.param_dtype)
        if not config.tie_embeddings and config.score is None:
            self.param("head", init, (config.vocab_size, config.hidden_size), config.param_dtype)
        x = sharding.constrain(embedding[tokens].astype(config.dtype), "batch", None, None)
        cos, sin = rotary_tables(config, jnp.arange(tokens.shape[1])[None])
        blocks = nn.scan(
            rematerialised(Block, config),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=config.num_layers,
            unroll=config.num_layers if config.unroll else 1,
        )
        x, handed_out = blocks(config, self.attend, name="layers")(x, cos, sin)
        x = rms_norm(config, name="final_norm")(x)
        if config.score is not None and self.is_initializing():
            Score(config, name="score")(x)
        return x, handed_out


class Score(nn.Module):
    """The head of a reward model, applied like the vocabulary's: elsewhere."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T C"]:
        head: Any = self.config.score
        dense = functools.partial(
            nn.Dense,
            dtype=self.config.dtype,
            param_dtype=self.config.param_dtype,
            kernel_init=nn.initializers.normal(self.config.initializer_range),
        )
        if not head.hidden:
            return dense(head.labels, use_bias=head.bias, name="linear")(x)
        return dense(head.labels, name="output")(nn.relu(dense(head.hidden, name="hidden")(x)))


def rematerialised(block: type[nn.Module], config: DecoderConfig) -> type[nn.Module]:
    """Recompute a block's activations in the backward pass, but for those that the policy config.remat keeps."""
    if config.remat == "none":
        return block
    # A loop keeps the two passes apart by itself; unrolled, XLA would find the recomputation and merge it away.
    return nn.remat(block, policy=getattr(jax.checkpoint_policies, config.remat), prevent_cse=config.unroll)


def rms_norm(config: DecoderConfig, name: str | None = None) -> nn.RMSNorm:
    return nn.RMSNorm(epsilon=config.norm_eps, dtype=config.dtype, param_dtype=config.param_dtype, name=name)


def init(config: DecoderConfig, key: Array) -> Any:
    """Random parameters; consumes key."""
    return Decoder(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def head(params) -> Float[Array, "D V"]:
    """The matrix from the residual stream to logits: its own, or the embedding transposed."""
    return params.get("head", params["embedding"]).T


def hidden_states(config: DecoderConfig, params, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The residual stream after the last norm; position t has seen tokens[:, :t + 1]."""
    return Decoder(config).apply({"params": params}, tokens)[0]


def label_logits(config: DecoderConfig, params, tokens: Int[Array, "B T"]) -> Float[Array, "B T C"]:
    """What a reward model says at each token, in float32; position t has seen tokens[:, :t + 1]."""
    hidden = hidden_states(config, params, tokens)
    return _apply(Score(config), params["score"], hidden).astype(jnp.float32)


def _apply(module: nn.Module, params, *args) -> Any:
    """A module as a function of its own parameters."""
    return module.apply({"params": params}, *args)


class Cache(NamedTuple):
    """Keys and values of one layer: the prompt's, kept once per group, and the completion's, one per row."""

    prompt_k: Float[Array, "P K S H"]
    prompt_v: Float[Array, "P K S H"]
    k: Float[Array, "P G K R H"]
    v: Float[Array, "P G K R H"]


def unstack_layers(config: DecoderConfig, params):
    """One params tree per layer. Decoding wants them apart: a slice of a stacked leaf is a copy at every step."""
    layers = [jax.tree.map(operator.itemgetter(i), params["layers"]) for i in range(config.num_layers)]
    return {**params, "layers": layers}


def prefill(config: DecoderConfig, params, tokens: Int[Array, "P S"], *, group_size: int, max_tokens: int):
    """Hidden states of P right-padded prompts and, per layer, a cache with room for G completions of each."""
    x, caches = params["embedding"][tokens].astype(config.dtype), []
    cos, sin = rotary_tables(config, jnp.arange(tokens.shape[1])[None])
    room = (tokens.shape[0], group_size, config.num_kv_heads, max_tokens, config.head_dim)
    empty = jnp.zeros(room, config.dtype)
    for layer in params["layers"]:
        x, (k, v) = _apply(Block(config, causal_attention_with_cache), layer, x, cos, sin)
        k, v = (rearrange(y, "p s k h -> p k s h") for y in (k, v))
        caches.append(Cache(k, v, empty, empty))
    return _apply(rms_norm(config), params["final_norm"], x), caches


def decode_step(
    config: DecoderConfig, params, caches: list[Cache], tokens: Int[Array, "P G"], lengths: Int[Array, "P"], step
):
    """Hidden states [P, G, D] of the step-th completion token of every row, and the caches with its keys and values.

    Row (p, g) stands at position lengths[p] + step. Queries of a group meet the prompt's keys in one product.
    """
    num_prompts, group_size = tokens.shape
    x = params["embedding"][tokens.reshape(-1, 1)].astype(config.dtype)
    cos, sin = rotary_tables(config, jnp.repeat(lengths + step, group_size)[:, None])
    seen = jnp.concatenate(
        [
            jnp.arange(caches[0].prompt_k.shape[2])[None] < lengths[:, None],
            jnp.broadcast_to(jnp.arange(caches[0].k.shape[3])[None] <= step, (num_prompts, caches[0].k.shape[3])),
        ],
        axis=1,
    )
    new_caches = []
    for layer, cache in zip(params["layers"], caches, strict=True):
        attend = functools.partial(_attend_with_cache, cache=cache, seen=seen, step=step)
        x, new_cache = _apply(Block(config, attend), layer, x, cos, sin)
        new_caches.append(new_cache)
    x = _apply(rms_norm(config), params["final_norm"], x)
    return x.reshape(num_prompts, group_size, -1), new_caches


def _attend_with_cache(q, k, v, *, cache: Cache, seen, step):
    num_prompts, group_size, _, budget, _ = cache.k.shape
    k, v = (rearrange(y, "(p g) 1 k h -> p g k 1 h", g=group_size) for y in (k, v))
    k = jax.lax.dynamic_update_slice_in_dim(cache.k, k, step, axis=3)
    v = jax.lax.dynamic_update_slice_in_dim(cache.v, v, step, axis=3)
    q = rearrange(q, "(p g) 1 (k r) h -> p g k r h", g=group_size, k=k.shape[2])
    scores = jnp.concatenate(
        [
            jnp.einsum("pgkrh,pksh->pgkrs", q, cache.prompt_k, preferred_element_type=jnp.float32),
            jnp.einsum("pgkrh,pgksh->pgkrs", q, k, preferred_element_type=jnp.float32),
        ],
        axis=-1,
    )
    scores = jnp.where(seen[:, None, None, None], scores * q.shape[-1] ** -0.5, -jnp.inf)
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    mixed = jnp.einsum("pgkrs,pksh->pgkrh", probs[..., :-budget], cache.prompt_v)
    mixed = mixed + jnp.einsum("pgkrs,pgksh->pgkrh", probs[..., -budget:], v)
    return rearrange(mixed, "p g k r h -> (p g) 1 (k r) h"), cache._replace(k=k, v=v)

"""Hugging Face checkpoints, both ways and without torch: safetensors and tokenizer files.

`TABLE` is the only place where the two namings meet. It is read left to right when loading and right to left when
saving, so both directions are exact. A torch Linear stores [out, in]; our kernels are [in, out], with the heads apart.
"""

import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import traverse_util
from jaxtyping import Array, Shaped

from tapojax.models import config_json, decoder, safetensors_folder
from tapojax.models.config import DecoderConfig
from tapojax.models.safetensors_folder import PathLike

# Our path -> their name, and the move from their axes to ours.
# v vocabulary, d width, f MLP width, n heads, k key-value heads, h head dimension, c labels of a score head, s its
# hidden width; the layer axis is not written.
TABLE = {
    "embedding": ("model.embed_tokens.weight", "v d -> v d"),
    "head": ("lm_head.weight", "v d -> v d"),
    "final_norm/scale": ("model.norm.weight", "d -> d"),
    "layers/attention_norm/scale": ("model.layers.{layer}.input_layernorm.weight", "d -> d"),
    "layers/mlp_norm/scale": ("model.layers.{layer}.post_attention_layernorm.weight", "d -> d"),
    "layers/query_norm/scale": ("model.layers.{layer}.self_attn.q_norm.weight", "h -> h"),
    "layers/key_norm/scale": ("model.layers.{layer}.self_attn.k_norm.weight", "h -> h"),
    "layers/query/kernel": ("model.layers.{layer}.self_attn.q_proj.weight", "(n h) d -> d n h"),
    "layers/query/bias": ("model.layers.{layer}.self_attn.q_proj.bias", "(n h) -> n h"),
    "layers/key/kernel": ("model.layers.{layer}.self_attn.k_proj.weight", "(k h) d -> d k h"),
    "layers/key/bias": ("model.layers.{layer}.self_attn.k_proj.bias", "(k h) -> k h"),
    "layers/value/kernel": ("model.layers.{layer}.self_attn.v_proj.weight", "(k h) d -> d k h"),
    "layers/value/bias": ("model.layers.{layer}.self_attn.v_proj.bias", "(k h) -> k h"),
    "layers/output/kernel": ("model.layers.{layer}.self_attn.o_proj.weight", "d (n h) -> n h d"),
    "layers/output/bias": ("model.layers.{layer}.self_attn.o_proj.bias", "d -> d"),
    "layers/gate/kernel": ("model.layers.{layer}.mlp.gate_proj.weight", "f d -> d f"),
    "layers/gate/bias": ("model.layers.{layer}.mlp.gate_proj.bias", "f -> f"),
    "layers/up/kernel": ("model.layers.{layer}.mlp.up_proj.weight", "f d -> d f"),
    "layers/up/bias": ("model.layers.{layer}.mlp.up_proj.bias", "f -> f"),
    "layers/down/kernel": ("model.layers.{layer}.mlp.down_proj.weight", "d f -> f d"),
    "layers/down/bias": ("model.layers.{layer}.mlp.down_proj.bias", "d -> d"),
    "score/linear/kernel": ("score.weight", "c d -> d c"),
    "score/linear/bias": ("score.bias", "c -> c"),
    "score/hidden/kernel": ("score.0.weight", "s d -> d s"),
    "score/hidden/bias": ("score.0.bias", "s -> s"),
    "score/output/kernel": ("score.2.weight", "c s -> s c"),
    "score/output/bias": ("score.2.bias", "c -> c"),
}

FLOATS = ("F64", "F32", "F16", "BF16")
# What goes along with an export. vLLM takes its default sampling and stop tokens from generation_config.json.
BESIDES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*",
    "generation_config.json",
)  # fmt: skip


class Tensor(NamedTuple):
    """One tensor of a checkpoint: its place in our tree, the move from their axes to ours, its shape in the file."""

    path: str
    layer: int | None
    pattern: str
    shape: tuple[int, ...]


def manifest(config: DecoderConfig) -> dict[str, Tensor]:
    """Hugging Face name -> Tensor, for every tensor of a checkpoint of this shape."""
    sizes = _axis_sizes(config)
    tensors = {}
    for path in _abstract(config):
        name, pattern = TABLE[path]
        groups = re.findall(r"\([^)]*\)|\w+", pattern.split(" -> ")[0])
        shape = tuple(math.prod(sizes[axis] for axis in re.findall(r"\w+", group)) for group in groups)
        for layer in range(config.num_layers) if path.startswith("layers/") else (None,):
            tensors[name.format(layer=layer)] = Tensor(path, layer, pattern, shape)
    return tensors


def _abstract(config: DecoderConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Our leaves by path. The decoder itself is asked, so there is no second list of what a config implies."""
    shapes = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))
    return traverse_util.flatten_dict(shapes, sep="/")


def _axis_sizes(config: DecoderConfig) -> dict[str, int]:
    return {
        "v": config.vocab_size,
        "d": config.hidden_size,
        "f": config.intermediate_size,
        "n": config.num_heads,
        "k": config.num_kv_heads,
        "h": config.head_dim,
        **({} if config.score is None else {"c": config.score.labels, "s": config.score.hidden}),
    }


def _move(config: DecoderConfig, x: Any, pattern: str) -> Any:
    """x, of numpy (a view) or of jax, with its axes as the pattern says."""
    sizes = _axis_sizes(config)
    return rearrange(x, pattern, **{axis: sizes[axis] for axis in re.findall(r"\w", pattern)})


def load_params(path: PathLike, config: DecoderConfig, *, dtype: str | None = None) -> Any:
    """Params as numpy arrays of `dtype` (config.param_dtype if None) from model.safetensors or its shards.

    Every array is allocated once and filled tensor by tensor from memory-mapped files. The tensors must be exactly
    those of the config, but for three leftovers: the rotary inv_freq buffers of old transformers, which follow from
    rope_theta, an lm_head.weight beside tied embeddings that equals them, and one that a reward model kept of the
    language model it was made from (Qwen2.5-Math-PRM does), which no score depends on.

    Raises:
      ValueError: missing, unexpected or misshapen tensors, all of them named; a missing, truncated or doubtful file.
    """
    folder = safetensors_folder.existing(path)
    with safetensors_folder.opened(folder) as found:
        _check_tensors(folder, config, found)
        return _gathered(config, dtype, lambda name: found[name].get_tensor(name))


def from_named(
    tensors: Mapping[str, Shaped[np.ndarray, "..."]], config: DecoderConfig, *, dtype: str | None = None
) -> Any:
    """Params as load_params gives them, from arrays by Hugging Face name.

    Raises:
      ValueError: missing, unexpected or misshapen tensors, all of them named.
    """
    expected = {name: tensor.shape for name, tensor in manifest(config).items()}
    problems = _compare(expected, {name: x.shape for name, x in tensors.items()})
    safetensors_folder.refuse("these are not the tensors of this config", problems, "Pass those of the same model")
    return _gathered(config, dtype, tensors.__getitem__)


def _gathered(config: DecoderConfig, dtype: str | None, tensor_of: Callable[[str], np.ndarray]) -> Any:
    """Params, each leaf allocated once and filled tensor by tensor."""
    wanted = jnp.dtype(config.param_dtype if dtype is None else dtype)
    flat = {key: np.empty(leaf.shape, wanted) for key, leaf in _abstract(config).items()}
    for name, tensor in manifest(config).items():
        x = _move(config, tensor_of(name), tensor.pattern)
        flat[tensor.path][... if tensor.layer is None else tensor.layer] = x
    return traverse_util.unflatten_dict(flat, sep="/")


def _check_tensors(folder: Path, config: DecoderConfig, found: Mapping[str, Any]):
    expected = manifest(config)
    slices = {name: file.get_slice(name) for name, file in found.items()}
    second_head = "lm_head.weight" in found and "lm_head.weight" not in expected
    leftovers = [name for name in found if name.endswith("rotary_emb.inv_freq")] + ["lm_head.weight"] * second_head
    problems = _compare(
        {name: tensor.shape for name, tensor in expected.items()},
        {name: tuple(x.get_shape()) for name, x in slices.items() if name not in leftovers},
    )
    dtypes = {name: slices[name].get_dtype() for name in expected if name in slices}
    problems["not float"] = [f"{name} {dtype}" for name, dtype in dtypes.items() if dtype not in FLOATS]
    fix = "Pass the config that read_config gives for this folder; if it is that one, the folder is damaged"
    safetensors_folder.refuse(f"{folder} does not hold the tensors of this config", problems, fix)
    if second_head and config.score is None and not _equal(found, "lm_head.weight", "model.embed_tokens.weight"):
        raise ValueError(
            f"{folder}: tie_word_embeddings is true, yet lm_head.weight differs from model.embed_tokens.weight: set it "
            "to false in config.json to use both, or delete lm_head.weight"
        )


def _compare(expected: Mapping[str, tuple[int, ...]], got: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    both = [name for name in expected if name in got]
    return {
        "missing": [name for name in expected if name not in got],
        "unexpected": [name for name in got if name not in expected],
        "of another shape": [f"{n} {got[n]} (config: {expected[n]})" for n in both if got[n] != expected[n]],
    }


def _equal(found: Mapping[str, Any], one: str, other: str) -> bool:
    return np.array_equal(found[one].get_tensor(one), found[other].get_tensor(other))


def named_tensors(
    params: Any, config: DecoderConfig, *, dtype: str | None = None
) -> Iterator[tuple[str, Shaped[np.ndarray, "..."]]]:
    """(Hugging Face name, contiguous host array) one at a time, each as `dtype` (its own if None).

    Raises:
      ValueError: params are not those of the config.
    """
    for name, x in _scattered(params, config, np.asarray):
        yield name, np.ascontiguousarray(x, dtype=x.dtype if dtype is None else jnp.dtype(dtype))


def to_named(params: Any, config: DecoderConfig) -> dict[str, Shaped[Array, "..."]]:
    """Hugging Face name -> array in its layout; for use inside jit, where the params never leave the devices.

    Raises:
      ValueError: params are not those of the config.
    """
    return dict(_scattered(params, config, jnp.asarray))


def _scattered(params: Any, config: DecoderConfig, place: Callable[[Any], Any]) -> Iterator[tuple[str, Any]]:
    """The inverse of _gathered; `place` takes each tensor to where its axes are moved."""
    flat = traverse_util.flatten_dict(params, sep="/")
    shapes = {path: leaf.shape for path, leaf in _abstract(config).items()}
    problems = _compare(shapes, {path: leaf.shape for path, leaf in flat.items()})
    fix = "Pass the config that was trained, and merge adapters into the params first"
    safetensors_folder.refuse("the params are not those of this config", problems, fix)
    for name, tensor in manifest(config).items():
        leaf = flat[tensor.path]
        x = place(leaf if tensor.layer is None else leaf[tensor.layer])
        yield name, _move(config, x, " -> ".join(reversed(tensor.pattern.split(" -> "))))


def save_params(
    path: PathLike,
    params: Any,
    config: DecoderConfig,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    source: PathLike | None = None,
    **keys: Any,
):
    """Writes a folder that transformers and vLLM load. It appears whole or not at all, and never replaces another.

    Args:
      dtype: of the stored tensors; None keeps each as it is.
      source: a folder whose tokenizer files go along, with its config.json and generation_config.json if it has them.
      **keys: for config.json, see `config_json.to_json`.

    Raises:
      ValueError: the folder exists, params do not fit the config, or source has nothing to give.
      OSError: the disk is full or refuses; nothing is left behind.
    """
    stored = dtype or jnp.result_type(*(leaf.dtype for leaf in jax.tree.leaves(params))).name
    with safetensors_folder.appearing(path) as folder:
        config_json.write_config(config, folder, dtype=stored, source=source, **keys)
        if source is not None:
            _copy_besides(safetensors_folder.existing(source), folder)
        safetensors_folder.write(folder, named_tensors(params, config, dtype=dtype), max_shard_bytes=max_shard_bytes)


def _copy_besides(source: Path, folder: Path):
    files = {file for pattern in BESIDES for file in source.glob(pattern) if file.is_file()}
    if not files and not (source / "config.json").exists():
        raise ValueError(f"source={source} holds neither tokenizer files nor a config.json")
    for file in files:
        shutil.copyfile(file, folder / file.name)

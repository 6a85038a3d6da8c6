"""config.json of Hugging Face checkpoints <-> DecoderConfig: which families are read, and what is refused."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tapojax.models import safetensors_folder
from tapojax.models.config import OUTCOME_KINDS, PROCESS_KINDS, DecoderConfig, Llama3Rope, ScoreHead
from tapojax.models.safetensors_folder import PathLike

# Our field -> their key, its type, and the default of all three families (... where there is none)
KEYS = {
    "vocab_size": ("vocab_size", int, ...),
    "hidden_size": ("hidden_size", int, ...),
    "intermediate_size": ("intermediate_size", int, ...),
    "num_layers": ("num_hidden_layers", int, ...),
    "num_heads": ("num_attention_heads", int, ...),
    "norm_eps": ("rms_norm_eps", float, 1e-6),
    "tie_embeddings": ("tie_word_embeddings", bool, False),
    "initializer_range": ("initializer_range", float, 0.02),
}
FAMILIES = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}
EXECUTION = ("dtype", "param_dtype", "remat", "unroll", "initializer_range")  # fields that do not shape a checkpoint


def read_config(path: PathLike) -> DecoderConfig:
    """The shape of the checkpoint in a folder, from its config.json as transformers 4 or 5 wrote it.

    `dtype` (of activations) is the stored one; parameters stay float32, which small updates need.

    Raises:
      ValueError: no readable config.json, or something in it that the decoder does not do, named with its value.
    """
    origin = safetensors_folder.existing(path) / "config.json"
    raw = {key: value for key, value in safetensors_folder.read_json(origin).items() if value is not None}
    missing = [key for key, _, default in KEYS.values() if default is ... and key not in raw]
    safetensors_folder.refuse(f"{origin} is not the config of a decoder", {"missing": missing}, "Pass another folder")
    family = raw.get("model_type")
    dtype_key = "dtype" if "dtype" in raw else "torch_dtype"
    dtype = raw.get(dtype_key, "float32")
    supported = {
        "model_type": (family in FAMILIES, " or ".join(FAMILIES)),
        "hidden_act": (raw.get("hidden_act", "silu") == "silu", "silu"),
        "use_sliding_window": (not raw.get("use_sliding_window"), "false"),
        "layer_types": (set(raw.get("layer_types") or ()) <= {"full_attention"}, "full_attention alone"),
        "quantization_config": ("quantization_config" not in raw, "a float checkpoint"),
        dtype_key: (dtype in ("float32", "bfloat16", "float16"), "float32, bfloat16 or float16"),
    }
    for key, (fine, ours) in supported.items():
        if not fine:
            raise ValueError(f"{origin}: {key}={raw.get(key)!r} is not supported; the decoder does {ours}")
    biased = family == "qwen2" or bool(raw.get("attention_bias"))
    return DecoderConfig(
        **{field: kind(raw.get(key, default)) for field, (key, kind, default) in KEYS.items()},
        num_kv_heads=raw.get("num_key_value_heads", raw["num_attention_heads"]),
        head_dim=raw.get("head_dim", raw["hidden_size"] // raw["num_attention_heads"]),
        **_read_rope(raw, origin),
        qkv_bias=biased,
        output_bias=biased and family != "qwen2",
        mlp_bias=family == "llama" and bool(raw.get("mlp_bias")),
        qk_norm=family == "qwen3",
        dtype=dtype,
    )


def read_classifier(path: PathLike) -> DecoderConfig:
    """The shape of a reward model's checkpoint: its decoder as read_config has it, and its score head.

    The head's own tensors give its layout and labels: config.json need not say how many there are.

    Raises:
      ValueError: what read_config refuses, another architecture, a head of another layout.
    """
    config, folder = read_config(path), safetensors_folder.existing(path)
    architecture, *_ = safetensors_folder.read_json(folder / "config.json").get("architectures") or [""]
    kind, known = "For" + architecture.partition("For")[2], OUTCOME_KINDS + PROCESS_KINDS
    if kind not in known:
        raise ValueError(
            f"{folder / 'config.json'}: architectures={architecture!r} is no reward model that is read here; its name "
            f"should end in {', '.join(known)}"
        )
    with safetensors_folder.opened(folder) as found:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in found.items()}
    if (last := shapes.get("score.weight") or shapes.get("score.2.weight")) is None:
        others = safetensors_folder.enumerate_names(name for name in shapes if not name.startswith("model."))
        raise ValueError(
            f"{folder} holds no score head: expected score.weight, or score.0.weight and score.2.weight, there are "
            f"{others or 'only the tensors of the decoder'}"
        )
    hidden = 0 if "score.weight" in shapes else last[-1]
    return dataclasses.replace(config, score=ScoreHead(kind, last[0], "score.bias" in shapes, hidden))


def _read_rope(raw: Mapping[str, Any], origin: Path) -> dict[str, Any]:
    """transformers 5 keeps everything in rope_parameters; 4 has rope_theta beside rope_scaling, which still wins."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0)))
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if kind not in ("default", "llama3") or any(isinstance(value, Mapping) for value in rope.values()):
        raise ValueError(f"{origin}: rope_type={kind!r} is not supported; the decoder does default and llama3: {rope}")
    if partial != 1.0:
        raise ValueError(f"{origin}: partial_rotary_factor={partial!r} is not supported; the decoder turns whole heads")
    if kind == "default":
        return {"rope_theta": theta}
    needed = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if missing := [key for key in needed if key not in rope]:
        raise ValueError(f"{origin}: llama3 rope scaling lacks {', '.join(missing)}")
    factor, low, high, original = (float(rope[key]) for key in needed)
    return {"rope_theta": theta, "rope_scaling": Llama3Rope(factor, low, high, original_max_position=int(original))}


def to_json(
    config: DecoderConfig,
    *,
    dtype: str,
    max_position_embeddings: int = 32_768,
    bos_token_id: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
) -> dict[str, Any]:
    """What config.json says of a model of ours, in words that transformers 4, 5 and vLLM all read.

    Raises:
      ValueError: no Hugging Face family has this combination of biases and norms.
    """
    family = _family(config)
    rope: dict[str, Any] = {"rope_type": "default"}
    if (scaling := config.rope_scaling) is not None:
        rope = {"rope_type": "llama3", **dataclasses.asdict(scaling)}
        rope["original_max_position_embeddings"] = rope.pop("original_max_position")
    tokens = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    return {
        "architectures": [FAMILIES[family] + ("ForCausalLM" if config.score is None else config.score.kind)],
        "model_type": family,
        **{key: getattr(config, field) for field, (key, _, _) in KEYS.items()},
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        **({} if family == "qwen2" else {"attention_bias": config.qkv_bias}),
        **({"mlp_bias": config.mlp_bias} if family == "llama" else {}),
        "max_position_embeddings": max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else rope,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "dtype": dtype,
        "torch_dtype": dtype,
        **({} if config.score is None else _labels(config.score)),
        **{key: value for key, value in tokens.items() if value is not None},
    }


def _labels(head: ScoreHead) -> dict[str, Any]:
    names = {str(label): f"LABEL_{label}" for label in range(head.labels)}
    return {"id2label": names, "label2id": {name: int(label) for label, name in names.items()}}


def _family(config: DecoderConfig) -> str:
    biases = (config.qkv_bias, config.output_bias, config.mlp_bias)
    square = config.num_heads * config.head_dim == config.hidden_size
    if config.qk_norm and biases in ((False, False, False), (True, True, False)):
        return "qwen3"
    if not config.qk_norm and biases == (True, False, False) and square:
        return "qwen2"
    if not config.qk_norm and config.qkv_bias == config.output_bias and config.hidden_size % config.num_heads == 0:
        return "llama"
    raise ValueError(
        f"no Hugging Face family holds qk_norm={config.qk_norm}, qkv_bias={config.qkv_bias}, "
        f"output_bias={config.output_bias}, mlp_bias={config.mlp_bias}, num_heads={config.num_heads}, "
        f"head_dim={config.head_dim}, hidden_size={config.hidden_size}: choose qwen3 (qk_norm; biases on q, k, v and "
        "output or nowhere), qwen2 (bias on q, k, v; num_heads * head_dim = hidden_size) or llama (bias on q, k, v and "
        "output or on neither; hidden_size a multiple of num_heads)"
    )


def write_config(
    config: DecoderConfig, path: PathLike, *, dtype: str = "float32", source: PathLike | None = None, **keys: Any
):
    """Writes config.json into a folder. `keys` are those of `to_json`, such as eos_token_id.

    A source folder with a config.json of its own gives the text, and only dtype and `keys` are set in it: a checkpoint
    keeps whatever its publisher said beyond the shape.

    Raises:
      ValueError: the source's config.json describes another model.
    """
    raw = to_json(config, dtype=dtype, **keys)
    if source is not None and (Path(source) / "config.json").exists():
        read = read_config if config.score is None else read_classifier
        ours, theirs = dataclasses.asdict(config), dataclasses.asdict(read(source))
        differing = [f for f in ours if f not in EXECUTION and ours[f] != theirs[f]]
        listed = [f"{field}={ours[field]} (source: {theirs[field]})" for field in differing]
        safetensors_folder.refuse(f"config is not that of {source}", {"differing": listed}, "Pass the trained one")
        given = {key: value for key, value in keys.items() if value is not None}
        raw = safetensors_folder.read_json(Path(source) / "config.json")
        raw |= {"dtype": dtype, "torch_dtype": dtype, **given}
    (Path(path) / "config.json").write_text(json.dumps(raw, indent=2) + "\n")

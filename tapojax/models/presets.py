"""Published shapes by name, for runs and memory estimates without a checkpoint, and two small ones for the gym.

Figures are those of the base models' config.json. A checkpoint's own file wins (`config_json.read_config`): instruct
and later releases of the same size may differ in norm_eps or rope_theta.

Sources: Qwen2.5 (arXiv 2412.15115), Qwen2.5-Math (arXiv 2409.12122), DeepSeek-R1 (arXiv 2501.12948), Qwen3
(arXiv 2505.09388), Llama 3 (arXiv 2407.21783).
"""

import dataclasses

from tapojax.models.config import DecoderConfig, Llama3Rope


def _qwen2(layers, width, mlp, heads, kv_heads, *, vocab=151_936, tied=True, theta=1e6, eps=1e-6) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width // heads,
        rope_theta=theta,
        norm_eps=eps,
        qkv_bias=True,
        tie_embeddings=tied,
    )


def _qwen3(layers, width, mlp, heads, *, tied) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=151_936,
        hidden_size=width,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=1e6,
        norm_eps=1e-6,
        qk_norm=True,
        tie_embeddings=tied,
    )


def _llama3(layers, width, mlp, heads, *, tied, factor) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=128_256,
        hidden_size=width,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=width // heads,
        rope_theta=5e5,
        rope_scaling=Llama3Rope(factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192),
        norm_eps=1e-5,
        tie_embeddings=tied,
    )


_qwen25_7b = _qwen2(28, 3584, 18944, 28, 4, vocab=152_064, tied=False)
_gym_small = DecoderConfig(
    vocab_size=51,  # the gym's characters; replace it for another tokenizer
    hidden_size=128,
    intermediate_size=352,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    qkv_bias=True,
    tie_embeddings=True,
    initializer_range=0.08,  # about hidden_size ** -0.5: learns sooner than the 0.02 of large models
    unroll=True,
)

PRESETS: dict[str, DecoderConfig] = {
    "gym-small": _gym_small,  # 0.56 M parameters
    "gym-medium": dataclasses.replace(  # 1.6 M
        _gym_small, hidden_size=192, intermediate_size=528, num_layers=4, num_heads=6
    ),
    "qwen2.5-0.5b": _qwen2(24, 896, 4864, 14, 2),
    "qwen2.5-1.5b": _qwen2(28, 1536, 8960, 12, 2),
    "qwen2.5-3b": _qwen2(36, 2048, 11008, 16, 2),
    "qwen2.5-7b": _qwen25_7b,
    "qwen2.5-14b": _qwen2(48, 5120, 13824, 40, 8, vocab=152_064, tied=False, eps=1e-5),
    "qwen2.5-32b": _qwen2(64, 5120, 27648, 40, 8, vocab=152_064, tied=False, eps=1e-5),
    "qwen2.5-math-1.5b": _qwen2(28, 1536, 8960, 12, 2, theta=1e4),
    "qwen2.5-math-7b": dataclasses.replace(_qwen25_7b, rope_theta=1e4),
    "deepseek-r1-distill-qwen-1.5b": _qwen2(28, 1536, 8960, 12, 2, tied=False, theta=1e4),
    "deepseek-r1-distill-qwen-7b": dataclasses.replace(_qwen25_7b, rope_theta=1e4),
    "qwen3-0.6b": _qwen3(28, 1024, 3072, 16, tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 6144, 16, tied=True),
    "qwen3-4b": _qwen3(36, 2560, 9728, 32, tied=True),
    "qwen3-8b": _qwen3(36, 4096, 12288, 32, tied=False),
    "qwen3-14b": _qwen3(40, 5120, 17408, 40, tied=False),
    "qwen3-32b": _qwen3(64, 5120, 25600, 64, tied=False),
    "llama-3.1-8b": _llama3(32, 4096, 14336, 32, tied=False, factor=8.0),
    "llama-3.2-1b": _llama3(16, 2048, 8192, 32, tied=True, factor=32.0),
    "llama-3.2-3b": _llama3(28, 3072, 8192, 24, tied=True, factor=32.0),
}

"""The shape of a decoder: one frozen value for Qwen2/2.5, Qwen3 and Llama 3.x, and how to run it."""

import dataclasses

# What the backward pass keeps of a block: all, or what the policy of this name in jax.checkpoint_policies says.
DTYPES = ("float32", "bfloat16", "float16")
REMAT = ("none", "nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable")
# How the architecture's name ends, where a head scores tokens: the whole row by its last one, or each by itself.
OUTCOME_KINDS = ("ForSequenceClassification", "ForRewardModel")
PROCESS_KINDS = ("ForTokenClassification", "ForProcessRewardModel")


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's frequency stretching: long wavelengths are slowed by `factor`, short ones kept, a ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclasses.dataclass(frozen=True)
class ScoreHead:
    """Logits of `labels` at each token instead of the next one's: linear, or Linear-ReLU-Linear where hidden > 0."""

    kind: str  # one of OUTCOME_KINDS or PROCESS_KINDS
    labels: int
    bias: bool = False  # of the linear one; the two of the other always have theirs
    hidden: int = 0


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Architecture (fixed by a checkpoint) and execution (free to change between runs of the same checkpoint)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: Llama3Rope | None = None
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    score: ScoreHead | None = None  # of a reward model, which has no vocabulary head
    initializer_range: float = 0.02
    # execution
    dtype: str = "float32"  # of activations and matrix products; params keep param_dtype
    param_dtype: str = "float32"
    remat: str = "none"  # one of REMAT
    unroll: bool = False  # unroll the scan over layers: faster for few layers on CPU, slower to compile for many

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"model.{name}={getattr(self, name)!r}: choose one of {DTYPES}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embedding turns pairs of channels")
        if self.remat not in REMAT:
            raise ValueError(f"remat={self.remat!r} is unknown: choose one of {', '.join(REMAT)}")

"""What vLLM loads into its own processes: a way to swap the weights, and HAPO's adaptive temperature.

vLLM imports both by name, see `vllm_engine.vllm_sampler`. No file of vLLM is patched.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import safetensors
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor import LogitsProcessor as LogitsProcessorV1
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

ARGUMENT = "adaptive_temperature"  # of SamplingParams.extra_args


class WeightsFile:
    """Methods that every worker gets (worker_extension_cls), called through collective_rpc."""

    def check_weights_file(self, path: str, shapes: Mapping[str, list[int]]):
        """Reads the header only.

        Raises:
          ValueError: the file does not hold exactly these tensors. vLLM itself would take a part of them without a
            word and go on with a mixture of two models.
        """
        with safetensors.safe_open(path, framework="pt") as file:
            held = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}
        if differing := sorted(name for name in {*held, *shapes} if held.get(name) != shapes.get(name)):
            listed = [f"{name} {held.get(name)} (expected {shapes.get(name)})" for name in differing[:4]]
            raise ValueError(f"{path}: {len(differing)} tensors are missing or misshapen: {', '.join(listed)}")

    def load_weights_file(self: Any, path: str):
        """Replaces all weights. The engine must be paused, and an error on the way leaves it without a model."""
        with safetensors.safe_open(path, framework="pt") as file:
            self.reload_weights(weights_iterator=((name, file.get_tensor(name)) for name in file.keys()))
        if self.model_config.hf_config.tie_word_embeddings:
            # On CPU a tied head is a packed copy of the embedding, and reload_weights leaves that copy as it was.
            head = self.get_model().lm_head
            head.quant_method.process_weights_after_loading(head)


class Settings(NamedTuple):
    """`entropy.AdaptiveTemperature` and the `entropy.EntropyStats` it works with; statistics may be NaN."""

    base: float
    strength: float
    quantile: float
    scale: float
    above: float
    below: float


OFF = Settings(base=1.0, strength=0.0, quantile=math.nan, scale=math.nan, above=math.nan, below=math.nan)


def temperature_factor(logits: torch.Tensor, settings: torch.Tensor) -> torch.Tensor:
    """What multiplies the base temperature, [B], from unscaled logits [B, V] and settings [B, 6] (`Settings`).

    h = (ln max(H, 1e-6) - quantile) / (scale + 1e-6)
    factor = 1 + strength·clip(h·above where h > 0 else h·below, -1, 1), and 1 without statistics

    H is the entropy of softmax(logits / base). The formula of `entropy.adaptive_temperature`, in float32.
    """
    base, strength, quantile, scale, above, below = settings.T
    logprobs = torch.log_softmax(logits / base[:, None], dim=-1, dtype=torch.float32)
    # banned tokens have p ln p = 0; no term is negative, so a nearly sure policy's small entropy keeps its digits
    entropies = torch.where(logprobs > -torch.inf, -torch.exp(logprobs) * logprobs, 0).sum(dim=-1)
    distance = (entropies.clamp(min=1e-6).log() - quantile) / (scale + 1e-6)
    relative = (distance * torch.where(distance > 0, above, below)).clamp(-1, 1)
    return 1 + strength * torch.where(relative.isnan(), 0, relative)


class AdaptiveTemperature(LogitsProcessorV1, LogitsProcessorV2):
    """Divides the logits of each row by its factor; vLLM divides by the base, which is the request's temperature.

    A request asks for it with extra_args={"adaptive_temperature": Settings(...)._asdict()}. One class for both model
    runners of vLLM: the first calls `update_state` and `apply(logits)`, the second `add_request` and
    `apply(logits, context)`.
    """

    def __init__(self, vllm_config: Any, *_):
        # row of the batch (first runner) or slot of the request (second) -> Settings; kept on the host, as it is small
        self.table = torch.tensor(OFF).repeat(vllm_config.scheduler_config.max_num_seqs, 1)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams):
        """Raises ValueError for settings that are none, so that the request fails and not the engine."""
        if (given := (sampling_params.extra_args or {}).get(ARGUMENT)) is None:
            return
        if not isinstance(given, Mapping) or set(given) != set(Settings._fields):
            raise ValueError(f"{ARGUMENT}={given!r}: give exactly {', '.join(Settings._fields)}")
        if not all(isinstance(value, float) for value in given.values()):
            raise ValueError(f"{ARGUMENT}={given!r}: give floats")
        settings = Settings(**given)
        if not 0 < settings.base == sampling_params.temperature or not 0 <= settings.strength < 1:
            raise ValueError(
                f"{ARGUMENT}={given!r} with temperature={sampling_params.temperature}: base must be the request's "
                "temperature and positive, and strength in [0, 1), or a temperature could become 0"
            )
        if any(math.isinf(value) for value in settings):
            raise ValueError(f"{ARGUMENT}={given!r}: statistics are numbers, or NaN where there are none")

    def is_argmax_invariant(self) -> bool:
        # It is, but then the first runner would call it after the temperature and only for batches that sample.
        return False

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        given = (sampling_params.extra_args or {}).get(ARGUMENT)
        self.table[req_idx] = torch.tensor(OFF if given is None else Settings(**given))
        return given is not None

    def update_state(self, batch_update: BatchUpdate | None):
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.table[row] = torch.tensor(OFF)
        for row, sampling_params, _, _ in batch_update.added:
            self.add_request(row, sampling_params)
        for source, target, direction in batch_update.moved:
            taken = self.table[[target, source]]
            if direction != MoveDirectionality.SWAP:
                taken[0] = torch.tensor(OFF)
            self.table[[source, target]] = taken

    def apply(self, logits: torch.Tensor, context: Any = None) -> torch.Tensor:
        if not self.table[:, 1].any():
            return logits
        table = self.table.to(logits.device)
        settings = table[: len(logits)] if context is None else table[context.expanded_idx_mapping]
        return logits.div_(temperature_factor(logits, settings)[:, None])  # by exactly 1 where it is off

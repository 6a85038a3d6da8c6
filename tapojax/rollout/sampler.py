"""What a rollout server serves: a sampler behind coroutines, with JAX or vLLM inside. Plain data, no jax.

The servicer (`rollout/serving.py`) checks requests, versions and checksums, scores and streams; a sampler samples.
"""

import hashlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple

from tapojax.rpc import tapojax_pb2 as pb


class Broken(RuntimeError):
    """The sampler cannot go on: only a new process helps."""


class Tensor(NamedTuple):
    """One tensor of the model in its Hugging Face name's layout; `data` is little-endian, in C order."""

    dtype: str  # bfloat16 or float32
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview


class Span(NamedTuple):
    """Tokens [begin, end) of a completion were sampled by the weights `version`."""

    version: int
    begin: int
    end: int


class Sample(NamedTuple):
    """One completion."""

    tokens: Sequence[int]  # a stop token included
    logprobs: Sequence[float]  # of the distribution really sampled from
    base_logprobs: Sequence[float]  # at temperature 1, unfiltered; empty: the same as logprobs
    stopped: bool  # by a stop token, not by the budget
    versions: Sequence[Span]


class Description(NamedTuple):
    """What a sampler can do."""

    engine: str  # jax or vllm, with its version
    max_prompt_tokens: int
    max_tokens: int
    tensors: Mapping[str, tuple[int, ...]]  # every tensor `load` expects: Hugging Face name -> shape


class Sampler(NamedTuple):
    """Coroutines of one engine. Versions are the servicer's; a sampler only labels tokens with what `load` was told."""

    description: Description
    # (request) -> (index of a prompt, its group), each as soon as it is finished, prompts in request.skip left out;
    # aclose() of the iterator ends the work
    generate: Callable[[pb.GenerateRequest], AsyncGenerator[tuple[int, Sequence[Sample]], None]]
    # rows of tokens -> log-probs of tokens[1:] at temperature 1, unfiltered
    logprobs: Callable[[Sequence[Sequence[int]]], Awaitable[Sequence[Sequence[float]]]]
    # (every tensor, version): freezes running requests, swaps, drops caches, carries on; an error leaves the old ones
    load: Callable[[Mapping[str, Tensor], int], Awaitable[None]]
    pause: Callable[[str], Awaitable[None]]  # mode: keep, wait or abort
    resume: Callable[[], Awaitable[None]]
    close: Callable[[], Awaitable[None]]


def model_digest(tensors: Mapping[str, Sequence[int]]) -> str:
    """Names a model's shape: the same for a trainer and a server whose tensors have the same names and shapes."""
    text = json.dumps(sorted((name, list(shape)) for name, shape in tensors.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]

"""The embedded sampler behind a rollout server: a JAX machine that samples for a trainer elsewhere.

With one server and one request a batch it gives the very rows that the trainer's own embedded sampler would: same key,
same shapes, same weights (in float32 to the bit). Groups are handed out as they end, in segments of the compiled loop;
a pause or a swap of the weights waits for the batch that runs.
"""

import asyncio
import functools
import threading
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  teaches numpy the name bfloat16
import numpy as np

from tapojax import entropy, logprobs
from tapojax.models import decoder, huggingface
from tapojax.models.config import DecoderConfig
from tapojax.rollout import local
from tapojax.rollout.sampler import Description, Sample, Sampler, Span, Tensor
from tapojax.rpc import tapojax_pb2 as pb
from tapojax.types import Prompts, Sampling

Group = tuple[int, Sequence[Sample]]  # index of its prompt, and its completions


def jax_sampler(
    config: DecoderConfig,
    *,
    max_prompt_tokens: int,
    max_tokens: int,
    dtype: str | None = None,
    max_rows: int = 256,
    stream_tokens: int = 32,
) -> Sampler:
    """Samples one request at a time with the given model on the local devices, in `dtype` (the model's own when None).

    Completions of a request are padded to the request's own max_tokens, and it is seen each stream_tokens tokens which
    have ended; `max_rows` bounds the rows of one Logprobs call that are computed at a time.
    """
    engine = local.local_engine(config, max_prompt_tokens=max_prompt_tokens, dtype=dtype)
    loaded: dict[str, Any] = {"version": -1, "weights": None}
    running, gate = asyncio.Lock(), asyncio.Event()
    gate.set()

    async def generate(request: pb.GenerateRequest) -> AsyncGenerator[Group, None]:
        await gate.wait()
        async with running:
            ready: asyncio.Queue[Group | None] = asyncio.Queue()
            loop, over = asyncio.get_running_loop(), threading.Event()

            def hand_out(group: Group):
                if over.is_set():
                    raise InterruptedError("nobody waits for the request any more")
                loop.call_soon_threadsafe(ready.put_nowait, group)

            budgets = max_prompt_tokens, stream_tokens
            sampling = asyncio.to_thread(
                _generate, config, *budgets, loaded["version"], _weights(loaded), request, hand_out
            )
            work = asyncio.create_task(sampling)
            work.add_done_callback(lambda _: ready.put_nowait(None))
            try:
                while (group := await ready.get()) is not None:
                    yield group
                await work
            finally:
                over.set()
                await asyncio.wait([work])  # the devices are busy until then
                work.exception()  # is seen: where it matters it was raised above

    async def rows_logprobs(rows: Sequence[Sequence[int]]) -> Sequence[Sequence[float]]:
        length = max_prompt_tokens + max_tokens
        async with running:
            parts = [rows[start : start + max_rows] for start in range(0, len(rows), max_rows)]
            return [
                row
                for part in parts
                for row in await asyncio.to_thread(_logprobs, config, _weights(loaded), part, length)
            ]

    async def load(tensors: Mapping[str, Tensor], version: int):
        arrays = {name: _array(tensor) for name, tensor in tensors.items()}
        params = await asyncio.to_thread(huggingface.from_named, arrays, config)
        async with running:
            weights = await asyncio.to_thread(engine.load, params, version)
            loaded.update(version=version, weights=weights)

    async def pause(mode: str):
        """Nothing new starts; a batch that runs is awaited in every mode, for a compiled loop cannot be stopped."""
        gate.clear()
        async with running:
            pass

    async def resume():
        gate.set()

    async def close():
        gate.set()

    shapes = {name: tensor.shape for name, tensor in huggingface.manifest(config).items()}
    description = Description(f"jax {jax.__version__}", max_prompt_tokens, max_tokens, shapes)
    return Sampler(description, generate, rows_logprobs, load, pause, resume, close)


def _weights(loaded):
    if loaded["weights"] is None:
        raise ValueError("no weights were loaded yet: send them with LoadWeights and CommitWeights")
    return loaded["weights"]


def _generate(
    config: DecoderConfig,
    max_prompt_tokens: int,
    stream_tokens: int,
    version: int,
    weights,
    request: pb.GenerateRequest,
    hand_out: Callable[[Group], None],
):
    """Samples a request and hands out its groups; those to skip are sampled too, so that the compiled shape stays."""
    asked = request.sampling
    sampling = Sampling(
        max_tokens=asked.max_tokens,
        temperature=asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p,
        stop_token_ids=tuple(asked.stop_token_ids),
        pad_token_id=asked.pad_token_id,
    )
    temperature: Any = None
    carry: Any = ()
    if asked.HasField("adaptive"):
        a = asked.adaptive
        temperature = entropy.AdaptiveTemperature(a.base, a.strength)
        carry = entropy.EntropyStats(*np.array([a.quantile, a.scale, a.above, a.below], np.float32))
    prompts = Prompts(
        [{"id": str(prompt.index)} for prompt in request.prompts], [list(prompt.tokens) for prompt in request.prompts]
    )
    groups: dict[int, dict[int, Sample]] = defaultdict(dict)

    def told(row: int, ended: local.Ended):
        place, sample = divmod(row, request.group_size)
        groups[place][sample] = _sample(ended, version)
        index = request.prompts[place].index
        if len(groups[place]) == request.group_size and index not in request.skip:
            hand_out((index, [groups[place][sample] for sample in range(request.group_size)]))

    local.stream(
        config,
        weights,
        *local.pad_prompts(prompts, max_prompt_tokens, sampling.pad_token_id),
        jax.random.wrap_key_data(jnp.array(request.key, jnp.uint32)),
        carry,
        told,
        stream_tokens=stream_tokens,
        group_size=request.group_size,
        sampling=sampling,
        temperature=temperature,
    )


def _sample(ended: local.Ended, version: int) -> Sample:
    tokens, behaviour, base, stopped = ended
    return Sample(
        tokens.tolist(),
        behaviour.tolist(),
        [] if np.array_equal(base, behaviour) else base.tolist(),
        stopped=stopped,
        versions=[Span(version, 0, len(tokens))],
    )


def _logprobs(config: DecoderConfig, weights, rows: Sequence[Sequence[int]], length: int) -> list[list[float]]:
    tokens = np.zeros((len(rows), max(length, max(len(row) for row in rows))), np.int32)
    for place, row in zip(tokens, rows, strict=True):
        place[: len(row)] = row
    values = np.asarray(_row_logprobs(config, weights, tokens))
    return [line[: len(row) - 1].tolist() for line, row in zip(values, rows, strict=True)]


@functools.partial(jax.jit, static_argnames=("config",))
def _row_logprobs(config: DecoderConfig, weights, tokens):
    hidden, _ = decoder.prefill(config, weights, tokens, group_size=1, max_tokens=1)
    targets = jnp.asarray(tokens)[:, 1:]
    return logprobs.token_logprobs_and_entropy(
        hidden[:, :-1], decoder.head(weights), targets, temperature=1.0, max_bytes=2**27
    )[0]


def _array(tensor: Tensor) -> np.ndarray:
    return np.frombuffer(tensor.data, np.dtype(tensor.dtype)).reshape(tensor.shape)

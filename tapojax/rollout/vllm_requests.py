"""The requests of `vllm_engine`: what vLLM is asked, and how its answers become samples and log-probs."""

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import math
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

from vllm import RequestOutput, SamplingParams
from vllm.exceptions import VLLMClientError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from tapojax.rollout import vllm_plugin
from tapojax.rollout.sampler import Broken, Description, Sample, Span
from tapojax.rpc import tapojax_pb2 as pb


@dataclasses.dataclass
class Engine:
    """A running vLLM and who waits for it."""

    llm: AsyncLLM
    description: Description
    vocab_size: int
    unpaused: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    # loading, pausing and resuming happen one at a time
    swapping: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)
    running: set[asyncio.Future] = dataclasses.field(default_factory=set)
    broken: str = ""  # why nothing can be sampled any more


async def generate(engine: Engine, request: pb.GenerateRequest) -> AsyncGenerator[tuple[int, Sequence[Sample]], None]:
    prompts = [prompt for prompt in request.prompts if prompt.index not in set(request.skip)]
    longest = engine.description.max_tokens
    if not 0 < request.sampling.max_tokens <= longest or request.group_size < 1:
        raise ValueError(
            f"max_tokens={request.sampling.max_tokens}, group_size={request.group_size}: this server takes max_tokens "
            f"from 1 to {longest} and group_size from 1"
        )
    for prompt in prompts:
        _check_row(engine, prompt.tokens, engine.description.max_prompt_tokens)
    _sampling_params(request, 0, 0)  # raises before anything is started
    calls = [functools.partial(_group, engine, request, prompt) for prompt in prompts]
    async with contextlib.aclosing(_finished(engine, calls)) as groups:
        async for group in groups:
            yield group


async def _group(engine: Engine, request: pb.GenerateRequest, prompt: pb.Prompt) -> tuple[int, Sequence[Sample]]:
    samples = [asyncio.ensure_future(_sample(engine, request, prompt, i)) for i in range(request.group_size)]
    try:
        return prompt.index, await asyncio.gather(*samples)
    finally:
        for sample in samples:  # where one failed, the others end
            sample.cancel()


async def _sample(engine: Engine, request: pb.GenerateRequest, prompt: pb.Prompt, sample: int) -> Sample:
    tokens = list(prompt.tokens)
    completion = (await _output(engine, tokens, _sampling_params(request, prompt.index, sample))).outputs[0]
    if completion.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a completion of prompt {prompt.index} with {completion.finish_reason!r}")
    versions = [Span(int(span.version), span.start, span.end) for span in completion.weight_versions]
    base: list[float] = []
    if request.base_logprobs and not _at_base(request.sampling):
        values, version = await _row_logprobs(engine, tokens + list(completion.token_ids))
        base = values[len(tokens) - 1 :]
        for span in versions:
            if span.version != version:
                base[span.begin : span.end] = [math.nan] * (span.end - span.begin)
    return Sample(
        list(completion.token_ids), completion.logprobs.logprobs, base, completion.finish_reason == "stop", versions
    )


def _at_base(sampling: pb.Sampling) -> bool:
    """Whether vLLM's log-probs are those of temperature 1, unfiltered; it gives them for greedy samples too."""
    plain = (sampling.temperature, sampling.top_k, sampling.top_p) == (1, 0, 1) and not sampling.HasField("adaptive")
    return plain or sampling.temperature == 0


def _sampling_params(request: pb.GenerateRequest, index: int, sample: int) -> SamplingParams:
    """Of one completion, with a seed of its own."""
    sampling, extra_args = request.sampling, None
    temperature = sampling.temperature
    if sampling.HasField("adaptive") and temperature > 0:
        settings = {name: getattr(sampling.adaptive, name) for name in vllm_plugin.Settings._fields}
        temperature, extra_args = sampling.adaptive.base, {vllm_plugin.ARGUMENT: settings}
    if 0 < temperature < 0.01:
        raise ValueError(f"temperature={temperature}: vLLM samples at 0.01 and above; 0 takes the most likely token")
    digest = hashlib.sha256(f"{list(request.key)} {index} {sample}".encode()).digest()
    with _refusing():
        return SamplingParams(
            temperature=temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,  # the request says what stops, not the model's config
            seed=int.from_bytes(digest[:8]) >> 1,
            logprobs=0,  # the sampled token's
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=extra_args,
        )


async def logprobs(engine: Engine, rows: Sequence[Sequence[int]]) -> Sequence[Sequence[float]]:
    longest = engine.description.max_prompt_tokens + engine.description.max_tokens
    for row in rows:
        _check_row(engine, row, longest)

    async def of_row(place: int) -> tuple[int, list[float], int]:
        return place, *await _row_logprobs(engine, list(rows[place]))

    calls = [functools.partial(of_row, place) for place in range(len(rows))]
    async with contextlib.aclosing(_finished(engine, calls)) as done:
        results = sorted([result async for result in done])
    if len({version for _, _, version in results}) > 1:  # the weights were swapped meanwhile
        return await logprobs(engine, rows)
    return [values for _, values, _ in results]


async def _row_logprobs(engine: Engine, row: list[int]) -> tuple[list[float], int]:
    """Log-probs of row[1:] at temperature 1, unfiltered, and the version of the weights; one more token is sampled."""
    params = SamplingParams(
        temperature=0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False, ignore_eos=True
    )
    output = await _output(engine, row, params)
    values = output.prompt_logprobs.logprobs
    if len(values) != len(row) - 1:
        raise RuntimeError(f"vLLM gave {len(values)} log-probs for a row of {len(row)} tokens")
    return values, int(output.outputs[0].weight_versions[-1].version)


async def _output(engine: Engine, tokens: list[int], params: SamplingParams) -> RequestOutput:
    """The last output of one request. Cancelling ends the request in vLLM."""
    with _refusing():
        outputs = [o async for o in engine.llm.generate({"prompt_token_ids": tokens}, params, uuid.uuid4().hex)]
    return outputs[-1]


@contextlib.contextmanager
def _refusing():
    """vLLM's own errors, as a sampler's."""
    try:
        yield
    except VLLMClientError as error:
        raise ValueError(f"vLLM refuses the request: {error}") from error
    except EngineDeadError as error:
        raise Broken("vLLM's engine process has died; the log above says why") from error


def _check_row(engine: Engine, tokens: Sequence[int], longest: int):
    """What vLLM would not notice: without a tokenizer it does not know the vocabulary, and it shortens completions."""
    if not 0 < len(tokens) <= longest:
        raise ValueError(f"{len(tokens)} tokens, allowed are 1 to {longest}")
    if not 0 <= min(tokens) <= max(tokens) < engine.vocab_size:
        raise ValueError(f"token ids from {min(tokens)} to {max(tokens)}, the model has 0 to {engine.vocab_size - 1}")


async def _finished(engine: Engine, calls: Sequence[Callable[[], Awaitable[Any]]]) -> AsyncGenerator[Any, None]:
    """Starts all of them, unless paused, and gives results as they come; ends what is left when it is closed."""
    await engine.unpaused.wait()
    check_whole(engine)
    tasks = [asyncio.ensure_future(call()) for call in calls]
    engine.running.update(tasks)
    try:
        for task in asyncio.as_completed(tasks):
            yield await task
    except asyncio.CancelledError:
        check_whole(engine)
        raise
    finally:
        await end(tasks)
        engine.running.difference_update(tasks)


async def end(tasks: Sequence[asyncio.Future]):
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def check_whole(engine: Engine):
    if engine.broken:
        raise Broken(engine.broken)

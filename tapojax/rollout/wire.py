"""Between the trainer's arrays and the messages of the wire."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tapojax.entropy import AdaptiveTemperature
from tapojax.rpc import tapojax_pb2 as pb
from tapojax.types import Example, Prompts, Rollout, Sampling, Scores


def sampling_message(sampling: Sampling, temperature: Any, carry: Any) -> pb.Sampling:
    """How to sample, in numbers.

    Raises:
      ValueError: `temperature` is a function of the algorithm's own, which cannot be sent.
    """
    message = pb.Sampling(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        stop_token_ids=sampling.stop_token_ids,
        pad_token_id=sampling.pad_token_id,
    )
    if temperature is not None:
        if not isinstance(temperature, AdaptiveTemperature):
            raise ValueError(
                f"the algorithm's temperature {temperature!r} is a function that only the embedded sampler can call: "
                "clear rollout.addresses, or make it an entropy.AdaptiveTemperature"
            )
        quantile, scale, above, below = (float(x) for x in jax.device_get(tuple(carry)))
        message.adaptive.CopyFrom(
            pb.AdaptiveTemperature(
                base=temperature.base,
                strength=temperature.strength,
                quantile=quantile,
                scale=scale,
                above=above,
                below=below,
            )
        )
    return message


def prompt_messages(prompts: Prompts, indices: Sequence[int], *, with_examples: bool) -> list[pb.Prompt]:
    """The prompts of the given places; the problem goes along for a server that scores."""
    return [
        pb.Prompt(
            index=index,
            tokens=prompts.tokens[index],
            example=_json(prompts.examples[index]) if with_examples else b"",
        )
        for index in indices
    ]


def _json(example: Example) -> bytes:
    return json.dumps(dict(example)).encode()


def check_group(group: Sequence[pb.Completion], *, group_size: int, max_tokens: int, stop_token_ids: Sequence[int]):
    """What a server sent must be a whole group of completions the request allows.

    Raises:
      ValueError: naming what is wrong.
    """
    if len(group) != group_size:
        raise ValueError(f"a group of {len(group)} completions, asked were {group_size}")
    for completion in group:
        count = len(completion.tokens)
        base = len(completion.base_logprobs)
        if not 0 < count <= max_tokens or len(completion.logprobs) != count or base not in (0, count):
            raise ValueError(
                f"a completion of {count} tokens (allowed: 1 to {max_tokens}), {len(completion.logprobs)} logprobs and "
                f"{base} base_logprobs"
            )
        values = np.array(completion.logprobs)
        if not -np.inf < values.min() <= values.max() <= 1e-3:  # false for NaN, too
            raise ValueError(f"log-probs that are none: from {values.min()} to {values.max()}")
        stopped = completion.finish_reason == pb.FINISH_REASON_STOP
        if stopped != (completion.tokens[-1] in stop_token_ids):
            raise ValueError(f"finish_reason {completion.finish_reason} with last token {completion.tokens[-1]}")
        if [b for span in completion.versions for b in (span.begin, span.end)] != _joints(completion, count):
            raise ValueError(f"version spans {list(completion.versions)} do not cover {count} tokens")


def _joints(completion: pb.Completion, count: int) -> list[int]:
    """begin, end, begin, end, ... of spans that cover a completion without gap or overlap."""
    ends = [span.end for span in completion.versions]
    begins = [0, *ends[:-1]]
    ends = [*ends[:-1], count]
    return [x for pair in zip(begins, ends, strict=False) for x in pair]


def rollout(
    prompts: Prompts,
    groups: Mapping[int, Sequence[pb.Completion]],
    *,
    max_prompt_tokens: int,
    sampling: Sampling,
    step_of: Callable[[int], int],
) -> Rollout:
    """Rows of length max_prompt_tokens + max_tokens in the order of the prompts, as the embedded sampler lays them out.

    `step_of(version)` turns the wire's weight versions into the trainer's.
    """
    pairs = [(tokens, completion) for place, tokens in enumerate(prompts.tokens) for completion in groups[place]]
    shape = len(pairs), max_prompt_tokens + sampling.max_tokens
    versions = np.full(shape, -1, np.int32)
    rows = Rollout(
        tokens=np.full(shape, sampling.pad_token_id, np.int32),
        mask=np.zeros(shape, bool),
        behaviour_logprobs=np.zeros(shape, np.float32),
        base_logprobs=np.zeros(shape, np.float32),
        prompt_lengths=np.array([len(tokens) for tokens, _ in pairs], np.int32),
        truncated=np.array([c.finish_reason == pb.FINISH_REASON_LENGTH for _, c in pairs]),
        source=np.zeros(len(pairs), np.int32),
        versions=versions,
    )
    for row, (tokens, completion) in enumerate(pairs):
        begin, end = len(tokens), len(tokens) + len(completion.tokens)
        rows.tokens[row, :begin], rows.tokens[row, begin:end] = tokens, completion.tokens
        rows.mask[row, begin:end] = True
        rows.behaviour_logprobs[row, begin:end] = completion.logprobs
        rows.base_logprobs[row, begin:end] = completion.base_logprobs or completion.logprobs
        for span in completion.versions:
            versions[row, begin + span.begin : begin + span.end] = step_of(span.version)
    return rows


def scores(
    num_prompts: int, groups: Mapping[int, Sequence[pb.Completion]], channels: Sequence[str]
) -> tuple[Scores, list[str | None]]:
    """What the servers' scorers said, in the order of the rows."""
    completions = [completion for place in range(num_prompts) for completion in groups[place]]
    columns = {
        name: np.array([completion.scores.get(name, float("nan")) for completion in completions], np.float32)
        for name in channels
    }
    return columns, [completion.score_error or None for completion in completions]

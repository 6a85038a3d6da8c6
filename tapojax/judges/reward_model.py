"""A discriminative reward model on the devices of this process: solutions as text in, scores out.

An outcome model's head scores the last token of the conversation, a process model's the separators that stand after
each step. Every local device holds all of the model and reads its share of the rows, so devices exchange nothing and
any thread may ask while the others train or sample.

Sources: Cobbe et al., arXiv 2110.14168 (outcome); Lightman et al., arXiv 2305.20050 (process); Zhang et al., arXiv
2501.07301 (Qwen2.5-Math-PRM: "<extra_0>" after each step, probability of label 1). That text which spells a model's
own marks is refused is our choice: a policy could otherwise write the separator.
"""

import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float32

from tapojax import sharding
from tapojax.models import config_json, decoder, huggingface, safetensors_folder
from tapojax.models.config import PROCESS_KINDS, DecoderConfig
from tapojax.models.safetensors_folder import PathLike
from tapojax.tasks import files

SHORTEST = 64  # rows are padded to a power of two of at least so many tokens


class Read(NamedTuple):
    """What a reward model says of B solutions."""

    scores: Sequence[Any]  # Float32 [steps], or [1] of the whole solution; None: no score
    errors: Sequence[str | None]  # why there is none
    tokens: Float32[np.ndarray, "B"]  # read, NaN where none were
    seconds: Float32[np.ndarray, "B"]  # of the call, shared out by tokens


class Model(NamedTuple):
    """A loaded reward model."""

    process: bool  # it scores steps
    read: Callable[[Sequence[str], Sequence[Sequence[str]]], Read]  # (problems, the steps of each solution)


def load(
    path: str,
    *,
    tokenizer_path: str = "",
    separator: str = "<extra_0>",
    positive: int = 1,
    template: str = "{problem}",
    chat: bool = True,
    system: str = "",
    max_tokens: int = 4096,
    batch_tokens: int = 8192,
    dtype: str = "",
) -> Model:
    """The reward model in a Hugging Face folder; for the arguments and errors see `classifier.process_model`."""
    if not path:
        raise ValueError("judge.path is empty: give the folder of a reward model")
    config = config_json.read_classifier(path)
    head: Any = config.score
    process = head.kind in PROCESS_KINDS
    if head.labels > 1 and not 0 <= positive < head.labels:
        raise ValueError(f"judge.positive={positive}: the model at {path} has the labels 0 to {head.labels - 1}")
    tokenizer = files.load_tokenizer(tokenizer_path or path)
    if process:
        between = _separator(tokenizer, separator)
        write = functools.partial(_steps, tokenizer, template=template, chat=chat, system=system, between=between)
    else:
        padding = safetensors_folder.read_json(safetensors_folder.existing(path) / "config.json").get("pad_token_id")
        write = functools.partial(_whole, tokenizer, template=template, chat=chat, system=system, padding=padding)
    marks = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    marks += [separator] * (process and bool(separator.strip()))

    def conversation(problem: str, solution: Sequence[str]) -> tuple[list[int], list[int]]:
        """Tokens, and which of them are scored; ValueError says why there is no score."""
        if found := [mark for mark in marks if any(mark in step for step in solution)]:
            raise ValueError(f"the solution spells {found[0]!r}, a mark of the reward model's own")
        tokens, ends = write(problem, solution)
        if not ends:
            raise ValueError("the solution has no step")
        if len(tokens) > max_tokens:
            raise ValueError(f"problem and solution have {len(tokens)} tokens, judge.max_tokens={max_tokens}")
        return tokens, ends

    logits = label_logits(config, path, max_tokens=max_tokens, batch_tokens=batch_tokens, dtype=dtype)
    score = functools.partial(_scores, positive=positive, process=process)
    return Model(process, functools.partial(_read, conversation, logits, score))


def _read(conversation, logits, score, problems: Sequence[str], solutions: Sequence[Sequence[str]]) -> Read:
    began, rows, ends = time.perf_counter(), {}, {}
    errors: list[str | None] = [None] * len(solutions)
    for row, (problem, solution) in enumerate(zip(problems, solutions, strict=True)):
        try:
            rows[row], ends[row] = conversation(problem, solution)
        except ValueError as error:
            errors[row] = f"not judged: {error}"
    scores: list[Any] = [None] * len(solutions)
    for row, values in zip(rows, logits(list(rows.values())), strict=True):
        found = score(values[ends[row]])
        if np.all(np.isfinite(found)):
            scores[row] = found
        else:
            errors[row] = "not judged: the reward model's score is not finite"
    counts = np.array([len(rows.get(row, ())) or np.nan for row in range(len(solutions))], np.float32)
    seconds = (time.perf_counter() - began) / max(float(np.nansum(counts)), 1.0)
    return Read(scores, errors, counts, counts * np.float32(seconds))


def _steps(tokenizer, problem, solution, *, template, chat, system, between) -> tuple[list[int], list[int]]:
    """The problem, then each step with the separator behind it, which is scored. What might follow changes nothing."""
    message, ends = template.format(problem=problem), []
    tokens = _chat(tokenizer, system, message) if chat else tokenizer.encode(message)
    for step in solution:
        tokens = [*tokens, *tokenizer.encode(step, add_special_tokens=False), *between]
        ends.append(len(tokens) - 1)
    return tokens, ends


def _whole(tokenizer, problem, solution, *, template, chat, system, padding) -> tuple[list[int], list[int]]:
    """Problem and solution, scored at the last token that is not the model's padding.

    There transformers looks, also where padding is what ends a conversation.
    """
    message, said = template.format(problem=problem), "".join(solution)
    tokens = _chat(tokenizer, system, message, said) if chat else tokenizer.encode(message + said)
    return tokens, [max((i for i, token in enumerate(tokens) if token != padding), default=len(tokens) - 1)]


def _chat(tokenizer, system: str, message: str, *said: str) -> list[int]:
    """The conversation up to what the assistant said, or to where it begins to speak."""
    roles = [("system", system)] * bool(system) + [("user", message)] + [("assistant", text) for text in said]
    turns = [{"role": role, "content": content} for role, content in roles]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=not said, return_dict=False)


def _separator(tokenizer, separator: str) -> list[int]:
    tokens = tokenizer.encode(separator, add_special_tokens=False)
    if len(tokens) != 1:
        raise ValueError(
            f"judge.separator={separator!r} is {len(tokens)} tokens of this tokenizer: give the one that the model was "
            "trained with, such as '<extra_0>' (Qwen2.5-Math-PRM) or '\\n' (TRL)"
        )
    return tokens


def _scores(logits: Float32[np.ndarray, "S C"], *, positive: int, process: bool) -> Float32[np.ndarray, "S"]:
    """softmax(logits)[positive]; of a single label the logit itself, and of a step the logistic function of it."""
    if logits.shape[1] == 1 and not process:
        return logits[:, 0]
    if logits.shape[1] == 1:
        logits, positive = np.pad(logits, ((0, 0), (1, 0))), 1
    with np.errstate(invalid="ignore"):  # of logits that are not finite, which the caller finds in the result
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return odds[:, positive] / odds.sum(axis=1)


def label_logits(config: DecoderConfig, path: PathLike, *, max_tokens: int, batch_tokens: int, dtype: str = ""):
    """rows of tokens, ragged and at most max_tokens long -> the labels' logits [T, C] of each, in their order.

    Rows are padded to a power of two of tokens, batches of a length to one number of rows: so there are few compiled
    programs, and what a row gets does not depend on the others that are asked about, nor on their number.
    """
    dtype, devices = dtype or config.dtype, jax.local_devices()
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    shape, kinds = (len(devices), 1, 1, 1), (AxisType.Auto,) * len(sharding.AXES)
    mesh = jax.make_mesh(shape, sharding.AXES, axis_types=kinds, devices=devices)
    params = jax.device_put(huggingface.load_params(path, config), NamedSharding(mesh, P()))
    one_at_a_time = threading.Lock()

    def logits(rows: Sequence[Sequence[int]]) -> list[Float32[np.ndarray, "T C"]]:
        found: dict[int, Any] = {}
        for length, members in _by_length(rows, max_tokens).items():
            height = len(devices) * max(batch_tokens // length, 1)
            for start in range(0, len(members), height):
                part = members[start : start + height]
                tokens = np.zeros((height, length), np.int32)
                for place, row in zip(tokens, part, strict=False):
                    place[: len(rows[row])] = rows[row]
                with one_at_a_time, jax.set_mesh(mesh):
                    values = np.asarray(_label_logits(config, params, sharding.shard_batch(tokens, mesh)))
                found |= {row: value[: len(rows[row])] for row, value in zip(part, values, strict=False)}
        return [found[row] for row in range(len(rows))]

    return logits


_label_logits = jax.jit(decoder.label_logits, static_argnums=0)


def _by_length(rows: Sequence[Sequence[int]], longest: int) -> dict[int, list[int]]:
    """Padded length, a power of two or the longest -> which rows are padded to it."""
    groups: dict[int, list[int]] = {}
    for row, tokens in enumerate(rows):
        groups.setdefault(min(max(SHORTEST, 1 << (len(tokens) - 1).bit_length()), longest), []).append(row)
    return groups

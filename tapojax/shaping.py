"""Reward shaping: terms that are added to a row's reward before advantages are made."""

import itertools
import re
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, ScalarLike


def overlong_penalty(
    lengths: Int[ArrayLike, "B"], *, max_length: int, buffer: int, factor: ScalarLike = 1.0
) -> Float[Array, "B"]:
    """DAPO's soft overlong punishment: 0 up to a soft limit, then linear down to -factor at max_length and beyond.

    penalty = factor · clip((max_length - buffer - length) / buffer, -1, 0)

    lengths, max_length and buffer are in completion tokens, never characters; max_length - buffer is the soft limit.
    Differs from verl beyond max_length: there the line goes on falling without bound. The bound is the paper's and
    TRL's; up to max_length all agree.

    Raises: ValueError unless 1 <= buffer <= max_length.
    Source: Yu et al. 2025, arXiv 2503.14476, eq. 13.
    """
    if not 1 <= buffer <= max_length:
        raise ValueError(f"buffer={buffer} must be between 1 and max_length={max_length} tokens")
    remaining = (max_length - buffer - jnp.asarray(lengths)).astype(float)
    return jnp.clip(remaining / buffer, -1, 0) * factor


def flawed_positive(
    correct: Float[ArrayLike, "B"], flawed: Float[ArrayLike, "B"], *, penalty: ScalarLike = 1.0
) -> Float[Array, "B"]:
    """FAPO's reward: 1 for a correct row, 1 - penalty if its reasoning is judged flawed, -1 for a wrong one.

    R = 2·correct - 1 - penalty · correct · flawed

    Group normalisation makes it adaptive: as long as wrong rows outnumber the flawless ones a flawed row still has a
    positive advantage (with penalty = 1), afterwards a negative one. The verdict on a wrong row is not read; a correct
    row whose verdict is missing gets NaN, where the published code takes it for flawless (our choice).

    Source: Ding et al., arXiv 2510.22543.
    """
    correct = _at_least_float32(correct)
    return 2 * correct - 1 - penalty * correct * jnp.where(correct == 0, 0, flawed)


def genrm_reward(
    predicted: Float[ArrayLike, "B"], label: Float[ArrayLike, "B"], num_steps: Float[ArrayLike, "B"]
) -> Float[Array, "B"]:
    """FAPO's reward for a critic that names the first wrong one of num_steps steps, -1 where there is none.

    R = 1 - |predicted - label| / num_steps    if both say that there is a wrong step, or both that there is none
    R = -1                                     otherwise, or if predicted is NaN or no index in [-1, num_steps)

    predicted is NaN where the critique has no legible verdict. A row without label gets NaN.

    Source: Ding et al., arXiv 2510.22543, eq. 7; label -1 for its +∞, as in its code (yyDing1/FAPO).
    """
    predicted, label = _at_least_float32(predicted), _at_least_float32(label)
    num_steps = jnp.asarray(num_steps)
    legal = (predicted == -1) | ((predicted >= 0) & (predicted < num_steps))
    agree = legal & ((predicted == -1) == (label == -1))
    distance = jnp.abs(jnp.where(agree, predicted - label, 0)) / jnp.maximum(num_steps, 1)
    return jnp.where(jnp.isnan(label + num_steps), jnp.nan, jnp.where(agree, 1 - distance, -1))


def infolen(
    correct: Float[ArrayLike, "B"],
    lengths: Int[ArrayLike, "B"],
    redundancy: Float[ArrayLike, "B"],
    *,
    max_length: int,
    length_weight: ScalarLike = 0.3,
    redundancy_weight: ScalarLike = 0.2,
    mix: ScalarLike = 0.5,
    free_length: int | None = None,
) -> Float[Array, "B"]:
    """InfoLen reward: a right answer is worth less the longer and the more redundant its text is.

    R = correct · (1 - length_weight · λ · ((1 - mix) + mix · ρ) - redundancy_weight · ρ)
    λ = clip((length - free_length) / (max_length - free_length), 0, 1)

    ρ is the redundancy in [0, 1]. Lengths are in tokens; free_length is max_length / 2 unless given. Wrong rows get
    exactly 0, so the reward neither shortens nor lengthens them; with the default weights every right row stays at
    least 0.5 above, and a long text without redundancy loses at most 0.15. Both weights 0: R = correct.

    Raises: ValueError unless 0 <= free_length < max_length.
    Source: Jiang et al., AAAI 2026 ("TAPO"), which is said to penalise length and semantic redundancy; its formula is
    not public, so formula and numbers are our choice.
    """
    free = max_length / 2 if free_length is None else free_length
    if not 0 <= free < max_length:
        raise ValueError(f"free_length={free_length} must be at least 0 and below max_length={max_length} tokens")
    correct, redundancy = _at_least_float32(correct), _at_least_float32(redundancy)
    overlength = jnp.clip((jnp.asarray(lengths) - free) / (max_length - free), 0, 1)
    penalty = length_weight * overlength * (1 - mix + mix * redundancy) + redundancy_weight * redundancy
    # the unscored rows' reward is NaN, its gradient is not
    return jnp.where(jnp.isnan(correct), jnp.nan, jnp.nan_to_num(correct) * (1 - penalty))


def lexical_redundancy(
    tokens: Int[ArrayLike, "B T"], mask: Bool[ArrayLike, "B T"], *, n: int = 5, allowance: ScalarLike = 0.2
) -> Float[Array, "B"]:
    """Share of repeated token n-grams in each completion, beyond an allowance: 0 none, 1 all the same.

    ρ = clip((1 - distinct / count - allowance) / (1 - allowance), 0, 1)

    Counted are the n-grams that lie inside the mask; fewer than n tokens have none, and ρ = 0. Exact: they are sorted,
    not hashed. Our choice throughout.
    """
    tokens, mask = jnp.asarray(tokens), jnp.asarray(mask)
    starts = max(tokens.shape[1] - n + 1, 0)
    grams = [tokens[:, i : i + starts] for i in range(n)]
    outside = ~jnp.all(jnp.stack([mask[:, i : i + starts] for i in range(n)]), axis=0)
    outside, *grams = jax.lax.sort((outside, *grams), dimension=1, num_keys=n + 1)
    changes = jnp.any(jnp.stack([gram[:, 1:] != gram[:, :-1] for gram in grams]), axis=0)
    count = jnp.sum(~outside, axis=1)
    distinct = jnp.sum(~outside[:, 1:] & changes, axis=1) + 1
    repeated = jnp.where(count > 0, 1 - distinct / jnp.maximum(count, 1), 0)
    return jnp.clip((repeated - allowance) / (1 - allowance), 0, 1)


def semantic_redundancy(texts: Sequence[str], *, threshold: float = 0.6) -> Float[np.ndarray, "B"]:
    """How much the steps of each text resemble earlier steps of it: 0 not at all, 1 each is a copy. On the host.

    ρ = mean over steps j >= 2 of max(0, max_{k<j} ⟨e_j, e_k⟩ - threshold) / (1 - threshold)

    e_j is the unit vector of a step: square roots of how often each word, mark and pair of neighbours occurs in it,
    hashed to 1024 places. Steps are the lines that are not empty; of a single line the sentences; of a single
    sentence the parts between commas. Fewer than two steps: 0. Our choice throughout.
    """
    return np.array([_step_redundancy(_steps(text), threshold) for text in texts], np.float32)


def _step_redundancy(steps: Sequence[str], threshold: float) -> float:
    if len(steps) < 2:
        return 0.0
    vectors = np.stack([_step_vector(step) for step in steps])
    nearest = np.tril(vectors @ vectors.T, -1)[1:].max(axis=1)
    return float(np.mean(np.clip((nearest - threshold) / (1 - threshold), 0, 1)))


def _steps(text: str) -> list[str]:
    for separator in (r"\n", r"(?<=[.!?])\s", ","):
        steps = [step for step in re.split(separator, text) if step.strip()]
        if len(steps) > 1:
            break
    return steps


def _step_vector(step: str, size: int = 1024) -> Float[np.ndarray, "size"]:
    words = re.findall(r"\w+|[^\w\s]", step.lower())
    features = words + [f"{a} {b}" for a, b in itertools.pairwise(words)]
    places = [zlib.crc32(feature.encode()) % size for feature in features]  # the same in every process, unlike hash()
    vector = np.sqrt(np.bincount(places, minlength=size)).astype(np.float32)
    return vector / np.linalg.norm(vector)


def _at_least_float32(x: Float[ArrayLike, "B"]) -> Float[Array, "B"]:
    return jnp.asarray(x, jnp.result_type(x, jnp.float32))

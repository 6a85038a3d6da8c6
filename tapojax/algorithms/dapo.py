"""DAPO: clip-higher, dynamic sampling, token-mean loss, soft overlong punishment. Yu et al., arXiv 2503.14476.

Differs from GRPO: the four parts above, each with a neutral value at which it is GRPO's own.
"""

import numpy as np

from tapojax import shaping, weights
from tapojax.algorithms.grpo import grpo
from tapojax.types import Algorithm, Rollout


def dapo(
    *,
    group_size: int,
    max_tokens: int,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float = 0.0,
    dynamic_sampling: bool = True,
    token_mean: bool = True,
    overlong_buffer: int = 0,
    overlong_factor: float = 1.0,
) -> Algorithm:
    """Neutral: clip_high = clip_low, dynamic_sampling = token_mean = False, overlong_buffer = 0 (tokens).

    With an overlong buffer R = 2·correct - 1 + penalty, as in the paper and in verl: beside a range of 2 the penalty
    weighs half of what it would beside correct. Without one R = correct, which gives the same advantages as ±1.
    """

    def rewards(scores, rollout, step):
        if overlong_buffer == 0:
            return scores["correct"]
        return 2 * scores["correct"] - 1 + overlong(rollout, max_tokens, overlong_buffer, overlong_factor)

    def keep(rewards, scores):
        """Groups that hold both right and wrong rows; judged on correctness, not on the shaped reward (eq. 11)."""
        groups = np.asarray(scores["correct"]).reshape(-1, group_size)
        return np.nanmax(groups, axis=1, initial=-np.inf) > np.nanmin(groups, axis=1, initial=np.inf)

    parent = grpo(group_size=group_size, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    return parent._replace(
        rewards=rewards,
        keep=keep if dynamic_sampling else None,
        weights=weights.token_mean if token_mean else parent.weights,
    )


def overlong(rollout: Rollout, max_tokens: int, buffer: int, factor: float):
    """What each row's length costs, [B]; nothing with buffer = 0."""
    lengths = rollout.mask.sum(axis=1)
    return shaping.overlong_penalty(lengths, max_length=max_tokens, buffer=buffer, factor=factor) if buffer else 0.0

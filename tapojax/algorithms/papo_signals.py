"""What PAPO and its ablations reward, and how they make advantages of it. Tan et al., arXiv 2603.26535."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from tapojax import advantages


class Signal(NamedTuple):
    """A reward of the scores, [B], and an estimator of (rewards, process, correct, group_size, process_weight=)."""

    reward: Callable[..., Any]
    estimator: Callable[..., Any]


def _normalized(rewards, process, correct, group_size, *, process_weight):
    """The reward's own advantage: nothing to weigh."""
    return advantages.group_normalize(rewards, group_size)


def _correct(scores):
    return scores["correct"]


def _product(scores):
    """correct · process, where a wrong row's process score is not read."""
    return scores["correct"] * jnp.where(scores["correct"] == 0, 0, scores["process"])


SIGNALS = {
    "decoupled": Signal(_correct, advantages.decoupled),
    "full_norm": Signal(_correct, advantages.full_norm),
    "outcome": Signal(_correct, _normalized),
    "process": Signal(lambda scores: scores["process"], _normalized),
    "multiplicative": Signal(_product, _normalized),
}
WEIGHTED = ("decoupled", "full_norm")  # those that read process_weight

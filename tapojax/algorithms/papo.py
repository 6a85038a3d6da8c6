"""PAPO: an outcome and a process advantage, each normalised by itself. Tan et al., arXiv 2603.26535.

Differs from DAPO without dynamic sampling: right rows of a group are also compared by their reasoning, so a group whose
rows are all right still teaches. `scores["process"]` is in [0, 1]; those of wrong rows are not read, and a right row
without one (NaN) has its outcome advantage only, where the published code reads a failed judge as the worst score.

Paper and code disagree: clip_high 0.2 (paper), 0.28 (code, here); mean over rows (paper), over tokens (code, here).
"""

from typing import Any

from tapojax import advantages
from tapojax.algorithms.dapo import dapo
from tapojax.algorithms.papo_signals import SIGNALS, WEIGHTED
from tapojax.types import Algorithm


def papo(
    *,
    group_size: int,
    max_tokens: int,
    process_weight: float = 1.0,
    signal: str = "decoupled",
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float = 3.0,
    token_mean: bool = True,
    overlong_buffer: int = 0,
) -> Algorithm:
    """Neutral: process_weight = 0, or signal = "outcome". The other signals are the paper's ablations: "process" and
    "multiplicative" reward process and correct · process, of "full_norm" see `advantages`.

    Raises:
      ValueError: an unknown signal, or a process_weight that the signal does not read.
    """
    if signal not in SIGNALS:
        raise ValueError(f"signal={signal!r}: choose one of {[*SIGNALS]}")
    reward, estimator = SIGNALS[signal]
    if signal not in WEIGHTED and process_weight != 1.0:
        raise ValueError(f"process_weight={process_weight} is not read by signal={signal!r}: leave it out")
    knobs: dict[str, Any] = dict(clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, token_mean=token_mean)
    parent = dapo(group_size=group_size, max_tokens=max_tokens, overlong_buffer=overlong_buffer, **knobs)

    def rewards(scores, rollout, step):
        return parent.rewards({**scores, "correct": reward(scores)}, rollout, step)

    def advantage(rewards, scores, rollout):
        values = estimator(rewards, scores["process"], scores["correct"], group_size, process_weight=process_weight)
        return advantages.per_token(values, rollout.mask)

    needs = parent.needs | {"process"}
    return parent._replace(needs=needs, keep=None, rewards=rewards, advantages=advantage)

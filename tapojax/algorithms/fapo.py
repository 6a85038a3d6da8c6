"""FAPO: right answers through wrong reasoning are worth less than right ones. Ding et al., arXiv 2510.22543.

Differs from DAPO without dynamic sampling: the reward, 1 for right rows, -1 for wrong ones, and 1 - flaw_penalty for
right rows whose reasoning is judged flawed. `scores["flawed"]` comes from a generative reward model (`genrm.py` trains
one); that of wrong rows is not read, and a right row without verdict (NaN) is left out (our choice), where the
published code takes it for flawless.
"""

from typing import Any

import numpy as np

from tapojax import shaping
from tapojax.algorithms.dapo import dapo, overlong
from tapojax.types import Algorithm


def fapo(
    *,
    group_size: int,
    max_tokens: int,
    flaw_penalty: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float = 10.0,
    dynamic_sampling: bool = False,
    token_mean: bool = True,
    overlong_buffer: int = 0,
    overlong_factor: float = 1.0,
) -> Algorithm:
    """Neutral: flaw_penalty = 0, at which "flawed" is only logged. The dual clip is the code's, not the paper's."""
    clip: dict[str, Any] = dict(clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    knobs = clip | dict(token_mean=token_mean, overlong_buffer=overlong_buffer, overlong_factor=overlong_factor)
    parent = dapo(group_size=group_size, max_tokens=max_tokens, dynamic_sampling=dynamic_sampling, **knobs)

    def rewards(scores, rollout, step):
        shaped = shaping.flawed_positive(scores["correct"], scores["flawed"], penalty=flaw_penalty)
        return shaped + overlong(rollout, max_tokens, overlong_buffer, overlong_factor)

    def diagnostics(rewards, scores, rollout, step):
        """Among the right rows that were judged."""
        judged = np.asarray(scores["flawed"])[np.asarray(scores["correct"]) == 1]
        judged = judged[~np.isnan(judged)]
        return {"flawed_among_right": float(judged.mean()) if judged.size else float("nan")}

    parent = parent._replace(needs=parent.needs | {"flawed"}, diagnostics=diagnostics)
    return parent._replace(rewards=rewards) if flaw_penalty else parent

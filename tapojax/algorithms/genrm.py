"""Training of the generative reward model that judges for FAPO. Ding et al., arXiv 2510.22543, eq. 7.

Differs from DAPO without dynamic sampling: the reward, ±1 for seeing whether a solution has a wrong step, minus the
relative distance to it where critique and label both have one. `scores["correct"]`: they agree on whether.
"""

from typing import Any

from tapojax import shaping
from tapojax.algorithms.dapo import dapo, overlong
from tapojax.types import Algorithm


def genrm(
    *,
    group_size: int,
    max_tokens: int,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float = 10.0,
    dynamic_sampling: bool = False,
    token_mean: bool = True,
    overlong_buffer: int = 0,
    overlong_factor: float = 1.0,
) -> Algorithm:
    """All knobs are DAPO's."""
    clip: dict[str, Any] = dict(clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    knobs = clip | dict(token_mean=token_mean, overlong_buffer=overlong_buffer, overlong_factor=overlong_factor)
    parent = dapo(group_size=group_size, max_tokens=max_tokens, dynamic_sampling=dynamic_sampling, **knobs)

    def rewards(scores, rollout, step):
        shaped = shaping.genrm_reward(scores["predicted"], scores["label"], scores["num_steps"])
        return shaped + overlong(rollout, max_tokens, overlong_buffer, overlong_factor)

    # not "predicted": NaN there is a critique without a legible verdict, worth -1, and not a row that was not scored
    return parent._replace(needs=parent.needs | {"label", "num_steps"}, rewards=rewards)

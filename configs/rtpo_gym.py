"""RTPO on the gym: problems beyond what the policy can solve, with part of the worked solution given away at first.

    python -m launch.train --config=configs/rtpo_gym.py
    python -m launch.compare --config=configs/rtpo_gym.py --workdir=runs/rtpo_gym

RTPO, after a TRL branch of 2025. The warm start teaches a bad habit: 94 % of the columns of a sum are one too high,
so one completion in 80,000 gets four columns right. Hints leave first the answer to write, then one column, then two.
`:quicktest` runs in seconds and shows nothing.
"""

from configs import base, quickstart

VARIANTS = {
    "rtpo": "hints that shrink to nothing",
    "grpo": "no hints",
}


def get_config(mode: str = ""):
    variant = base.choose("rtpo_gym", mode, VARIANTS)
    c = quickstart.get_config("quicktest" if mode == "quicktest" else "")
    c.algorithm = base.get_config(algorithm=variant).algorithm
    c.task.scratchpad, c.task.slips = 1.0, 0.94
    c.task.levels = c.task.evaluation_levels = (4,)
    c.sampling.max_prompt_tokens = 46  # 10 of the problem and 36 of the columns
    c.sampling.max_tokens = 42
    if mode != "quicktest":
        c.steps = 60
    return c

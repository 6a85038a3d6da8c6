"""RTPO on the gym: problems beyond what the policy can solve, with part of the worked solution given away at first.

    python -m launch.train --config=configs/rtpo_gym.py
    python -m launch.compare --config=configs/rtpo_gym.py --workdir=runs/rtpo_gym
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
    c.task.scratchpad, c.task.slips = 1.0, 0.9
    c.task.levels = c.task.evaluation_levels = (4,)
    c.sampling.max_prompt_tokens = 46  # 10 of the problem and 36 of the columns
    c.sampling.max_tokens = 42
    if mode != "quicktest":
        c.steps = 60
    return c

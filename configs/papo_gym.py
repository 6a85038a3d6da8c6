"""PAPO on the gym: does the reasoning go on improving once the answers are right? Variants after the colon.

    python -m launch.train --config=configs/papo_gym.py
    python -m launch.compare --config=configs/papo_gym.py --workdir=runs/papo_gym

Tan et al., arXiv 2603.26535. The process score is the gym's exact step checker. Demonstrations work step by step, but
most of them with a wrong step before a right answer, as a model does that has learned answers better than reasons.
`:quicktest` runs in seconds and shows nothing.
"""

from configs import base, quickstart

VARIANTS = {
    "papo": "outcome and process advantages, decoupled",
    "process": "process rewards only",
    "multiplicative": "outcome times process as the reward",
    "full_norm": "process advantages normalised over the whole group",
    "outcome": "outcome rewards only: the parent",
}


def get_config(mode: str = ""):
    variant = base.choose("papo_gym", mode, VARIANTS)
    c = quickstart.get_config("quicktest" if mode == "quicktest" else "")
    c.algorithm = base.get_config(algorithm="papo").algorithm
    c.algorithm.signal = "decoupled" if variant == "papo" else variant
    c.task.scratchpad, c.task.flaws = 1.0, 0.7
    c.optimizer.learning_rate = 5e-4
    if mode != "quicktest":
        c.steps, c.evaluation.every = 60, 10
    return c

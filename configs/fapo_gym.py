"""FAPO on the gym: do the steps become right, not only the answers? Variants after the colon.

    python -m launch.train --config=configs/fapo_gym.py
    python -m launch.compare --config=configs/fapo_gym.py --variants=fapo,dapo --workdir=runs/fapo_gym

Ding et al., arXiv 2510.22543. Demonstrations work step by step, most of them with a wrong step before a right answer.
fapo_genrm needs the judge that configs/genrm_gym.py trains, in runs/genrm_gym or where --config.judge.workdir says; the
true share of flawed solutions is then `flawed_exact`. `:quicktest` runs in seconds and shows nothing.
"""

from configs import base, quickstart

VARIANTS = {
    "fapo": "flawed solutions found by the gym's exact step checker",
    "fapo_genrm": "flawed solutions found by a generative reward model",
    "dapo": "the parent: a right answer is a right answer",
}


def get_config(mode: str = ""):
    variant = base.choose("fapo_gym", mode, VARIANTS)
    c = quickstart.get_config("quicktest" if mode == "quicktest" else "")
    c.algorithm = base.get_config(algorithm="fapo").algorithm
    if variant == "dapo":
        c.algorithm.flaw_penalty = 0.0  # FAPO's neutral value
    if variant == "fapo_genrm":
        c.judge = base.get_config(judge="critic").judge
        c.judge.workdir = "runs/genrm_gym"
        c.reward.overlap = False  # the judge takes turns with the sampler on the same device
    c.task.scratchpad, c.task.flaws = 1.0, 0.7
    c.optimizer.learning_rate = 5e-4
    if mode != "quicktest":
        c.steps, c.evaluation.every = 60, 10
    return c

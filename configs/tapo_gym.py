"""TAPO on the gym: problems that are solved always or never, where group-relative rewards say nothing. Variants after
the colon.

    python -m launch.train --config=configs/tapo_gym.py
    python -m launch.compare --config=configs/tapo_gym.py --workdir=runs/tapo_gym

Jiang et al., AAAI 2026. The warm start knows sums of one and two digits; training and evaluation add sums of three
digits. Teachers are the worked solutions of the training problems. `:quicktest` runs in seconds and shows nothing.
"""

from configs import base, quickstart

VARIANTS = {
    "tapo": "all four parts",
    "no_dti": "without teacher injection",
    "no_pai": "without perturbed answers",
    "no_ali": "injected rows enter the group statistics instead of getting fixed advantages",
    "no_infolen": "without the InfoLen reward",
    "dapo": "the parent with dynamic sampling",
    "grpo": "no dynamic sampling either",
}


def get_config(mode: str = ""):
    variant = base.choose("tapo_gym", mode, VARIANTS)
    c = quickstart.get_config("quicktest" if mode == "quicktest" else "")
    c.algorithm = base.get_config(algorithm=variant if variant in ("dapo", "grpo") else "tapo").algorithm
    if "wrong_advantage" in c.algorithm:
        c.algorithm.wrong_advantage = -0.2  # of -0.5 and -0.2
    if variant.startswith("no_"):
        c.algorithm[f"use_{variant.removeprefix('no_')}"] = False
    c.task.scratchpad = 1.0
    c.task.warm_levels = (1, 2)
    c.task.levels, c.task.evaluation_levels = (2, 3, 3), (2, 3)
    c.sampling.max_tokens = 36
    c.optimizer.learning_rate = 2e-4 if variant in ("dapo", "grpo") else 1.5e-3  # each the better of the two
    if mode != "quicktest":
        c.steps = 12 if variant == "dapo" else 120  # dynamic sampling takes many rollouts a step
        c.evaluation.every = 1 if variant == "dapo" else 10
        c.collect.max_rounds = 200
    return c

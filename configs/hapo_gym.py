"""HAPO on the gym: entropy and accuracy beside DAPO, part by part. Variants after the colon, the first is the default.

    python -m launch.train --config=configs/hapo_gym.py
    python -m launch.compare --config=configs/hapo_gym.py --workdir=runs/hapo_gym

HAPO, arXiv 2509.16591. The quick start's problem and warm start, with eight updates a rollout batch, without which no
ratio leaves 1 and neither clipping nor redistribution acts. No variant differs from DAPO here; the
README says why. `:quicktest` runs in seconds and shows nothing.
"""

from configs import base, quickstart

VARIANTS = {
    "hapo": "all four parts",
    "released": "all four parts, with the released normaliser's sign slip",
    "no_temperature": "without adaptive temperature",
    "no_average": "without token-level group average",
    "no_redistribution": "without differential redistribution",
    "no_clip": "without asymmetric adaptive clipping",
    "forking": "comparator: DAPO on the 20 % of tokens of highest entropy",
    "archer": "comparator: two clip ranges and KL by token entropy",
    "edge_grpo": "comparator: advantages scaled by response entropy",
    "dapo": "the parent: all four parts off",
}
KNOBS: dict[str, dict] = {
    "released": {"signed": False},
    "no_temperature": {"temperature_strength": 0.0},
    "no_average": {"group_average": False},
    "no_redistribution": {"redistribution": 0.0},
    "no_clip": {"clip_strength": 0.0},
    "forking": {"dynamic_sampling": False},
    "archer": {"dynamic_sampling": False},
    "dapo": {"temperature_strength": 0.0, "group_average": False, "redistribution": 0.0, "clip_strength": 0.0},
}


def get_config(mode: str = ""):
    variant = base.choose("hapo_gym", mode, VARIANTS)
    algorithm = variant if variant in ("forking", "archer", "edge_grpo") else "hapo"
    c = quickstart.get_config("quicktest" if mode == "quicktest" else "")
    c.algorithm = base.get_config(algorithm=algorithm).algorithm
    c.train.minibatches = 8
    c.optimizer.learning_rate = 3e-4
    c.algorithm.update(KNOBS.get(variant, {}))
    return c

"""FAPO's generative reward model on the gym: critiques of two-digit sums, half of them with a wrong step.

    python -m launch.train --config=configs/genrm_gym.py --workdir=runs/genrm_gym

Ding et al., arXiv 2510.22543. Variants after the colon. pass@1 is the share of solutions rightly called flawed or not.
configs/fapo_gym.py:fapo_genrm takes the run's folder as its judge. `:quicktest` runs in seconds and shows nothing.
"""

from configs import base, quickstart

VARIANTS = {
    "genrm": "the reward also asks where the first wrong step is",
    "outcome": "the reward only asks whether there is one",
}


def get_config(mode: str = ""):
    variant = base.choose("genrm_gym", mode, VARIANTS)
    c = quickstart.get_config("quicktest" if mode == "quicktest" else "")
    fresh = base.get_config(algorithm="genrm" if variant == "genrm" else "dapo", task="critiques")
    fresh.task.evaluation_size = c.task.evaluation_size
    c.algorithm, c.task = fresh.algorithm, fresh.task
    c.algorithm.dual_clip, c.algorithm.dynamic_sampling = 10.0, False
    c.task.scratchpad = 0.7
    c.sampling.max_prompt_tokens, c.sampling.max_tokens = 28, 22
    c.sft.batch_size = 32
    c.optimizer.learning_rate = 3e-4
    c.evaluation.every = 10
    if mode != "quicktest":
        c.sft.updates = 1200
    return c

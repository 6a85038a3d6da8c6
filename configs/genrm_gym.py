"""FAPO's generative reward model on the gym: critiques of two-digit sums, half of them with a wrong step.

    python -m launch.train --config=configs/genrm_gym.py --workdir=runs/genrm_gym

Ding et al., arXiv 2510.22543. pass@1 is the share of solutions rightly called flawed or not. The run's folder is the
judge of configs/fapo_gym.py:fapo_genrm. `:quicktest` runs in seconds and shows nothing.
"""

from configs import base, quickstart


def get_config(mode: str = ""):
    if mode not in ("", "quicktest"):
        raise ValueError(f"configs/genrm_gym.py:{mode} is unknown: leave it out or say :quicktest")
    c = quickstart.get_config(mode)
    fresh = base.get_config(algorithm="genrm", task="critiques")
    fresh.task.evaluation_size = c.task.evaluation_size
    c.algorithm, c.task = fresh.algorithm, fresh.task
    c.task.scratchpad = 0.7
    c.sampling.max_prompt_tokens = 28  # 6 of the problem, 21 of the solution and its end
    c.sampling.max_tokens = 22
    c.sft.batch_size = 32
    c.optimizer.learning_rate = 5e-4
    c.evaluation.every = 10
    if mode != "quicktest":
        c.sft.updates = 1200
    return c

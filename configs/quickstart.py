"""Two-digit addition on a laptop: a warm start from sloppy demonstrations, then GRPO.

    python -m launch.train --config=configs/quickstart.py

Shao et al., arXiv 2402.03300. 0.56 M parameters, 2 CPU cores, about 1 minute. The demonstrators mostly blurt out an
answer, often a wrong one; 40 % of them work digit by digit. Reinforcement finds that working pays: held-out pass@1
rises from about .3 to above .8 while completions grow to twice their length.

`:gspo` or another name of the algorithm table trains with that one. `:quicktest` runs all of it in well under a
minute, too short to learn much.
"""

from configs import base
from tapojax.algorithms import ALGORITHMS


def get_config(mode: str = ""):
    c = base.get_config(algorithm=mode if mode in ALGORITHMS else "grpo", task="arithmetic")
    c.steps = 40
    c.prompts_per_step = 16
    c.group_size = 8

    c.task.levels = (2,)
    c.task.evaluation_levels = (2,)
    c.sampling.max_prompt_tokens = 8
    c.sampling.max_tokens = 24

    c.optimizer.learning_rate = 2e-4
    c.optimizer.warmup_updates = 5
    c.optimizer.schedule = "linear"
    c.optimizer.end_fraction = 0.1
    c.optimizer.b2 = 0.95

    c.sft.updates = 300
    c.sft.learning_rate = 4e-3

    c.evaluation.every = 5
    if mode == "quicktest":
        c.steps, c.task.evaluation_size, c.sft.updates, c.sft.warmup_updates = 3, 32, 20, 5
    elif mode and mode not in ALGORITHMS:
        raise ValueError(f"configs/quickstart.py:{mode} is unknown: say :quicktest or one of {sorted(ALGORITHMS)}")
    return c

"""FAPO's generative reward model, its own setting. Ding et al., arXiv 2510.22543. Model: Qwen3-4B-Instruct-2507.

    python -m launch.train --config=configs/genrm_math.py --workdir=runs/genrm --config.model.path=Qwen3-4B-Instruct \
        --config.task.tokenizer_path=Qwen3-4B-Instruct --config.task.train_path=data/fapo_critic/train.jsonl \
        --config.task.evaluation_path=data/fapo_critic/test.jsonl --config.mesh.fsdp=8

Rows: a problem, the steps of a solution, the index of the first wrong one (-1: none); FAPO-Critic-85K and ProcessBench
are such data. The paper takes an early checkpoint, whose critiques are short. pass@1 is the share of solutions rightly
called flawed or not, critic_f1 and critic_process_f1 are FlawedPositiveBench's and ProcessBench's.

Published, FlawedPositiveBench F1 and ProcessBench F1: before 81.2, 77.1; after 89.4, 83.3. Cost: not measured by us.
Paper and code disagree: "no error" is +inf in the paper, -1 in data and code (and here).
"""

from configs import base, large

MODES = ("qwen3-4b",)


def get_config(mode: str = ""):
    base.choose("genrm_math", mode, MODES)
    c = large.get_config(
        algorithm="genrm",
        task="critique_files",
        prompts=512,
        group_size=16,
        prompt_tokens=5120,
        max_tokens=8192,
        updates=16,
    )
    c.steps = 500
    c.algorithm.overlong_buffer = 4096
    c.sampling.temperature = 1.2
    c.optimizer.warmup_updates, c.optimizer.weight_decay = 10, 0.1
    c.evaluation.temperature, c.evaluation.top_p = 0.6, 0.95
    return large.shrink(c, mode)

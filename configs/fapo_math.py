"""FAPO's own setting. arXiv 2510.22543. Modes: 7b (Qwen2.5-Math-7B), 32b (Qwen2.5-32B).

    python -m launch.train --config=configs/fapo_math.py:7b --workdir=runs/fapo-7b --config.model.path=Qwen2.5-Math-7B \
        --config.task.tokenizer_path=Qwen2.5-Math-7B --config.task.train_path=data/dapo/train.jsonl \
        --config.task.evaluation_path=data/aime24/test.jsonl --config.mesh.fsdp=32

Flaws are found by a generative reward model behind vLLM servers, named `genrm` there: configs/genrm_math.py trains
one, docs/judges.md serves it, and --config.judge.endpoint.addresses names the replicas. The baseline is the same config
with --config.algorithm.flaw_penalty=0, which asks it for the number only.

Published, 32b, baseline -> FAPO: AIME24 38.9 -> 42.4, AIME25 29.5 -> 33.5, AMC 85.0 -> 91.6, MATH 72.8 -> 74.6; flawed
share of right AIME24 answers 15.5 -> 7.1 %. Cost in the paper: 64 GPUs and 8 for the judge; not measured by us.

Paper and code disagree: the judge reads indexed steps (paper) or the raw response (code); population std in the theory
against ddof 1 (here); the printed penalties of the ablation are 1 - lambda; the loss has a dual clip of 10 (here).
"""

from configs import base, large

MODES = {"7b": (8192, 200), "32b": (20_480, 500)}


def get_config(mode: str = ""):
    max_tokens, steps = MODES[base.choose("fapo_math", mode, MODES)]
    c = large.get_config(
        algorithm="fapo", prompts=512, group_size=8, prompt_tokens=2048, max_tokens=max_tokens, updates=16
    )
    c.judge = base.get_config(judge="genrm").judge
    c.judge.endpoint.timeout_s = 600.0  # a critique has thousands of tokens
    c.reward.deadline_s = 2400.0  # over reward servers: three tries of a question, and the wait for a replica
    c.steps = steps
    c.algorithm.overlong_buffer = 4096
    c.optimizer.warmup_updates, c.optimizer.weight_decay = 10, 0.1
    c.evaluation.samples, c.evaluation.top_p = 32, 0.7
    return large.shrink(c, mode)

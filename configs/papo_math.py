"""PAPO's own setting. Tan et al., arXiv 2603.26535. Modes: 7b, 3b, 14b (Qwen2.5 base), qwen3-4b (base, with overlong).

    python -m launch.train --config=configs/papo_math.py:7b --workdir=runs/papo-7b --config.model.path=Qwen2.5-7B \
        --config.task.tokenizer_path=Qwen2.5-7B --config.task.train_path=data/papo/train.jsonl \
        --config.task.evaluation_path=data/olympiadbench/test.jsonl --config.mesh.fsdp=8

The process score is the mark of a rubric judge, as in the paper GPT-OSS-20B: docs/judges.md starts it here,
--config.judge.endpoint.addresses says where else. Data: 20k problems of NuminaMath-1.5 in five pass-rate tiers, with
reference solutions.

Published, OlympiadBench avg@4, outcome rewards only -> PAPO: 3b 35.3 -> 38.6, 7b 46.3 -> 51.3, 14b 54.3 -> 59.8,
qwen3-4b 55.0 -> 61.1 (maxima over checkpoints, by the logged evaluations). Cost: not measured by us.

Paper and code disagree: clip 0.2 against 0.2/0.28 (here the code's), sequence mean against token mean (here the
code's), 8 epochs against 7; the full-normalisation ablation ran with process_weight 0.6 against 1.0 of PAPO.
"""

from configs import base, large

MODES = {"7b": 0, "3b": 0, "14b": 0, "qwen3-4b": 4096}


def get_config(mode: str = ""):
    overlong_buffer = MODES[base.choose("papo_math", mode, MODES)]
    c = large.get_config(algorithm="papo", prompts=128, group_size=8, prompt_tokens=2048, max_tokens=8192, updates=4)
    c.judge = base.get_config(judge="rubric").judge
    c.reward.deadline_s = 600.0  # over reward servers: three tries of a question, and the wait for a replica
    c.steps = 1093  # seven passes
    c.algorithm.overlong_buffer = overlong_buffer
    c.optimizer.weight_decay = 0.01
    c.evaluation.samples, c.evaluation.temperature = 4, 0.7
    return large.shrink(c, mode)

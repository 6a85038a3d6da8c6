"""HAPO's own setting. arXiv 2509.16591. Modes: 1.5b, 7b (Qwen2.5-Math), qwen3-8b, qwen3-14b (base models).

    python -m launch.train --config=configs/hapo_math.py:7b --workdir=runs/hapo-7b --config.model.path=Qwen2.5-Math-7B \
        --config.task.tokenizer_path=Qwen2.5-Math-7B --config.task.train_path=data/dapo/train.jsonl \
        --config.task.evaluation_path=data/aime24/test.jsonl --config.mesh.fsdp=32

Published, mean of AIME24, AIME25, AMC, MATH500, OlympiadBench, Minerva at avg@8, DAPO -> HAPO: 1.5b 38.3 -> 40.6, 7b
47.0 -> 50.0, qwen3-8b 50.0 -> 52.0, qwen3-14b 58.1 -> 62.1. Cost: 32 A100 in the paper; not measured by us.

Paper and released code disagree: clip 0.2/0.28 against 0.2/0.2 (here the code's), temperature strength 0.1 on a raw
z-score against 0.05 on the bounded signal (here the code's), a signal in [-1, 1] against a sign slip (here the
paper's; algorithm.signed=False is the code's). The models need a longer max_position than their first release.
"""

from configs import base, large

MODES = {"1.5b": 10_240, "7b": 10_240, "qwen3-8b": 12_288, "qwen3-14b": 12_288}


def get_config(mode: str = ""):
    max_tokens = MODES[base.choose("hapo_math", mode, MODES)]
    c = large.get_config(
        algorithm="hapo", prompts=512, group_size=16, prompt_tokens=1024, max_tokens=max_tokens, updates=16
    )
    c.steps = 34  # one pass over 17k problems
    c.algorithm.overlong_buffer = 4096  # the authors: switch it off if completions collapse
    c.optimizer.warmup_updates, c.optimizer.weight_decay = 10, 0.1
    c.evaluation.every, c.evaluation.samples = 5, 8
    c.evaluation.temperature, c.evaluation.top_p = 0.5, 0.7
    return large.shrink(c, mode)

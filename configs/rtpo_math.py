"""RTPO on worked mathematics. No paper: the method is known from an unmerged TRL branch and the avr repository (2025).

    python -m launch.train --config=configs/rtpo_math.py --workdir=runs/rtpo --config.model.path=Qwen2.5-3B \
        --config.task.tokenizer_path=Qwen2.5-3B --config.task.train_path=data/math/train.jsonl \
        --config.task.evaluation_path=data/math500/test.jsonl --config.mesh.fsdp=8

The published run trains Qwen2.5-VL-3B with LoRA on VisuRiddles (images; rank 8, learning rate 5e-5, 3 epochs) and gives
no numbers, only that reasoning gets shorter. Here: text, full parameters, worked solutions of GSM8K or MATH as hints.
From the run: G = 8, clip 0.2, cosine annealing, top_k 20. Its schedule never ran as meant: without max_steps the full
hint is used at step 0 and none afterwards. Our choice: anneal over the first 80 % of the steps. Cost: not measured.
"""

from configs import base, large

MODES = ("qwen2.5-3b",)


def get_config(mode: str = ""):
    base.choose("rtpo_math", mode, MODES)
    c = large.get_config(algorithm="rtpo", prompts=64, group_size=8, prompt_tokens=2048, max_tokens=2048)
    c.steps = 300
    c.algorithm.schedule = "cosine"
    c.sampling.top_k = 20
    c.optimizer.warmup_updates = 15
    c.evaluation.every, c.evaluation.temperature = 50, 0.7
    return large.shrink(c, mode)

"""TAPO on competition mathematics. Jiang et al., AAAI 2026. Model: DeepSeek-R1-Distill-Qwen-1.5B.

    python -m launch.train --config=configs/tapo_math.py --workdir=runs/tapo \
        --config.model.path=DeepSeek-R1-Distill-Qwen-1.5B --config.task.tokenizer_path=DeepSeek-R1-Distill-Qwen-1.5B \
        --config.task.train_path=data/math/train.jsonl --config.task.evaluation_path=data/aime24/test.jsonl \
        --config.mesh.fsdp=4

Known of the paper: the model, 4 RTX 4090, and AIME24 pass@1 of 28.9 (base), 34.3 (GRPO), 44.3 (TAPO). Data, batch,
lengths, learning rate and every coefficient are unpublished: those below are our choice. Teachers: worked solutions of
the data, and completions of a stronger model that `launch.teach` collects (task.teacher_path).
Cost: not measured by us.
"""

from configs import base, large

MODES = ("1.5b",)


def get_config(mode: str = ""):
    base.choose("tapo_math", mode, MODES)
    c = large.get_config(algorithm="tapo", prompts=128, group_size=8, prompt_tokens=1024, max_tokens=8192, updates=4)
    c.steps = 300
    c.optimizer.weight_decay = 0.01
    c.evaluation.samples, c.evaluation.temperature, c.evaluation.top_p = 8, 0.6, 0.95
    return large.shrink(c, mode)

"""GRPO on GSM8K with a real model and tokenizer.

    hf download Qwen/Qwen2.5-Math-1.5B --local-dir Qwen2.5-Math-1.5B
    python -m launch.prepare_data --dataset=gsm8k --output=data/gsm8k
    python -m launch.train --config=configs/gsm8k.py --config.model.path=Qwen2.5-Math-1.5B \
        --config.task.tokenizer_path=Qwen2.5-Math-1.5B --config.task.train_path=data/gsm8k/train.jsonl \
        --config.task.evaluation_path=data/gsm8k/test.jsonl

Cobbe et al., arXiv 2110.14168 (data); Shao et al., arXiv 2402.03300 (GRPO). Files of other problems do as well, as they
are published (docs/data.md). Cost: not measured by us; the defaults are meant for one accelerator with 80 GB or a small
slice with mesh.fsdp set to its size. `:quicktest` shrinks lengths and batches until a tiny random checkpoint runs in a
minute on a laptop: it proves the path, not the method.
"""

from configs import base


def get_config(mode: str = ""):
    c = base.get_config(algorithm="grpo", task="files")
    c.steps = 200
    c.prompts_per_step = 64
    c.group_size = 8

    c.task.overlong_prompts = "drop"
    c.model.dtype = "bfloat16"
    c.model.remat = "nothing_saveable"
    c.model.unroll = False
    c.sampling.max_prompt_tokens = 384
    c.sampling.max_tokens = 1024
    c.sampling.dtype = "bfloat16"

    c.optimizer.learning_rate = 1e-6
    c.optimizer.warmup_updates = 5
    c.optimizer.weight_decay = 0.01
    c.train.minibatches = 2
    c.train.microbatches = 8
    c.train.correction = "token"

    c.evaluation.every = 50
    c.evaluation.samples = 1
    if mode == "quicktest":
        c.steps, c.prompts_per_step, c.group_size = 2, 4, 2
        c.sampling.max_tokens, c.train.microbatches = 16, 2
        c.model.dtype = c.sampling.dtype = "float32"
        c.evaluation.batch_prompts = 4
    elif mode:
        raise ValueError(f"configs/gsm8k.py:{mode} is unknown: leave it out or say :quicktest")
    return c

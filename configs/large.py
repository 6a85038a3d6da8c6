"""What runs on real models share: files of problems, bfloat16, no activations kept. The papers' configs start from it.

Give `model.path` and `task.tokenizer_path` (a Hugging Face folder) and the data paths on the command line. A
micro-batch holds 8 rows; set `mesh.fsdp` to the number of chips, and `train.microbatches` so that one fits the memory.
"""

from configs import base


def get_config(
    *,
    algorithm: str,
    prompts: int,
    group_size: int,
    prompt_tokens: int,
    max_tokens: int,
    updates: int = 1,
    task: str = "files",
):
    """`updates` optimizer steps a rollout batch of prompts x group_size rows."""
    c = base.get_config(algorithm=algorithm, task=task)
    c.prompts_per_step, c.group_size = prompts, group_size
    c.task.overlong_prompts = "drop"
    c.sampling.max_prompt_tokens, c.sampling.max_tokens = prompt_tokens, max_tokens
    c.model.dtype = c.sampling.dtype = "bfloat16"
    c.model.remat, c.model.unroll = "nothing_saveable", False
    c.optimizer.learning_rate = 1e-6
    c.train.minibatches = updates
    c.train.microbatches = max(prompts * group_size // updates // 8, 1)
    c.evaluation.every, c.checkpoint.every = 10, 10
    return c


def shrink(c, mode: str):
    """`:quicktest`: the same path on a tiny checkpoint in a minute; it proves the path, not the method."""
    if mode == "quicktest":
        c.steps, c.prompts_per_step, c.group_size = 2, 4, 2
        c.sampling.max_prompt_tokens = min(c.sampling.max_prompt_tokens, 384)
        c.sampling.max_tokens, c.train.minibatches, c.train.microbatches = 16, 1, 2
        c.model.dtype = c.sampling.dtype = "float32"
        c.evaluation.samples, c.evaluation.batch_prompts = 1, 4
        if "overlong_buffer" in c.algorithm:
            c.algorithm.overlong_buffer = min(c.algorithm.overlong_buffer, 8)
    return c

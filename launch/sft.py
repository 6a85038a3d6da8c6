"""Supervised warm start: the policy that reinforcement starts from, made by the same train step.

    python -m launch.sft --config=configs/quickstart.py --workdir=runs/warm

leaves it in <workdir>/initial, where `launch.train` with the same --workdir finds it. `launch.train` does this step by
itself when sft.updates > 0.
"""

from pathlib import Path

import jax
import numpy as np

from launch import build, cli
from tapojax import checkpoint, policy, sharding, train_step
from tapojax.algorithms import sft
from tapojax.models.config import DecoderConfig
from tapojax.tasks import order
from tapojax.types import Task


def initial_policy(config, model: DecoderConfig, task: Task, mesh, workdir: Path):
    """Parameters that training starts from and a KL term refers to; made once, then read from <workdir>/initial."""
    manager = checkpoint.open_manager(workdir / "initial")
    params = build.initial_params(config.model, model, mesh, jax.random.key(config.seed))
    restored = checkpoint.restore_newest(manager, checkpoint.abstract(params))
    if restored is not None:
        return restored[1]
    if config.sft.updates:
        params = warm_start(config, model, task, mesh, params)
    checkpoint.save(manager, 0, params, {"sft_updates": config.sft.updates})
    return params


def warm_start(config, model: DecoderConfig, task: Task, mesh, params):
    """Imitates the task's demonstrations for sft.updates updates.

    Raises:
      ValueError: the task has no demonstrations.
    """
    demonstration = task.demonstration
    if demonstration is None:
        raise ValueError(f"task {config.task.name!r} has no demonstrations: set sft.updates=0")
    optimizer = build.warm_start_optimizer(config.sft)
    algorithm = sft.sft()
    score = policy.make_score(
        model, max_scored=config.sampling.max_tokens, max_logit_bytes=config.train.max_logit_bytes
    )
    state = build.fresh_state(algorithm, optimizer, params, mesh)
    step_fn = jax.jit(train_step.make_train_step(score, algorithm, optimizer), donate_argnums=0)
    examples = task.train if task.warm_start is None else task.warm_start
    batches = order.batches(examples, batch_size=config.sft.batch_size, seed=config.seed)
    rng = np.random.default_rng(config.seed)
    for update in range(config.sft.updates):
        tokens, mask = demonstrations(next(batches), task, demonstration, rng, config.sampling)
        state, metrics = step_fn(state, sharding.shard_batch(sft.make_batch(tokens, mask), mesh))
        if (update + 1) % 50 == 0 or update + 1 == config.sft.updates:
            loss, entropy = float(metrics["loss"]), float(metrics["entropy"])
            print(f"warm start {update + 1}/{config.sft.updates}  loss {loss:.3f}  entropy {entropy:.3f}", flush=True)
    return state.params


def demonstrations(examples, task: Task, demonstration, rng: np.random.Generator, budget):
    """Rows [B, T] of prompt, demonstration and end token, and the mask of the latter two.

    Raises:
      ValueError: a demonstration longer than sampling.max_tokens; cut off, it would teach never to end.
    """
    length = budget.max_prompt_tokens + budget.max_tokens
    tokens = np.full((len(examples), length), task.tokenizer.pad_token_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, row_mask, example in zip(tokens, mask, examples, strict=True):
        prompt = task.prompt(example)
        text = demonstration(example, rng)
        completion = [*task.tokenizer.encode(text, add_special_tokens=False), task.tokenizer.eos_token_id]
        if len(completion) > budget.max_tokens:
            raise ValueError(
                f"the demonstration of {example['id']!r} has {len(completion)} tokens, sampling.max_tokens is "
                f"{budget.max_tokens}: raise it, or leave such examples out"
            )
        row[: len(prompt) + len(completion)] = prompt + completion
        row_mask[len(prompt) : len(prompt) + len(completion)] = True
    return tokens, mask


def main():
    config = cli.checked_config()
    workdir = cli.workdir()
    cli.write_config(config, workdir)
    mesh, task = sharding.make_mesh(**config.mesh), build.problems(config)
    with jax.set_mesh(mesh):
        initial_policy(config, build.model(config.model, task.tokenizer), task, mesh, workdir)
    print(f"initial policy in {workdir / 'initial'}; train with the same config and --workdir={workdir}")


if __name__ == "__main__":
    cli.run(main)

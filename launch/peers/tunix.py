"""Tunix's side of `launch.benchmark`: GRPOLearner with its own ("vanilla") sampler, in JAX on the CPU.

    python -m launch.peers.tunix JOB RESULT

Runs in a Python of its own, which needs nothing of ours. Written for google-tunix 0.1.7.
"""

import functools
import logging
from collections.abc import Callable
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.qwen3 import model as qwen3
from tunix.rl import algo_core, common, rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

from launch.peers import workload

FAR = 10**6  # steps: never
TOKENIZER = SimpleNamespace(
    encode=lambda text, **options: workload.tokens(text),
    decode=lambda tokens, **options: workload.text(tokens),
    pad_id=lambda: workload.PAD,
    eos_id=lambda: workload.EOS,
    bos_id=lambda: None,
)


def make_mesh():
    return jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def model(job: workload.Job) -> qwen3.Qwen3:
    size = job.model
    config = qwen3.ModelConfig(
        num_layers=size.num_layers,
        vocab_size=size.vocab_size,
        embed_dim=size.hidden_size,
        hidden_dim=size.intermediate_size,
        num_heads=size.num_heads,
        num_kv_heads=size.num_kv_heads,
        head_dim=size.head_dim,
        rope_theta=workload.ROPE_THETA,
        norm_eps=workload.NORM_EPS,
        use_tied_embedding=True,
    )
    with make_mesh():
        return qwen3.Qwen3(config, rngs=nnx.Rngs(params=0))


def started(job: workload.Job):
    """(watch, cluster, learner); the watch starts between the models and the optimizer's state."""
    actor, reference = model(job), model(job) if job.kl_coef else None
    watch, mesh = workload.Stopwatch(job), make_mesh()
    cluster = rl_cluster.RLCluster(
        actor=actor,
        reference=reference,
        tokenizer=TOKENIZER,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(
                (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT), mesh
            ),
            rollout_engine="vanilla",
            offload_to_cpu=False,
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.chain(
                    optax.clip_by_global_norm(workload.CLIP_NORM),
                    optax.adamw(workload.LEARNING_RATE, weight_decay=0.0),
                ),
                eval_every_n_steps=FAR,
                max_steps=FAR,
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=job.completion_tokens,
                max_prompt_length=job.prompt_tokens,
                kv_cache_size=job.prompt_tokens + job.completion_tokens + 1,
                temperature=1.0,
                top_p=1.0,
                top_k=None,
            ),
        ),
    )
    learner = grpo_learner.GRPOLearner(
        rl_cluster=cluster,
        reward_fns=lambda prompts, completions, **kwargs: [workload.reward(text) for text in completions],
        algo_config=grpo_learner.GRPOConfig(
            num_generations=job.group_size,
            num_iterations=1,
            beta=job.kl_coef,
            epsilon=workload.CLIP_RATIO,
            kl_loss_mode="low_var_kl",  # k3, as ours
        ),
    )
    return watch, cluster, learner


def wait_for_update(cluster):
    """Updates are dispatched, not done, when Tunix returns."""
    jax.block_until_ready(jax.tree.leaves(nnx.state(cluster.actor_trainer.model, nnx.Param)))


def generate(job: workload.Job) -> workload.Stopwatch:
    watch, cluster, _ = started(job)
    prompts = [workload.text(tokens) for tokens in workload.grouped_prompts(job)]
    for _ in watch.repetitions():
        cluster.generate(prompts=prompts)
    return watch


def train(job: workload.Job) -> workload.Stopwatch:
    watch, cluster, _ = started(job)
    prompts, completions = jnp.array(workload.grouped_prompts(job)), jnp.array(workload.completions(job))
    batch = grpo_learner.TrainExample(
        prompt_ids=prompts,
        prompt_mask=prompts != workload.PAD,
        completion_ids=completions,
        completion_mask=completions != workload.PAD,
        advantages=jnp.array(workload.advantages(job)),
        ref_per_token_logps=None,
        old_per_token_logps=None,
    )
    for _ in watch.repetitions():
        cluster.update_actor([batch], None, False)
        wait_for_update(cluster)
    return watch


def step(job: workload.Job) -> workload.Stopwatch:
    """The learner's own loop; a repetition ends when an update is done."""
    watch, cluster, learner = started(job)
    update_actor = cluster.update_actor

    def update_and_lap(*args, **kwargs):
        update_actor(*args, **kwargs)
        wait_for_update(cluster)
        watch.lap()

    cluster.update_actor = update_and_lap
    prompts = np.array([workload.text(tokens) for tokens in workload.prompts(job)])
    learner.train({"prompts": prompts} for _ in range(job.warmup + job.repetitions))
    return watch


def logprobs(job: workload.Job, *, backward: bool = False) -> workload.Stopwatch:
    """Both as its GRPO loss computes them, in one jit."""
    graph, state = nnx.split(model(job))
    prompts, completions = jnp.array(workload.grouped_prompts(job)), jnp.array(workload.completions(job))

    def stats(state, prompts, completions):
        logprobs, logits = common.compute_per_token_logps(
            graph,
            state,
            prompt_tokens=prompts,
            completion_tokens=completions,
            pad_id=workload.PAD,
            eos_id=workload.EOS,
            stop_gradient=not backward,
            return_logits=True,
        )
        return logprobs.mean(), (logprobs, algo_core.compute_entropy_from_logits(logits))

    compute = jax.jit(jax.grad(stats, has_aux=True) if backward else stats)
    watch = workload.Stopwatch(job)
    for _ in watch.repetitions():
        jax.block_until_ready(compute(state, prompts, completions))
    return watch


CASES: dict[str, Callable[..., workload.Stopwatch]] = {
    "generate": generate,
    "train": train,
    "step": step,
    "startup": step,
    "logprobs": logprobs,
    "logprobs_backward": functools.partial(logprobs, backward=True),
}

if __name__ == "__main__":
    logging.disable(logging.INFO)
    workload.main(CASES, ("google-tunix", "jax", "flax", "optax"))

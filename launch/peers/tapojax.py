"""Our side of `launch.benchmark`, through the calls that `launch/train.py` makes.

python -m launch.peers.tapojax JOB RESULT
"""

import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from launch import build
from launch.peers import workload
from tapojax import policy, sharding, train_step
from tapojax.algorithms.grpo import grpo
from tapojax.models.config import DecoderConfig
from tapojax.rollout import collect, local
from tapojax.types import Batch, Prompts, Sampling, Task

OPTIMIZER = SimpleNamespace(
    learning_rate=workload.LEARNING_RATE,
    schedule="constant",
    warmup_updates=0,
    end_fraction=0.0,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    clip_norm=workload.CLIP_NORM,
)
TOKENIZER = SimpleNamespace(decode=lambda tokens, skip_special_tokens: workload.text(tokens))


def model(job: workload.Job, mesh):
    """(config, random parameters)."""
    config = DecoderConfig(
        **vars(job.model),
        rope_theta=workload.ROPE_THETA,
        norm_eps=workload.NORM_EPS,
        qk_norm=True,
        tie_embeddings=True,
        unroll=True,
    )
    return config, build.initial_params(SimpleNamespace(path=""), config, mesh, jax.random.key(0))


def sampler(job: workload.Job, config: DecoderConfig):
    """(engine, sampling); no stop token, so that every row fills its budget."""
    engine = local.local_engine(config, max_prompt_tokens=job.prompt_tokens)
    return engine, Sampling(max_tokens=job.completion_tokens, pad_token_id=workload.PAD)


def trainer(job: workload.Job, config: DecoderConfig, params, mesh):
    """(algorithm, score, state, update), as a run with one update a step has them."""
    algorithm = grpo(
        group_size=job.group_size,
        clip_low=workload.CLIP_RATIO,
        clip_high=workload.CLIP_RATIO,
        kl_coef=job.kl_coef,
    )
    optimizer = build.optimizer(OPTIMIZER, total_updates=job.warmup + job.repetitions)
    score = policy.make_score(config, max_scored=job.completion_tokens)
    update = jax.jit(train_step.make_train_step(score, algorithm, optimizer), donate_argnums=0)
    return algorithm, score, build.fresh_state(algorithm, optimizer, params, mesh), update


def rows(job: workload.Job):
    """(tokens, mask) of given prompts and completions, both [B, T]."""
    tokens = np.concatenate([workload.grouped_prompts(job), workload.completions(job)], axis=1).astype(np.int32)
    return tokens, np.broadcast_to(np.arange(tokens.shape[1]) >= job.prompt_tokens, tokens.shape)


def generate(job: workload.Job, mesh) -> workload.Stopwatch:
    config, params = model(job, mesh)
    engine, sampling = sampler(job, config)
    prompts = Prompts([{"id": i} for i in range(job.prompts)], workload.prompts(job))
    watch = workload.Stopwatch(job)
    weights = engine.load(params, 0)
    for step in watch.repetitions():
        key = jax.random.fold_in(jax.random.key(0), step)
        rollout = engine.generate(weights, prompts, key, group_size=job.group_size, sampling=sampling)
        collect.decode(TOKENIZER, rollout)
        assert rollout.mask.sum() == job.rows * job.completion_tokens
    return watch


def train(job: workload.Job, mesh) -> workload.Stopwatch:
    config, params = model(job, mesh)
    watch = workload.Stopwatch(job)
    _, _, state, update = trainer(job, config, params, mesh)
    tokens, mask = rows(job)
    zeros = np.zeros(tokens.shape, np.float32)
    advantages = np.where(mask, np.array(workload.advantages(job), np.float32)[:, None], 0)
    batch = sharding.shard_batch(Batch(tokens, mask, advantages, zeros, None, None, None, {}), mesh)
    for _ in watch.repetitions():
        state, _ = jax.block_until_ready(update(state, batch))
    return watch


def step(job: workload.Job, mesh) -> workload.Stopwatch:
    """Sample, score, reward, update; as `launch/train.py` without metrics, evaluation and checkpoints."""
    config, params = model(job, mesh)
    reference = jax.tree.map(jnp.copy, params) if job.kl_coef else None
    watch = workload.Stopwatch(job)
    engine, sampling = sampler(job, config)
    algorithm, score, state, update = trainer(job, config, params, mesh)
    score_rows = jax.jit(score)
    make_batch = jax.jit(functools.partial(train_step.make_batch, algorithm))
    examples = [{"id": i, "tokens": tokens} for i, tokens in enumerate(workload.prompts(job))]
    for number in watch.repetitions():
        part = collect.collect(
            engine,
            engine.load(state.params, number),
            itertools.repeat(examples),
            task(),
            algorithm,
            sampling,
            step=number,
            key=jax.random.fold_in(jax.random.key(0), number),
        )
        rollout, scores = sharding.shard_batch((part.rollout, dict(part.scores)), mesh)
        ref = score_rows(reference, rollout.tokens, rollout.mask).logprobs if reference else None
        batch = make_batch(rollout, scores, number, old_stats=None, ref_logprobs=ref)
        state, _ = jax.block_until_ready(update(state, batch))
    return watch


def task() -> Task:
    """The same prompts every step, rewarded by the words of the completion."""

    def score(examples, completions):
        rewards = np.array([workload.reward(completion) for completion in completions], np.float32)
        return {"correct": rewards}, [None] * len(completions)

    return Task(TOKENIZER, [], [], prompt=lambda example: example["tokens"], score=score, answer=lambda text: None)


def startup(job: workload.Job, mesh) -> workload.Stopwatch:
    import launch.train  # noqa: F401  a real run imports all of it, so the clock counts it

    return step(job, mesh)


def logprobs(job: workload.Job, mesh, *, backward: bool = False) -> workload.Stopwatch:
    """Log-probs and entropies of the completions; backward: and the gradient of the mean log-prob."""
    config, params = model(job, mesh)
    score = policy.make_score(config, max_scored=job.completion_tokens)

    def mean(params, tokens, mask):
        stats = score(params, tokens, mask)
        return jnp.sum(stats.logprobs) / mask.sum(), stats

    compute = jax.jit(jax.grad(mean, has_aux=True) if backward else score)
    tokens, mask = rows(job)
    watch = workload.Stopwatch(job)
    for _ in watch.repetitions():
        jax.block_until_ready(compute(params, tokens, mask))
    return watch


def matmul(job: workload.Job, mesh) -> workload.Stopwatch:
    """What the machine gives at the moment: one square product of float32."""
    x = jax.random.normal(jax.random.key(0), (workload.MATMUL_SIZE, workload.MATMUL_SIZE))
    product = jax.jit(jnp.matmul)
    watch = workload.Stopwatch(job)
    for _ in watch.repetitions():
        jax.block_until_ready(product(x, x))
    return watch


CASES = {
    "generate": generate,
    "train": train,
    "step": step,
    "startup": startup,
    "logprobs": logprobs,
    "logprobs_backward": functools.partial(logprobs, backward=True),
    "matmul": matmul,
}


def on_a_mesh(case):
    """Runs a case on a mesh of one device, as a run on one host has it."""

    def run(job: workload.Job) -> workload.Stopwatch:
        mesh = sharding.make_mesh()
        with jax.set_mesh(mesh):
            return case(job, mesh)

    return run


if __name__ == "__main__":
    workload.main({name: on_a_mesh(case) for name, case in CASES.items()}, ("jax", "jaxlib", "flax", "optax"))

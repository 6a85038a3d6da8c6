"""From a scored rollout to a batch, and from a batch to the next TrainState."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tapojax import correction, policy
from tapojax import weights as weights_math
from tapojax.types import Algorithm, Batch, Rollout, Scores, TokenStats, TrainState


def init_state(algorithm: Algorithm, optimizer: optax.GradientTransformation, params) -> TrainState:
    """A fresh state; run it in one jit with out_shardings: optimizer.init by itself would replicate moments."""
    return TrainState(jnp.int32(0), params, optimizer.init(params), algorithm.carry)


def make_batch(
    algorithm: Algorithm,
    rollout: Rollout,
    scores: Scores,
    step,
    *,
    old_stats: TokenStats | None,
    ref_logprobs,
    correct: Callable[..., Any] | None = None,
) -> Batch:
    """Rewards, advantages and signals of a whole rollout batch; group and entropy statistics are taken here, once.

    Rows whose reward is NaN leave the mask. `correct(old_logprobs, behaviour_logprobs, mask)` gives the importance
    weights of the train/rollout mismatch; injected rows (source > 0) keep weight 1. A token of weight 0 is rejected: it
    leaves the loss and stays in the mask, so it counts in the denominators. The others weigh what they did, and the
    ratio of a sequence is that of all its tokens (our choice; verl takes rejected tokens out of the mask).
    """
    rewards = algorithm.rewards(scores, rollout, step)
    rollout = rollout._replace(mask=rollout.mask & ~jnp.isnan(rewards)[:, None])
    importance = None
    if correct is not None:
        assert old_stats is not None, "correcting the mismatch takes old log-probs"
        importance = correct(old_stats.logprobs, rollout.behaviour_logprobs, rollout.mask)
        importance = jnp.where(rollout.source[:, None] > 0, 1.0, importance)
    return Batch(
        tokens=rollout.tokens,
        mask=rollout.mask,
        advantages=algorithm.advantages(rewards, scores, rollout),
        behaviour_logprobs=rollout.behaviour_logprobs,
        old_logprobs=None if old_stats is None else old_stats.logprobs,
        ref_logprobs=ref_logprobs,
        importance=importance,
        signals={} if algorithm.signals is None else algorithm.signals(old_stats, rollout),
        source=rollout.source,
    )


def mismatch(batch: Batch) -> dict[str, Any]:
    """`correction.mismatch` of the sampled rows of a batch that has old log-probs."""
    assert batch.old_logprobs is not None and batch.source is not None
    sampled = batch.mask & jnp.expand_dims(batch.source == 0, 1)
    return correction.mismatch(batch.old_logprobs, batch.behaviour_logprobs, sampled)


def minibatches(batch: Batch, *, count: int, epochs: int, seed: tuple[int, ...]) -> Iterator[Batch]:
    """`count` equal parts of the rows, in a new order each epoch; the whole batch as it is where there is one part."""
    rows = batch.mask.shape[0]
    for epoch in range(epochs):
        if count == 1:
            yield batch
            continue
        order = np.random.default_rng((*seed, epoch)).permutation(rows).reshape(count, -1)
        yield from (jax.tree.map(lambda x, part=part: x[part], batch) for part in order)


def make_train_step(
    score: policy.Score, algorithm: Algorithm, optimizer: optax.GradientTransformation, *, microbatches: int = 1
) -> Callable[[TrainState, Batch], tuple[TrainState, Mapping[str, Any]]]:
    """One optimizer update on one minibatch: loss = sum(weights * importance * per_token), whatever the split.

    The weights are made once, on the whole minibatch, before it is split; gradients of the parts are added in float32.
    An update whose gradient is not finite is skipped: params and optimizer state stay, `nonfinite` says so.
    """

    def objective(params, batch: Batch, weights, token_weights):
        stats = score(params, batch.tokens, batch.mask)
        given = batch.old_logprobs
        old_logprobs = jax.lax.stop_gradient(stats.logprobs) if given is None else given
        per_token, diagnostics = algorithm.loss(stats, batch._replace(old_logprobs=old_logprobs))
        loss = jnp.sum(weights * per_token)
        diagnostics = {
            **diagnostics,
            "entropy": stats.entropies,
            "mismatch_kl": batch.behaviour_logprobs - old_logprobs,
            "update_kl": old_logprobs - stats.logprobs,
        }
        means = {name: jnp.sum(token_weights * value) for name, value in diagnostics.items()}
        return loss, ({"loss": loss, **means}, old_logprobs)

    gradient = jax.grad(objective, has_aux=True)

    def accumulate(params, batch: Batch):
        token_weights = weights_math.token_mean(batch.mask)
        weights = algorithm.weights(batch.mask)
        if batch.importance is not None:
            weights = weights * batch.importance
        if microbatches == 1:
            gradients, (metrics, old_logprobs) = gradient(params, batch, weights, token_weights)
        else:
            parts = policy.split_rows((batch, weights, token_weights), microbatches)
            first = jax.eval_shape(gradient, params, *jax.tree.map(lambda x: x[0], parts))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (first[0], first[1][0]))

            def add(total, part):
                gradients, (metrics, old_logprobs) = gradient(params, *part)
                return jax.tree.map(jnp.add, total, (gradients, metrics)), old_logprobs

            (gradients, metrics), old_logprobs = jax.lax.scan(add, zeros, parts)
            old_logprobs = policy.join_rows(old_logprobs)
        if batch.old_logprobs is None and batch.source is not None:  # else the caller knows them before the update
            metrics |= mismatch(batch._replace(old_logprobs=old_logprobs))
        return gradients, metrics

    def train_step(state: TrainState, batch: Batch):
        gradients, metrics = accumulate(state.params, batch)
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])

        def update(gradients):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            return optax.apply_updates(state.params, updates), opt_state

        params, opt_state = jax.lax.cond(finite, update, lambda _: (state.params, state.opt_state), gradients)
        state = state._replace(step=state.step + finite, params=params, opt_state=opt_state)
        return state, {**metrics, "gradient_norm": norm, "nonfinite": 1.0 - finite}

    return train_step

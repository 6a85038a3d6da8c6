"""The promises every algorithm keeps, as functions that fail. The suite runs them over the whole table, and over
mutants that must each break one."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from launch import build
from tapojax import policy, sharding, train_step
from tapojax.models import decoder
from tapojax.models.config import DecoderConfig
from tapojax.types import Algorithm, Rollout, TokenStats

GROUP_SIZE, PROMPTS, MAX_TOKENS, PAD, EOS, VOCAB = 4, 4, 8, 0, 1, 24
MODEL = DecoderConfig(VOCAB, 32, 48, 2, 4, 2, 8, qkv_bias=True, tie_embeddings=True, initializer_range=0.4)
OPTIMIZER = optax.sgd(1.0)  # the new parameters are the old ones minus the gradient


class Policy(NamedTuple):
    score: policy.Score
    params: Any


def _bigram_score(params, tokens, mask):
    """To an algorithm any function of this signature is a policy: here a table, which compiles in no time."""
    log_p = jax.nn.log_softmax(params["embedding"][tokens[:, :-1]])
    chosen = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
    entropies = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    return TokenStats(*(jnp.where(mask, jnp.pad(x, ((0, 0), (1, 0))), 0) for x in (chosen, entropies)))


BIGRAM = Policy(_bigram_score, {"embedding": jax.random.normal(jax.random.key(0), (VOCAB, VOCAB))})
DECODER = Policy(policy.make_score(MODEL, max_scored=MAX_TOKENS), decoder.init(MODEL, jax.random.key(0)))


def rollout(*, pad: int = PAD, seed: int = 0, extra: int = 0) -> Rollout:
    """Ragged prompts and completions, the behaviour log-probs a little off the trainer's, as a sampler's are."""
    rng = np.random.default_rng(seed)
    rows, length = PROMPTS * GROUP_SIZE, 6 + MAX_TOKENS + extra
    tokens, mask = np.full((rows, length), pad, np.int32), np.zeros((rows, length), bool)
    prompt_lengths = np.repeat(rng.integers(2, 7, PROMPTS), GROUP_SIZE)
    truncated = np.zeros(rows, bool)
    for i, prompt in enumerate(prompt_lengths):
        completion = int(rng.integers(1, MAX_TOKENS + 1))
        end = prompt + completion
        tokens[i, :end] = rng.integers(2, VOCAB, end)
        truncated[i] = completion == MAX_TOKENS
        if not truncated[i]:
            tokens[i, end - 1] = EOS
        mask[i, prompt:end] = True
    logprobs = np.array(BIGRAM.score(BIGRAM.params, jnp.asarray(tokens), jnp.asarray(mask)).logprobs)
    noise = rng.normal(0, 0.1, (rows, 6 + MAX_TOKENS)) if extra == 0 else np.zeros((rows, length))
    behaviour = np.where(mask, logprobs + noise, 0).astype(np.float32)
    source = np.zeros(rows, np.int32)
    source[[2, 9, 12]] = 1, 2, 3  # what TAPO injects; nobody else looks
    return Rollout(tokens, mask, behaviour, behaviour, prompt_lengths, truncated, source)


def scores(values=None, seed: int = 0) -> dict:
    """All channels that algorithms read; with `values` of correct given, rows are equal in the others."""
    rng, rows = np.random.default_rng(seed), PROMPTS * GROUP_SIZE
    channels = {
        "correct": rng.integers(0, 2, rows),
        "process": rng.choice([0, 0.25, 0.5, 1], rows),
        "flawed": rng.integers(0, 2, rows),
        "predicted": rng.integers(-2, 4, rows),  # the outermost are no legal verdicts
        "label": np.repeat(rng.integers(-1, 3, PROMPTS), GROUP_SIZE),
        "num_steps": np.full(rows, 3),
        "infolen": rng.choice([0, 0.5, 0.8, 1], rows),
        "origin": np.where(np.arange(rows) % 3 == 0, 1, np.nan),
        "span_begin": np.where(np.arange(rows) == 12, 1, np.nan),
        "span_end": np.where(np.arange(rows) == 12, 2, np.nan),
    }
    if values is not None:
        channels = {name: np.full(rows, channel[0]) for name, channel in channels.items()} | {"correct": values}
    return {name: np.asarray(channel, np.float32) for name, channel in channels.items()}


def widen(x, columns: int, value=0):
    return np.pad(x, ((0, 0), (0, columns)), constant_values=value)


def batch_of(algorithm: Algorithm, rows: Rollout, row_scores: dict, *, off_policy: bool = True, actor: Policy = BIGRAM):
    """The batch as the training loop makes it; off_policy: old log-probs of a policy a few updates back.

    On-policy there is no old pass, unless the algorithm's signals are made of it.
    """
    old = actor.score(actor.params, jnp.asarray(rows.tokens), jnp.asarray(rows.mask))
    if off_policy:
        drift = np.random.default_rng(7).normal(0, 0.3, (PROMPTS * GROUP_SIZE, 6 + MAX_TOKENS)).astype(np.float32)
        drift = np.where(rows.mask, widen(drift, rows.mask.shape[1] - drift.shape[1]), 0)
        old = old._replace(logprobs=old.logprobs + drift)
    reference = old.logprobs - jnp.where(rows.mask, 0.2, 0.0) if algorithm.needs_reference else None
    old = old if off_policy or algorithm.signals is not None else None
    return jax.jit(functools.partial(train_step.make_batch, algorithm))(
        jax.tree.map(jnp.asarray, rows), row_scores, 0, old_stats=old, ref_logprobs=reference
    )


@functools.cache
def _compiled(score, loss, weights, microbatches: int):
    algorithm = Algorithm(GROUP_SIZE, advantages=lambda *_: None, loss=loss, weights=weights)
    return jax.jit(train_step.make_train_step(score, algorithm, OPTIMIZER, microbatches=microbatches))


def gradient(algorithm: Algorithm, batch, *, microbatches: int = 1, mesh=None, actor: Policy = BIGRAM):
    """(loss, gradient) of one train step."""
    step = _compiled(actor.score, algorithm.loss, algorithm.weights, microbatches)
    if mesh is None:
        state = train_step.init_state(algorithm, OPTIMIZER, actor.params)
        after, metrics = step(state, batch)
    else:
        with jax.set_mesh(mesh):
            state = build.fresh_state(algorithm, OPTIMIZER, actor.params, mesh)
            after, metrics = step(state, sharding.shard_batch(batch, mesh))
    assert float(metrics["nonfinite"]) == 0
    return float(metrics["loss"]), jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), actor.params, after.params)


def assert_same(got, want, what: str, tolerance: float = 2e-5):
    np.testing.assert_allclose(got[0], want[0], rtol=tolerance, atol=tolerance, err_msg=f"loss changed with {what}")
    scale = max(np.abs(x).max() for x in jax.tree.leaves(want[1]))
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(scale, 1e-3), err_msg=f"gradient changed with {what}")


def microbatches(algorithm: Algorithm):
    batch = batch_of(algorithm, rollout(), scores())
    whole = gradient(algorithm, batch)
    assert max(np.abs(x).max() for x in jax.tree.leaves(whole[1])) > 1e-4, "the test has no signal"
    for parts in (2, 4, 16):
        assert_same(gradient(algorithm, batch, microbatches=parts), whole, f"{parts} micro-batches")


def row_order(algorithm: Algorithm):
    batch = batch_of(algorithm, rollout(), scores())
    order = np.random.default_rng(3).permutation(PROMPTS * GROUP_SIZE)
    permuted = jax.tree.map(lambda x: x[order], batch)
    assert_same(gradient(algorithm, permuted), gradient(algorithm, batch), "the order of the rows")


def padding(algorithm: Algorithm):
    rows = rollout()
    widened = jax.tree.map(lambda x: widen(x, 5) if x.ndim == 2 else x, rows)
    assert_same(
        gradient(algorithm, batch_of(algorithm, widened, scores())),
        gradient(algorithm, batch_of(algorithm, rows, scores())),
        "5 more columns of padding",
    )


def devices(algorithm: Algorithm, actor: Policy = BIGRAM):
    batch = batch_of(algorithm, rollout(), scores(), actor=actor)
    one = gradient(algorithm, batch, actor=actor)
    for axes in ({"data": 2}, {"fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}):
        got = gradient(algorithm, batch, mesh=sharding.make_mesh(**axes), actor=actor)
        assert_same(got, one, f"mesh {axes}")


def equal_rewards(algorithm: Algorithm):
    """No row was better than another: the gradient is exactly zero, not merely small."""
    for value in (0.0, 1.0, 0.6):
        batch = batch_of(algorithm._replace(needs_reference=False), rollout(), scores([value] * PROMPTS * GROUP_SIZE))
        loss, grads = gradient(algorithm, batch)
        assert loss == 0 and all((x == 0).all() for x in jax.tree.leaves(grads)), f"all rewards {value}: a gradient"


def pad_is_eos(algorithm: Algorithm):
    """Whether padding is written with the end token's id must not matter: the EOS that ends a row is trained on."""
    rows = rollout()
    same = rows._replace(tokens=np.where(np.arange(rows.tokens.shape[1]) >= _ends(rows)[:, None], EOS, rows.tokens))
    assert_same(
        gradient(algorithm, batch_of(algorithm, same, scores())),
        gradient(algorithm, batch_of(algorithm, rows, scores())),
        "pad id == eos id",
    )


def _ends(rows: Rollout):
    return rows.prompt_lengths + rows.mask.sum(axis=1)


def behaviour_is_not_old(algorithm: Algorithm):
    """The ratio is against the old policy: noise in the sampler's log-probs changes nothing."""
    rows = rollout()
    noisy = rows._replace(behaviour_logprobs=np.where(rows.mask, rows.behaviour_logprobs - 1.0, 0).astype(np.float32))
    for off_policy in (True, False):
        assert_same(
            gradient(algorithm, batch_of(algorithm, noisy, scores(), off_policy=off_policy)),
            gradient(algorithm, batch_of(algorithm, rows, scores(), off_policy=off_policy)),
            "the sampler's log-probs",
        )


def unscored_row(algorithm: Algorithm):
    """A row whose reward is NaN is as if its group had been one smaller, and its tokens do not matter."""
    rows, row_scores = rollout(), scores()
    for channel in row_scores.values():
        channel[5] = np.nan
    other = rows._replace(tokens=rows.tokens.copy())
    other.tokens[5][rows.mask[5]] = 9
    got = gradient(algorithm, batch_of(algorithm, other, row_scores))
    assert np.isfinite(got[0])
    assert_same(got, gradient(algorithm, batch_of(algorithm, rows, row_scores)), "the tokens of a row without reward")


def single_update_needs_no_old_pass(algorithm: Algorithm):
    """old_logprobs=None and the same log-probs given from outside are one and the same step."""
    if algorithm.signals is not None:
        pytest.skip("its signals are made of old entropies: the old pass is always made")
    rows = rollout()
    old = BIGRAM.score(BIGRAM.params, jnp.asarray(rows.tokens), jnp.asarray(rows.mask)).logprobs
    batch = batch_of(algorithm, rows, scores(), off_policy=False)
    assert batch.old_logprobs is None
    assert_same(
        gradient(algorithm, batch._replace(old_logprobs=old)), gradient(algorithm, batch), "an explicit old pass"
    )


ALL = (
    microbatches,
    row_order,
    padding,
    devices,
    equal_rewards,
    pad_is_eos,
    behaviour_is_not_old,
    unscored_row,
    single_update_needs_no_old_pass,
)

"""From batch to update: what the mismatch of trainer and sampler does to it, for every algorithm."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from launch import build, sections
from tapojax import train_step
from tapojax.algorithms import ALGORITHMS
from tapojax.tasks.arithmetic import arithmetic
from tests.algorithms import checks

OFF = {"warn": 0.0, "stop": 0.0, "mask": 0.0, "mask_estimator": "k3", "mask_level": "token"}
TASK = arithmetic(seed=0, max_prompt_tokens=8)
KNOBS = {"pkpo": {"k": 1}}  # with more, one right row of four drawn is enough: no signal in these groups
GIVEN = dict(group_size=checks.GROUP_SIZE, max_tokens=checks.MAX_TOKENS, temperature=1.0, steps=100, task=TASK)


def correction(kind="none", *, cap=2.0, **mismatch):
    return build.mismatch_correction(
        ConfigDict({"correction": kind, "correction_cap": cap}), ConfigDict(OFF | mismatch)
    )


@functools.cache
def algorithm_of(name):
    return sections.build(ALGORITHMS, {"name": name, **KNOBS.get(name, {})}, "algorithm", **GIVEN)


def corrected(name, correct, rows=None):
    """The batch of an algorithm of the table with its old log-probs, and the algorithm."""
    algorithm = algorithm_of(name)
    rows, actor = checks.rollout() if rows is None else rows, checks.BIGRAM
    old = actor.score(actor.params, jnp.asarray(rows.tokens), jnp.asarray(rows.mask))
    reference = old.logprobs if algorithm.needs_reference else None
    rows = jax.tree.map(jnp.asarray, rows)
    batch = train_step.make_batch(
        algorithm, rows, checks.scores(), 0, old_stats=old, ref_logprobs=reference, correct=correct
    )
    return algorithm, batch


def agreeing():
    """Rows whose sampler says what the trainer says."""
    rows = checks.rollout()
    own = checks.BIGRAM.score(checks.BIGRAM.params, jnp.asarray(rows.tokens), jnp.asarray(rows.mask)).logprobs
    return rows._replace(behaviour_logprobs=np.asarray(own))


CORRECTIONS = [
    ("token", {}),
    ("sequence", {}),
    ("none", {"mask": 1e-3}),
    ("token", {"mask": 0.2, "mask_estimator": "k1", "mask_level": "mean"}),
]


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize(("kind", "mismatch"), CORRECTIONS, ids=str)
def test_every_algorithm_takes_every_correction_and_needs_none_without_mismatch(name, kind, mismatch):
    algorithm, batch = corrected(name, correction(kind, **mismatch))
    got = checks.gradient(algorithm, batch)
    plain = checks.gradient(algorithm, batch._replace(importance=None))
    changed = any(np.abs(a - b).max() > 1e-7 for a, b in zip(*map(jax.tree.leaves, (got[1], plain[1])), strict=True))
    assert np.isfinite(got[0]) and changed, "the correction does nothing"
    algorithm, batch = corrected(name, correction(kind, **mismatch), agreeing())
    checks.assert_same(
        checks.gradient(algorithm, batch),
        checks.gradient(algorithm, batch._replace(importance=None)),
        "a correction of nothing",
    )


def test_neutral_limits_correct_nothing():
    assert correction() is None


def test_rejection_composes_with_truncation():
    rows = checks.rollout()
    arrays = jnp.zeros(rows.mask.shape), jnp.asarray(rows.behaviour_logprobs), jnp.asarray(rows.mask)
    ratio, kept, both = (correction(kind, mask=mask) for kind, mask in (("token", 0), ("none", 5), ("token", 5)))
    assert 0 < kept(*arrays).sum() < rows.mask.sum(), "the test rejects all or nothing"
    np.testing.assert_array_equal(both(*arrays), ratio(*arrays) * kept(*arrays))
    assert kept(*arrays).dtype == jnp.float32 and set(np.unique(kept(*arrays))) == {0, 1}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mask_estimator": "k4"}, "estimator='k4'"),
        ({"mask": 1.0, "mask_level": "row"}, "level='row'"),
        ({"mask_estimator": "k1", "mask_level": "max"}, "maximum of the signed"),
        ({"stop": -1.0}, "mismatch.stop=-1.0 is below 0"),
    ],
)
def test_mistakes_in_the_limits_are_named_at_once(given, said):
    with pytest.raises(ValueError, match=said):
        correction(**given)


def test_rejected_tokens_count_in_the_denominators():
    """The loss is that of all tokens without their terms: the others weigh what they did."""
    algorithm, batch = corrected("dapo", correction("none", mask=0.01))
    rejected = np.asarray(batch.mask & (batch.importance == 0))
    assert 0 < rejected.sum() < batch.mask.sum()
    assert not rejected[np.asarray(batch.source) > 0].any(), "injected rows were not sampled, so they cannot disagree"
    silenced = batch._replace(importance=None, advantages=jnp.where(rejected, 0, batch.advantages))
    checks.assert_same(checks.gradient(algorithm, batch), checks.gradient(algorithm, silenced), "rejection")


# ---- statistics


def metrics_of(algorithm, batch, microbatches=1):
    step = jax.jit(
        train_step.make_train_step(checks.BIGRAM.score, algorithm, checks.OPTIMIZER, microbatches=microbatches)
    )
    return step(train_step.init_state(algorithm, checks.OPTIMIZER, checks.BIGRAM.params), batch)[1]


def test_a_single_update_tells_the_mismatch_without_an_old_pass():
    algorithm, batch = corrected("grpo", None)
    want = jax.jit(train_step.mismatch)(batch)
    assert float(want["mismatch_mean"]) > 0.05
    for microbatches in (1, 4):
        got = metrics_of(algorithm, batch._replace(old_logprobs=None), microbatches)
        for name, value in want.items():
            np.testing.assert_allclose(got[name], value, 1e-5, err_msg=f"{name}, {microbatches} micro-batches")
    assert want.keys().isdisjoint(metrics_of(algorithm, batch)), "with old log-probs the loop has measured it"


def test_injected_and_unscored_rows_are_not_measured():
    _, batch = corrected("grpo", None)
    want = train_step.mismatch(batch)
    off = jnp.where((batch.source > 0)[:, None], batch.behaviour_logprobs - 9, batch.behaviour_logprobs)
    assert train_step.mismatch(batch._replace(behaviour_logprobs=off)) == want
    hidden = batch._replace(mask=batch.mask.at[5].set(False))
    moved = hidden._replace(behaviour_logprobs=hidden.behaviour_logprobs.at[5].add(-9.0))
    assert train_step.mismatch(moved) == train_step.mismatch(hidden) != want

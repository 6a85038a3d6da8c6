"""At its neutral knobs an algorithm is its parent, exactly."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tapojax import advantages, entropy, shaping, weights
from tapojax.algorithms.archer import archer
from tapojax.algorithms.dapo import dapo
from tapojax.algorithms.dr_grpo import dr_grpo
from tapojax.algorithms.edge_grpo import edge_grpo
from tapojax.algorithms.forking import forking
from tapojax.algorithms.grpo import grpo
from tapojax.algorithms.hapo import hapo
from tapojax.algorithms.rloo import rloo
from tapojax.algorithms.rtpo import rtpo
from tapojax.tasks.arithmetic import arithmetic
from tapojax.types import Prompts
from tests.algorithms import checks


def assert_identical(child, parent):
    batches = [checks.batch_of(a, checks.rollout(), checks.scores()) for a in (child, parent)]
    got, want = (jax.tree.leaves(checks.gradient(*pair)) for pair in zip((child, parent), batches, strict=True))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_dapo_with_its_parts_off_is_grpo():
    off = dapo(group_size=4, max_tokens=8, clip_high=0.2, dynamic_sampling=False, token_mean=False)
    assert_identical(off, grpo(group_size=4))
    assert off.keep is None


def test_each_part_of_dapo_changes_something():
    parent = checks.gradient(grpo(group_size=4), checks.batch_of(grpo(group_size=4), checks.rollout(), checks.scores()))
    off = dict(clip_high=0.2, dynamic_sampling=False, token_mean=False, overlong_buffer=0)
    for part in ({"clip_high": 0.28}, {"token_mean": True}, {"overlong_buffer": 4}):
        child = dapo(group_size=4, max_tokens=8, **(off | part))
        got = checks.gradient(child, checks.batch_of(child, checks.rollout(), checks.scores()))
        assert got[0] != parent[0], f"{part} is inert"


def test_dapo_keeps_groups_with_both_right_and_wrong_rows():
    scores = {"correct": np.array([1, 1, 0, 0, 1, 0, np.nan, 1, np.nan, np.nan], np.float32)}
    keep = dapo(group_size=2, max_tokens=8).keep(scores["correct"], scores)
    np.testing.assert_array_equal(keep, [False, False, True, False, False])


def test_dapo_keeps_the_groups_that_its_recipe_keeps():
    """verl's filter: np.std of the metric above 0. On purpose: it also keeps a row alone in its group."""
    data = np.load(Path(__file__).parents[1] / "golden" / "dapo_reward_shaping_and_filter.npz", allow_pickle=False)
    for metric, kept in (("metric", "kept_row_indices"), ("metric_binary", "kept_row_indices_binary")):
        for uid in np.unique(data["uid"]):
            rows = np.flatnonzero(data["uid"] == uid)
            scores = {"correct": data[metric][rows]}
            ours = dapo(group_size=len(rows), max_tokens=8).keep(scores["correct"], scores)
            assert ours.tolist() == [bool(np.isin(rows, data[kept]).all()) and len(rows) > 1], (metric, uid)


def test_dapo_rewards_are_one_and_minus_one_under_a_length_penalty():
    """As in the paper and in verl; without penalty 0 and 1 give the same advantages."""
    scores, rows = checks.scores(), checks.rollout()
    shaped = dapo(group_size=4, max_tokens=8, overlong_buffer=4, overlong_factor=0.5)
    penalty = shaping.overlong_penalty(rows.mask.sum(axis=1), max_length=8, buffer=4, factor=0.5)
    np.testing.assert_array_equal(shaped.rewards(scores, rows, 0), 2 * scores["correct"] - 1 + penalty)
    plain = dapo(group_size=4, max_tokens=8)
    np.testing.assert_array_equal(plain.rewards(scores, rows, 0), scores["correct"])
    free = dapo(group_size=4, max_tokens=8, overlong_buffer=4, overlong_factor=0.0)
    batches = [checks.batch_of(algorithm, rows, scores) for algorithm in (free, plain)]
    np.testing.assert_allclose(*(batch.advantages for batch in batches), rtol=1e-5, atol=1e-5)


def test_grpo_without_kl_ignores_the_reference_and_with_it_needs_one():
    assert not grpo(group_size=4).needs_reference
    assert grpo(group_size=4, kl_coef=0.1).needs_reference
    assert_identical(grpo(group_size=4, kl_coef=0.0), grpo(group_size=4))


def test_dr_grpo_does_not_divide_by_the_std():
    batch = checks.batch_of(dr_grpo(group_size=4, max_tokens=8), checks.rollout(), checks.scores([1, 0, 0, 0] * 4))
    np.testing.assert_allclose(np.unique(np.asarray(batch.advantages)[batch.mask]), [-0.25, 0.75], rtol=1e-6)


def test_rloo_baseline_is_the_mean_of_the_others():
    batch = checks.batch_of(rloo(group_size=4), checks.rollout(), checks.scores([1, 0, 0, 0] * 4))
    np.testing.assert_allclose(np.unique(np.asarray(batch.advantages)[batch.mask]), [-1 / 3, 1], rtol=1e-6)


HAPO_OFF = dict(temperature_strength=0.0, group_average=False, redistribution=0.0, clip_strength=0.0)
DAPO_OF_HAPO = dict(clip_low=0.2, clip_high=0.2, dual_clip=10.0)
HAPO_PARTS = {"temperature_strength": 0.05, "group_average": True, "redistribution": 1.0, "clip_strength": 1.0}


def make_hapo(**knobs):
    return hapo(group_size=4, max_tokens=8, temperature=1.0, **knobs)


def old_stats(rows):
    return checks.BIGRAM.score(checks.BIGRAM.params, jnp.asarray(rows.tokens), jnp.asarray(rows.mask))


def test_hapo_with_its_parts_off_is_dapo():
    for knobs in ({}, {"clip_high": 0.28, "dual_clip": 3.0, "overlong_buffer": 4, "overlong_factor": 0.5}):
        off = make_hapo(**HAPO_OFF, **knobs)
        assert_identical(off, dapo(group_size=4, max_tokens=8, dynamic_sampling=False, **DAPO_OF_HAPO | knobs))
        assert (off.temperature, off.update_carry, off.signals, off.carry, off.keep) == (None, None, None, (), None)
    assert make_hapo(**HAPO_OFF, dynamic_sampling=True).keep is not None


@pytest.mark.parametrize("part", HAPO_PARTS)
def test_each_part_of_hapo_switches_on_and_off_alone(part):
    alone, without = make_hapo(**HAPO_OFF | {part: HAPO_PARTS[part]}), make_hapo(**{part: HAPO_OFF[part]})
    for algorithm, on in ((alone, True), (without, False)):
        assert (algorithm.temperature is not None) == (on == (part == "temperature_strength"))
        assert (algorithm.update_carry is None) == (algorithm.temperature is None) == (algorithm.carry == ())
    pairs = [(alone, make_hapo(**HAPO_OFF)), (without, make_hapo())]
    for pair in pairs:
        got, parent = (checks.gradient(a, checks.batch_of(a, checks.rollout(), checks.scores())) for a in pair)
        same = np.array_equal(got[1]["embedding"], parent[1]["embedding"])
        assert same == (part == "temperature_strength"), f"{part} alone acts in the wrong place"


def test_hapo_takes_the_temperatures_from_the_batch_before():
    algorithm, rows = make_hapo(temperature_strength=0.1), checks.rollout()
    logits = jnp.linspace(0.3, 3, 6)[:, None] * jax.random.normal(jax.random.key(0), (6, checks.VOCAB))
    np.testing.assert_array_equal(algorithm.temperature(logits, algorithm.carry), 1, "the first batch: no statistics")
    carry = algorithm.update_carry(algorithm.carry, old_stats(rows), rows)
    assert jax.tree.map(jnp.shape, carry) == jax.tree.map(jnp.shape, algorithm.carry)
    assert all(x.dtype == np.float32 for x in [*carry, *algorithm.carry]), "one compiled sampler for both"
    expected = entropy.signal(old_stats(rows).entropies, rows.mask)[1]
    np.testing.assert_allclose(carry, expected, 1e-6)
    got = algorithm.temperature(logits, carry)
    np.testing.assert_allclose(got, entropy.adaptive_temperature(logits, expected, base=1.0, strength=0.1), 1e-6)
    assert np.ptp(got) > 0.01
    # Entropies are compared at the temperature at which `score` takes them.
    cold = hapo(group_size=4, max_tokens=8, temperature=0.5, temperature_strength=0.1)
    np.testing.assert_allclose(cold.temperature(logits / 2, carry), got / 2, 1e-6)


def test_hapo_statistics_are_those_of_the_scored_rows():
    """A row without a reward leaves the signal; the temperatures may use its entropies."""
    algorithm, rows, scores = make_hapo(), checks.rollout(), checks.scores()
    scores["correct"][5] = np.nan
    batch = checks.batch_of(algorithm, rows, scores)
    mask = rows.mask & (np.arange(16) != 5)[:, None]
    np.testing.assert_array_equal(batch.mask, mask)
    want = entropy.signal(old_stats(rows).entropies, mask)[0]
    np.testing.assert_allclose(batch.signals["entropy_signal"], want, 1e-5, 1e-6)
    average = advantages.token_group_normalize(jnp.asarray(scores["correct"]), mask, 4)
    np.testing.assert_allclose(batch.advantages, average, 1e-6)


def test_forking_with_all_tokens_is_dapo():
    assert_identical(
        forking(group_size=4, max_tokens=8, fraction=1.0), dapo(group_size=4, max_tokens=8, dual_clip=10.0)
    )


def test_forking_averages_over_the_kept_tokens():
    algorithm, parent = (f(group_size=4, max_tokens=8) for f in (forking, dapo))
    batch = checks.batch_of(algorithm, checks.rollout(), checks.scores())
    kept = entropy.top_fraction(old_stats(checks.rollout()).entropies, batch.mask, 0.2)
    assert 0 < kept.sum() < batch.mask.sum() / 2
    stats = old_stats(checks.rollout())
    ours = jnp.sum(weights.token_mean(batch.mask) * algorithm.loss(stats, batch)[0])
    np.testing.assert_allclose(ours, jnp.sum(weights.token_mean(kept) * parent.loss(stats, batch)[0]), 1e-5)


def test_archer_with_one_clip_range_and_without_kl_is_dapo():
    off = dict(high_entropy_clip=0.2, low_entropy_kl=0.0)
    assert_identical(archer(group_size=4, max_tokens=8, **off), dapo(group_size=4, max_tokens=8, **DAPO_OF_HAPO))


def test_each_part_of_archer_changes_something():
    off = dict(high_entropy_clip=0.2, low_entropy_kl=0.0, high_entropy_kl=0.0)
    parent = archer(group_size=4, max_tokens=8, **off)
    assert not parent.needs_reference
    want = checks.gradient(parent, checks.batch_of(parent, checks.rollout(), checks.scores()))
    for part in ({"high_entropy_clip": 0.5}, {"low_entropy_kl": 0.01}, {"high_entropy_kl": 0.01}):
        child = archer(group_size=4, max_tokens=8, **off | part)
        assert child.needs_reference == (part.keys() != {"high_entropy_clip"})
        got = checks.gradient(child, checks.batch_of(child, checks.rollout(), checks.scores()))
        assert got[0] != want[0], f"{part} is inert"


def test_edge_grpo_without_strength_is_dapo_with_its_new_parts_off():
    parent = dapo(group_size=4, max_tokens=8, clip_high=0.2, dynamic_sampling=False)
    assert_identical(edge_grpo(group_size=4, max_tokens=8, strength=0.0), parent)


def test_edge_grpo_scales_the_advantages_of_a_row():
    algorithm, parent = edge_grpo(group_size=4, max_tokens=8), edge_grpo(group_size=4, max_tokens=8, strength=0.0)
    batch, plain = (checks.batch_of(a, checks.rollout(), checks.scores()) for a in (algorithm, parent))
    row = jnp.asarray(plain.advantages).max(axis=1) + jnp.asarray(plain.advantages).min(axis=1)
    scaled = advantages.entropy_scaled(row, old_stats(checks.rollout()).entropies, batch.mask)
    want = checks.gradient(parent, plain._replace(advantages=advantages.per_token(scaled, batch.mask)))
    checks.assert_same(checks.gradient(algorithm, batch), want, "the factor in the loss")
    assert checks.gradient(parent, plain)[0] != pytest.approx(want[0], rel=1e-3)


def test_rtpo_without_hints_is_dapo_without_dynamic_sampling():
    task = arithmetic(seed=0, max_prompt_tokens=8)
    off = rtpo(group_size=4, max_tokens=8, steps=10, task=task, schedule="constant", value=0.0)
    assert_identical(off, dapo(group_size=4, max_tokens=8, clip_high=0.2, dynamic_sampling=False))
    bare = Prompts([task.train[0]], [task.prompt(task.train[0])])
    assert off.prompts(bare, 0) == bare and off.keep is off.inject is off.temperature is None

"""At its neutral knobs an algorithm is its parent, exactly."""

import jax
import numpy as np

from tapojax.algorithms.dapo import dapo
from tapojax.algorithms.dr_grpo import dr_grpo
from tapojax.algorithms.grpo import grpo
from tapojax.algorithms.rloo import rloo
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

"""TAPO: what injected rows are worth, what they leave alone, and that each of its four parts switches off."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tapojax import advantages
from tapojax.algorithms import injection, tapo
from tapojax.algorithms.dapo import dapo
from tapojax.types import Batch, TokenStats
from tests.algorithms.test_injection import BUDGET, GROUP, RIGHT, WRONG, ids, likes, rows_of, task

OFF = dict(use_dti=False, use_pai=False, use_ali=False, use_infolen=False)
CLIPS = dict(clip_low=0.2, clip_high=0.28, dual_clip=3.0, dynamic_sampling=False)


def make(the_task=None, **knobs):
    return tapo.tapo(group_size=GROUP, max_tokens=BUDGET, task=the_task or task(), **knobs)


def injected(algorithm, *completions, memory=None, policy=None):
    """The rollout, the scores and the memory after injection."""
    rows = rows_of(*completions)
    scores = {"correct": rows.correct}
    key = jax.random.key(0)
    return algorithm.inject(rows.rollout, scores, rows.prompts, key, memory or {}, policy or likes())


def advantages_of(algorithm, rollout, scores):
    rewards = algorithm.rewards(scores, rollout, 0)
    return np.asarray(algorithm.advantages(rewards, scores, rollout))


def test_a_teacher_row_gets_its_fixed_advantage_and_the_others_keep_theirs():
    algorithm = make(task(solution=lambda e: ("7+6=13", "#13")), use_pai=False, use_infolen=False)
    rollout, scores, _ = injected(algorithm, *WRONG)
    assert rollout.source.tolist() == [0, 0, injection.TEACHER, 0]
    got = advantages_of(algorithm, rollout, scores)
    np.testing.assert_array_equal(got[2], np.where(rollout.mask[2], 1.0, 0))
    assert (np.delete(got, 2, axis=0) == 0).all(), "group statistics come from the sampled rows: all wrong"


def test_worked_example_of_an_all_right_group():
    """R = [1, .9, .8, .5]: mean .8, std .216; the last row becomes the first with a wrong answer: + ... - - 0."""
    algorithm = make(use_pai=False, use_infolen=False)
    rows = rows_of("7+6=13#13", "#13", "#13", "13#13", rewards=[1, 0.9, 0.8, 0.5])
    candidates = injection.dynamic_teacher(rows, task(), {}, np.random.default_rng(0))
    rollout, channels = injection.overwrite(rows.rollout, injection.most_likely(candidates, rows.rollout, likes()))
    algorithm = algorithm._replace(rewards=lambda scores, rollout, step: jnp.asarray(rows.rewards))
    got = advantages_of(algorithm, rollout, {"correct": rows.correct, **channels})
    expected = [0.5] * 7 + [-1.0, -1.0] + [0.0]  # 7+6=13# | 14 | end of sequence
    np.testing.assert_allclose(got[3, 4:14], expected)
    first = [row[m][0] for row, m in zip(got[:3], rollout.mask[:3], strict=True)]
    np.testing.assert_allclose(first, [0.926, 0.463, 0], atol=1e-3)


def test_the_policys_own_failure_is_pushed_down_as_a_whole():
    memory = {"a": {"right": [], "wrong": [[injection.OWN, ids("#7")]]}}
    algorithm = make(use_pai=False, use_infolen=False, wrong_advantage=-0.3)
    rollout, scores, _ = injected(algorithm, *RIGHT, memory=memory)
    row = int(np.flatnonzero(rollout.source)[0])
    got = advantages_of(algorithm, rollout, scores)
    np.testing.assert_allclose(got[row][rollout.mask[row]], -0.3)


def test_without_ali_injected_rows_enter_the_statistics():
    """One right of four: (1 - 1/4) sqrt 4 = 1.5 for the teacher and -0.5 for each of the others."""
    algorithm = make(task(solution=lambda e: ("", "#13")), use_ali=False, use_pai=False, use_infolen=False)
    rollout, scores, _ = injected(algorithm, *WRONG)
    got = advantages_of(algorithm, rollout, scores)
    np.testing.assert_allclose(
        [row[m][0] for row, m in zip(got, rollout.mask, strict=True)], [-0.5, -0.5, 1.5, -0.5], rtol=1e-5
    )


def test_infolen_alone_shapes_the_reward_and_injects_nothing():
    algorithm = make(use_dti=False, use_pai=False)
    rollout, scores, memory = injected(algorithm, "#13", "13,13,13#13", "#11", "#13")
    rewards = np.asarray(algorithm.rewards(scores, rollout, 0))
    assert rollout.source.sum() == 0 and memory == {}
    assert rewards[2] == 0 and 0.5 <= rewards[1] < rewards[0] == rewards[3] == 1, "long and repetitive is worth less"
    assert make(**OFF).inject is None


@pytest.mark.parametrize("flags", itertools.product([False, True], repeat=4))
def test_every_combination_of_the_four_parts_gives_finite_advantages(flags):
    algorithm = make(**dict(zip(OFF, flags, strict=True)))
    for completions in (WRONG, RIGHT, ("#13", "#11", "#12", "#13")):
        rows = rows_of(*completions)
        rollout, scores = rows.rollout, {"correct": rows.correct}
        if algorithm.inject is not None:
            rollout, scores, _ = injected(algorithm, *completions)
        got = advantages_of(algorithm, rollout, scores)
        assert np.isfinite(got).all() and (got[~np.asarray(rollout.mask)] == 0).all()
        kinds = set(rollout.source.tolist()) - {injection.SAMPLED}
        assert flags[0] or kinds <= {injection.PERTURBED}
        assert flags[1] or injection.PERTURBED not in kinds
        if algorithm.diagnostics is not None:
            numbers = algorithm.diagnostics(algorithm.rewards(scores, rollout, 0), scores, rollout, 0)
            assert numbers["all_wrong_groups"] == (completions is WRONG)


def test_without_any_part_it_is_dapo_exactly():
    off, parent = make(**OFF), dapo(group_size=GROUP, max_tokens=BUDGET, **CLIPS)
    assert off.inject is off.signals is off.keep is off.diagnostics is off.memory is None
    rows = rows_of("#13", "#11", "#12", "#13")
    scores = {"correct": rows.correct}
    np.testing.assert_array_equal(advantages_of(off, rows.rollout, scores), advantages_of(parent, rows.rollout, scores))


def batch_of(old_logprob: float, advantage: float, signals) -> Batch:
    fill = jnp.full((1, 2), 1.0)
    mask = jnp.ones((1, 2), bool)
    return Batch(jnp.zeros((1, 2), int), mask, advantage * fill, 0 * fill, old_logprob * fill, None, None, signals)


def test_an_impossible_injected_token_is_not_pushed_down_further():
    """log p < log 1e-4: the gradient of a negative advantage is zero there, that of a positive one is not."""
    algorithm = make()
    rollout = rows_of(*WRONG).rollout._replace(source=np.array([0, 0, injection.TEACHER, 0]))
    old = TokenStats(jnp.where(rollout.mask, -12.0, 0), jnp.zeros(rollout.mask.shape))
    signals = algorithm.signals(old, rollout)
    assert (
        signals["impossible"][2].sum() == rollout.mask[2].sum() and signals["impossible"].sum() == rollout.mask[2].sum()
    )
    ones = {name: jnp.ones((1, 2)) for name in signals}
    for advantage, moves in ((-1.0, False), (1.0, True)):

        def loss(logprobs, advantage=advantage):
            stats = TokenStats(logprobs, jnp.zeros((1, 2)))
            return algorithm.loss(stats, batch_of(-12.0, advantage, ones))[0].sum()

        assert bool((jax.grad(loss)(jnp.full((1, 2), -12.0)) != 0).all()) is moves


def test_luffys_shaping_follows_its_formula_on_teacher_rows_only():
    """L = -A p / (p + gamma), whose gradient in log p is -A gamma p / (p + gamma)^2."""
    algorithm = make(luffy_shaping=0.1)
    signals = {"impossible": jnp.zeros((1, 2)), "teacher": jnp.array([[1.0, 0.0]])}

    def loss(logprobs):
        return algorithm.loss(TokenStats(logprobs, jnp.zeros((1, 2))), batch_of(np.log(0.3), 2.0, signals))[0]

    at = jnp.full((1, 2), np.log(0.3), jnp.float32)
    np.testing.assert_allclose(loss(at), [[-2 * 0.3 / 0.4, -2.0]], rtol=1e-6)
    got = jax.grad(lambda x: loss(x).sum())(at)
    np.testing.assert_allclose(got, [[-2 * 0.1 * 0.3 / 0.16, -2.0]], rtol=1e-5)


def test_the_same_key_injects_the_same_rows():
    algorithm = make()
    first, second = (injected(algorithm, "#13", "#11", "#12", "#13", *RIGHT) for _ in range(2))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_mean_advantage_of_sampled_rows_is_the_parents():
    """ALI leaves the group normalisation as it is: every row that was not replaced has DAPO's advantage."""
    algorithm = make(use_infolen=False, perturb_probability=1.0)
    completions = ("#13", "7+6=13#13", "#11", "#9999")
    rollout, scores, _ = injected(algorithm, *completions)
    parent = advantages.group_normalize(jnp.asarray(scores["correct"]), GROUP)
    got = advantages_of(algorithm, rollout, scores)
    assert rollout.source.tolist() == [0, 0, 0, injection.PERTURBED]
    for row in range(3):
        np.testing.assert_array_equal(got[row][rollout.mask[row]], np.asarray(parent)[row])

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tapojax import advantages

GRPO = advantages.group_normalize
DR_GRPO = functools.partial(advantages.group_normalize, scale=False)
RLOO = advantages.leave_one_out
ESTIMATORS = pytest.mark.parametrize("estimator", [GRPO, DR_GRPO, RLOO], ids=["grpo", "dr_grpo", "rloo"])
PRECISIONS = pytest.mark.parametrize(("x64", "rtol", "atol"), [(True, 1e-6, 1e-7), (False, 1e-4, 1e-5)])


def golden(name):
    return np.load(Path(__file__).parent / "golden" / f"{name}.npz", allow_pickle=False)


def adjacent(uid):
    """Row indices [P, G] that bring groups of unequal size side by side, and which of them are real rows."""
    groups = [np.flatnonzero(uid == u) for u in np.unique(uid)]
    size = max(len(g) for g in groups)
    index = np.stack([np.pad(g, (0, size - len(g))) for g in groups])
    real = np.stack([np.arange(size) < len(g) for g in groups])
    return index, real


def by_group(estimator, score, uid):
    """Advantages of interleaved groups of unequal size, in the order of `score`."""
    index, real = adjacent(uid)
    out = estimator(jnp.asarray(score[index].ravel()), index.shape[1], where=jnp.asarray(real.ravel()))
    result = np.zeros(len(score), out.dtype)
    result[index[real]] = np.asarray(out).reshape(index.shape)[real]
    return result


def reference(rewards, group_size, valid, kind):
    """The definitions, one row at a time, in numpy."""
    out = np.zeros(len(rewards))
    for i in range(len(rewards)):
        start = i - i % group_size
        members = [j for j in range(start, start + group_size) if valid[j]]
        values = rewards[members]
        if not valid[i] or len(members) < 2 or values.max() == values.min():
            continue
        others = [rewards[j] for j in members if j != i]
        out[i] = {
            "rloo": lambda i=i, others=others: rewards[i] - np.mean(others),
            "dr_grpo": lambda i=i, values=values: rewards[i] - values.mean(),
            "grpo": lambda i=i, values=values: (rewards[i] - values.mean()) / (values.std(ddof=1) + 1e-6),
        }[kind]()
    return out


@PRECISIONS
@pytest.mark.parametrize(
    ("name", "estimator"), [("grpo", GRPO), ("drgrpo", DR_GRPO), ("rloo", RLOO)], ids=["grpo", "dr_grpo", "rloo"]
)
def test_verl_advantages(name, estimator, x64, rtol, atol):
    data = golden(f"{name}_advantage_verl")
    uid, mask = data["uid"], jnp.asarray(data["response_mask"] > 0)
    with jax.enable_x64(x64):
        score = data["score"].astype(np.float64 if x64 else np.float32)
        rows = by_group(estimator, score, uid)
        ours = np.asarray(advantages.per_token(jnp.asarray(rows), mask))
    expected = data["adv"] if x64 else data["adv_f32"]
    alone = np.isin(uid, [u for u in np.unique(uid) if np.sum(uid == u) == 1])
    equal = np.isin(uid, [u for u in np.unique(uid) if np.ptp(score[uid == u]) == 0])
    np.testing.assert_allclose(ours[~equal], expected[~equal], rtol, atol)
    np.testing.assert_allclose(ours[~equal], data["adv_vectorized"][~equal], 1e-4, 1e-5)
    assert np.all(ours[equal] == 0), "equal rewards must give exactly 0"
    # On purpose: verl hands a row alone in its group its own reward (over 1 + eps), as if the mean were 0 and std 1.
    theirs = score[alone, None] * (data["response_mask"][alone] > 0)
    np.testing.assert_allclose(expected[alone], theirs, 1e-5, err_msg="verl changed: a group of one")


def trl_rewards(data):
    """Weighted sum over reward functions with missing ones left out, NaN where none exists."""
    per_function = data["rewards_per_func"].astype(np.float64)
    weighted = np.nansum(per_function * data["reward_weights"], axis=1)
    return np.where(np.isnan(per_function).all(axis=1), np.nan, weighted)


def test_trl_grpo_advantages():
    data = golden("grpo_advantage_trl")
    size, eps, rewards = int(data["num_generations"]), float(data["eps"]), trl_rewards(data)
    scorable = ~np.isnan(rewards)
    with jax.enable_x64(True):
        np.testing.assert_allclose(GRPO(jnp.asarray(rewards), size, eps=eps), data["adv__group"], 1e-6, 1e-7)
        centered = np.asarray(DR_GRPO(jnp.asarray(rewards), size))
    np.testing.assert_allclose(centered, data["adv__none"], 1e-6, 1e-7)
    batch = centered / (rewards[scorable].std(ddof=1) + eps)
    np.testing.assert_allclose(batch, data["adv__batch"], 1e-6, 1e-7)
    np.testing.assert_allclose(centered, golden("drgrpo_advantage_trl")["adv__none"], 1e-6, 1e-7)


def test_trl_normalize_then_sum_is_a_composition():
    data = golden("grpo_advantage_trl")
    size, eps, scorable = int(data["num_generations"]), float(data["eps"]), ~np.isnan(trl_rewards(data))
    with jax.enable_x64(True):
        columns = [GRPO(jnp.asarray(x.astype(np.float64)), size, eps=eps) for x in data["rewards_per_func"].T]
        total = sum(w * x for w, x in zip(data["reward_weights"], columns, strict=True))
        ours = GRPO(total, total.size, where=jnp.asarray(scorable), eps=eps)
    np.testing.assert_allclose(ours, data["adv__normalize_then_sum"], 1e-6, 1e-7)


def test_trl_rloo_advantages():
    data = golden("rloo_trl")
    size, rewards = int(data["num_generations"]), trl_rewards(data)
    kl = np.sum((data["kl_old_logps"].astype(np.float64) - data["kl_ref_logps"]) * data["kl_mask"], axis=1)
    with jax.enable_x64(True):
        plain = RLOO(jnp.asarray(rewards), size)
        clipped = RLOO(jnp.asarray(np.clip(rewards, -0.5, 0.5)), size)
        shaped = RLOO(jnp.asarray(rewards - 0.05 * kl), size)
        normalized = GRPO(plain, plain.size, where=jnp.asarray(~np.isnan(rewards)), eps=1e-4)
    np.testing.assert_allclose(plain, data["adv"], 1e-6, 1e-7)
    np.testing.assert_allclose(clipped, data["adv__clip_pm05"], 1e-6, 1e-7)
    np.testing.assert_allclose(shaped, data["adv__beta005"], 1e-6, 1e-6)  # the reference adds its KL term in float32
    np.testing.assert_allclose(normalized, data["adv__normalized"], 1e-6, 1e-7)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_definition_row_by_row_with_missing_rows(kind):
    rng = np.random.default_rng(0)
    rewards, where = rng.normal(size=60), rng.random(60) > 0.3
    rewards[rng.random(60) < 0.2] = np.nan
    where[:5], where[5:9] = False, False  # an empty group, and a group with one row
    estimator = {"grpo": GRPO, "dr_grpo": DR_GRPO, "rloo": RLOO}[kind]
    with jax.enable_x64(True):
        ours = estimator(jnp.asarray(rewards), 5, where=jnp.asarray(where))
    np.testing.assert_allclose(ours, reference(rewards, 5, where & ~np.isnan(rewards), kind), 1e-9, 1e-12)


def test_worked_examples():
    one_in_two = GRPO(jnp.array([1.0, 1, 0, 0, 1, 0, 1, 0]), 8)
    np.testing.assert_allclose(one_in_two, 0.935414 * np.array([1, 1, -1, -1, 1, -1, 1, -1]), 1e-5)
    floored = GRPO(jnp.array([1.0, 0.9, 0.8, 0.5]), 4, std_floor=0.1)
    np.testing.assert_allclose(floored, [0.926, 0.463, 0, -1.389], atol=1e-3)
    raised = GRPO(jnp.array([1.0, 0.9, 0.8, 0.5]), 4, std_floor=0.5)
    np.testing.assert_allclose(raised, np.array([0.2, 0.1, 0, -0.3]) / 0.500001, rtol=1e-5, atol=1e-7)


@ESTIMATORS
@pytest.mark.parametrize("group_size", [2, 3, 7, 8, 64])
def test_equal_rewards_give_exactly_zero(estimator, group_size):
    values = [0.1, 0.6, 1 / 3, -0.7, 123456.7, 1e-30, 0.0]
    rewards = jnp.repeat(jnp.array(values), group_size)
    assert np.all(estimator(rewards, group_size) == 0), "equal rewards leaked through a rounded mean"


def test_equal_rewards_leak_through_the_plain_formula():
    rewards = jnp.repeat(jnp.array([0.1, 0.6, 1 / 3, -0.7]), 7).reshape(4, 7)
    plain = (rewards - rewards.mean(axis=1, keepdims=True)) / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-6)
    assert np.any(plain != 0), "the guard against rounded means has become unnecessary"


@ESTIMATORS
def test_a_row_without_another_gives_zero(estimator):
    np.testing.assert_array_equal(estimator(jnp.array([0.7, -2.0]), 1), [0, 0])
    np.testing.assert_array_equal(estimator(jnp.array([jnp.nan, 0.7]), 2), [0, 0])


@ESTIMATORS
def test_rows_left_out_do_not_matter(estimator):
    rewards = jnp.array([1.0, 0.5, 9.0, 0.0])
    where = jnp.array([True, True, False, True])
    expected = estimator(jnp.array([1.0, 0.5, 0.0]), 3)
    for garbage in [9.0, jnp.nan, jnp.inf, -jnp.inf]:
        ours = estimator(rewards.at[2].set(garbage), 4, where=where)
        np.testing.assert_allclose(ours[jnp.array([0, 1, 3])], expected, 1e-6, 1e-7)
        assert ours[2] == 0
    np.testing.assert_array_equal(
        estimator(rewards.at[2].set(jnp.nan), 4), estimator(rewards, 4, where=where), "NaN is not where=False"
    )


@ESTIMATORS
def test_permutation_within_a_group_and_of_groups(estimator):
    rewards = jax.random.normal(jax.random.key(0), (3, 8))
    order = jax.random.permutation(jax.random.key(1), 8)
    plain = estimator(rewards.ravel(), 8).reshape(3, 8)
    np.testing.assert_allclose(estimator(rewards[:, order].ravel(), 8).reshape(3, 8), plain[:, order], 1e-5, 1e-6)
    np.testing.assert_array_equal(estimator(rewards[::-1].ravel(), 8).reshape(3, 8), plain[::-1])


@ESTIMATORS
def test_reward_shift_and_scale(estimator):
    rewards = jax.random.normal(jax.random.key(0), (24,))
    plain = estimator(rewards, 8)
    np.testing.assert_allclose(estimator(rewards + 3, 8), plain, 1e-4, 1e-5)
    np.testing.assert_allclose(estimator(-rewards, 8), -plain, 1e-5, 1e-6)
    np.testing.assert_allclose(plain.reshape(3, 8).sum(axis=1), 0, atol=1e-5)
    factor = 1 if estimator is GRPO else 5
    np.testing.assert_allclose(estimator(5 * rewards, 8), factor * plain, 1e-4, 1e-5)


@ESTIMATORS
def test_neutral_knobs_are_the_plain_form(estimator):
    rewards = jax.random.normal(jax.random.key(0), (24,))
    plain = estimator(rewards, 8)
    np.testing.assert_array_equal(estimator(rewards, 8, where=jnp.ones(24, bool)), plain)
    if estimator is not RLOO:
        np.testing.assert_array_equal(estimator(rewards, 8, std_floor=0.0), plain)


def test_spread_within_eps_is_no_signal():
    rewards = jnp.array([0.0, 1e-7, 0.0, 1e-7])
    assert np.all(GRPO(rewards, 4) == 0) and np.all(DR_GRPO(rewards, 4) == 0)
    assert np.all(GRPO(rewards, 4, eps=0.0) != 0)


@ESTIMATORS
def test_gradients(estimator):
    with jax.enable_x64(True):
        rewards = jax.random.normal(jax.random.key(0), (12,))
        check_grads(lambda x: estimator(x, 4), (rewards,), order=1, modes=["rev"])


@ESTIMATORS
def test_gradients_are_finite_without_spread(estimator):
    rewards = jnp.array([0.6, 0.6, 0.6, jnp.nan, jnp.nan, 1.0, jnp.nan, jnp.nan, jnp.nan, 1.0, 0.0, 0.0])
    where = jnp.array([True] * 9 + [False] * 3)
    for eps in [1e-6, 0.0]:
        f = estimator if estimator is RLOO else functools.partial(estimator, eps=eps)
        weights = jnp.arange(12.0)
        grads = jax.grad(lambda x, f=f, weights=weights: jnp.sum(weights * f(x, 3, where=where)))(rewards)
        assert np.all(np.isfinite(grads)), f"a group without spread has a gradient {grads}"


@ESTIMATORS
def test_jit_and_vmap(estimator):
    rewards = jax.random.normal(jax.random.key(0), (5, 12))
    where = jax.random.bernoulli(jax.random.key(1), 0.7, (5, 12))
    each = jnp.stack([estimator(r, 4, where=w) for r, w in zip(rewards, where, strict=True)])
    jitted = jax.jit(lambda r, w: estimator(r, 4, where=w))
    np.testing.assert_allclose(jitted(rewards[0], where[0]), each[0], 1e-5, 1e-6)
    np.testing.assert_allclose(jax.vmap(jitted)(rewards, where), each, 1e-5, 1e-6)


@ESTIMATORS
def test_precision(estimator):
    rewards = jnp.array([1.0, 0.0, 0.5, 0.25], jnp.bfloat16)
    assert estimator(rewards, 4).dtype == jnp.float32
    np.testing.assert_array_equal(estimator(rewards, 4), estimator(rewards.astype(jnp.float32), 4))
    with jax.enable_x64(True):
        assert estimator(jnp.ones(4, jnp.float64), 4).dtype == jnp.float64
        assert estimator(jnp.ones(4, jnp.float32), 4).dtype == jnp.float32


@ESTIMATORS
@pytest.mark.parametrize("group_size", [5, 0, -4])
def test_rows_must_divide_into_groups(estimator, group_size):
    with pytest.raises(ValueError, match=f"8 rewards .* group_size={group_size}"):
        estimator(jnp.zeros(8), group_size)


def test_per_token_is_the_row_advantage_inside_the_mask():
    mask = jnp.array([[False, True, True, False], [False] * 4, [True] * 4])
    ours = jax.jit(advantages.per_token)(jnp.array([2.0, jnp.nan, -1.0]), mask)
    np.testing.assert_array_equal(ours, [[0, 2, 2, 0], [0, 0, 0, 0], [-1, -1, -1, -1]])
    many = jax.vmap(advantages.per_token, in_axes=(0, None))(jnp.ones((2, 3), jnp.bfloat16), mask)
    assert many.dtype == jnp.float32
    np.testing.assert_array_equal(many, np.broadcast_to(mask, (2, 3, 4)))
    grads = jax.grad(lambda a: jnp.sum(advantages.per_token(a, mask)))(jnp.array([2.0, jnp.nan, -1.0]))
    np.testing.assert_array_equal(grads, [2, 0, 4])

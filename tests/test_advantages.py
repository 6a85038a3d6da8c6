import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as hypothesis_arrays
from jax.test_util import check_grads

from tapojax import advantages, losses, weights

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


# ---- HAPO's token-level group average ----


def hapo_golden():
    data = golden("hapo_tlga")
    return data, json.loads(str(data["meta_json"]))["cases"]


def in_groups(data, case):
    """Row numbers [P, G], rewards and mask of a case in that order."""
    group = data[f"{case}_group"]
    order = np.stack([np.flatnonzero(group == g) for g in np.unique(group)])
    return order, data[f"{case}_rewards"].sum(axis=1)[order.ravel()], data[f"{case}_mask"][order.ravel()] > 0


@pytest.mark.parametrize("case", hapo_golden()[1])
def test_hapo_token_group_average(case):
    data, meta = hapo_golden()
    order, rewards, mask = in_groups(data, case)
    ours = np.asarray(advantages.token_group_normalize(rewards, mask, order.shape[1]))
    mean, std = (np.repeat(data[f"{case}_{name}"], order.shape[1])[:, None] for name in ("mu_tok", "sd_tok"))
    # On purpose: the reference also falls back where padding columns, as zeros, look like outliers.
    fallback = np.repeat(data[f"{case}_fallback_valid_only"], order.shape[1])[:, None]
    plain = (rewards[:, None] - mean) / (std + 1e-6)
    expected = np.where(fallback, data[f"{case}_adv_grpo"][order.ravel()], plain) * mask
    np.testing.assert_allclose(ours, expected, 1e-5, 1e-6)
    agree = (data[f"{case}_fallback_valid_only"] == data[f"{case}_fallback_released"]).repeat(order.shape[1])
    released = data[f"{case}_adv_masked"][order.ravel()]
    if meta[case]["norm_by_std"]:
        np.testing.assert_allclose(ours[agree], released[agree], 1e-5, 1e-6)
    else:  # without the division: a composition
        np.testing.assert_allclose(ours * (std + 1e-6), released, 1e-5, 1e-6)


def test_padding_alone_makes_the_published_code_fall_back():
    data, _ = hapo_golden()
    for case in ("overlong_all_correct", "single_member"):
        order, rewards, mask = in_groups(data, case)
        ours = np.asarray(advantages.token_group_normalize(rewards, mask, order.shape[1]))
        assert data[f"{case}_fallback_released"].all() and not data[f"{case}_fallback_valid_only"].any()
        np.testing.assert_allclose(data[f"{case}_adv_masked"], data[f"{case}_adv_grpo"] * data[f"{case}_mask"])
        assert np.abs(ours - data[f"{case}_adv_masked"][order.ravel()]).max() > 0.4, "the size of the difference"
    assert np.all(ours == 0), "a row alone in its group has nothing to be compared with"


def token_rollout(seed=0, groups=3, group_size=4, columns=9):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, columns, groups * group_size)
    mask = (np.arange(columns) >= 1) & (np.arange(columns) < 1 + lengths[:, None])
    return rng.normal(size=groups * group_size).astype(np.float32), mask


REWARDS = hypothesis_arrays(np.float32, 12, elements=st.sampled_from([0.0, 1.0, -1.0, 0.6, 0.25, np.nan]))
LENGTHS = hypothesis_arrays(np.int64, 12, elements=st.integers(0, 7))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(REWARDS, LENGTHS)
def test_token_group_average_row_by_row(rewards, lengths):
    """The definition over the list of a group's tokens, in numpy."""
    mask = np.arange(8) < lengths[:, None]
    ours = np.asarray(advantages.token_group_normalize(rewards, mask, 4))
    grpo = np.asarray(GRPO(rewards, 4))
    for i in range(12):
        start, valid = i - i % 4, ~np.isnan(rewards)
        tokens = np.concatenate([[rewards[j]] * lengths[j] for j in range(start, start + 4) if valid[j]] or [[]])
        expected = 0.0
        if valid[i] and lengths[i] and np.ptp(tokens) > 0:
            z = (tokens.astype(np.float64) - tokens.mean(dtype=np.float64)) / (tokens.std(dtype=np.float64) + 1e-6)
            expected = grpo[i] if np.any(np.abs(z) >= 5) else z[np.flatnonzero(tokens == rewards[i])[0]]
        np.testing.assert_allclose(ours[i], expected * mask[i], 1e-4, 1e-5)


def test_token_group_average_worked_examples():
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool)
    ours = advantages.token_group_normalize(jnp.array([1.0, 0.0]), mask, 2)
    np.testing.assert_allclose(ours, [[0.57735, 0.57735, 0.57735, 0], [-1.73205, 0, 0, 0]], 1e-4)
    # one short wrong row beside 31 long right ones: |z| = sqrt(31 * 8) = 15.7
    rare, long = np.ones(32, np.float32), np.ones((32, 8), bool)
    rare[0], long[0, 1:] = 0, False
    np.testing.assert_allclose(
        advantages.token_group_normalize(rare, long, 32), advantages.per_token(GRPO(rare, 32), long)
    )
    off = advantages.token_group_normalize(rare, long, 32, max_abs=np.inf)
    np.testing.assert_allclose(off[0, 0], -np.sqrt(31 * 8), 1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, 0.6, 1 / 3, -0.7, 123456.7])
def test_token_group_average_of_equal_rewards_is_exactly_zero(value):
    _, mask = token_rollout()
    assert np.all(advantages.token_group_normalize(jnp.full(12, value), mask, 4) == 0)


def test_token_group_average_sums_to_zero_over_a_groups_tokens():
    rewards, mask = token_rollout()
    ours = np.asarray(advantages.token_group_normalize(rewards, mask, 4))
    np.testing.assert_allclose(ours.reshape(3, -1).sum(axis=1), 0, atol=1e-4)
    np.testing.assert_allclose((ours.reshape(3, -1) ** 2).sum(axis=1), mask.reshape(3, -1).sum(axis=1), rtol=1e-4)


def test_token_group_average_of_equal_lengths_is_grpo_with_the_population_std():
    rewards, mask = token_rollout()[0], np.ones((12, 5), bool)
    ours = advantages.token_group_normalize(rewards, mask, 4)
    np.testing.assert_allclose(ours, advantages.per_token(GRPO(rewards, 4), mask) * np.sqrt(4 / 3), 1e-4)


def test_token_group_average_leaves_out_rows_without_reward_and_without_tokens():
    rewards, mask = token_rollout(groups=1)
    missing, empty = rewards.copy(), mask.copy()
    missing[2], empty[2] = np.nan, False
    ours = advantages.token_group_normalize(missing, mask, 4)
    others = [0, 1, 3]
    np.testing.assert_allclose(
        ours[jnp.array(others)], advantages.token_group_normalize(rewards[others], mask[others], 3)
    )
    assert np.all(ours[2] == 0)
    np.testing.assert_allclose(advantages.token_group_normalize(rewards, empty, 4), ours, 1e-5, 1e-6)
    assert np.all(advantages.token_group_normalize(rewards, np.zeros_like(mask), 4) == 0)


def test_token_group_average_does_not_depend_on_padding_or_row_order():
    rewards, mask = token_rollout()
    plain = np.asarray(advantages.token_group_normalize(rewards, mask, 4))
    wide = advantages.token_group_normalize(rewards, np.pad(mask, ((0, 0), (2, 5))), 4)
    np.testing.assert_allclose(wide[:, 2:-5], plain, 1e-6)
    order = np.array([8, 11, 9, 10, 3, 2, 1, 0, 4, 5, 6, 7])
    np.testing.assert_allclose(
        advantages.token_group_normalize(rewards[order], mask[order], 4), plain[order], 1e-5, 1e-6
    )


# ---- EDGE-GRPO ----


def test_edge_entropy_driven_advantage():
    data = golden("hapo_edge_adv")
    # The reference takes H̄ over all columns, padding included: that is our mean with a mask of ones.
    everywhere = np.ones(data["mask"].shape, bool)
    np.testing.assert_allclose(GRPO(data["rewards"], 8, eps=1e-4), data["adv"], 1e-5, 1e-6)
    np.testing.assert_allclose(data["entropy"].mean(axis=1), data["per_entropy_mean"], 1e-5)
    np.testing.assert_allclose(
        advantages.entropy_scaled(data["adv"], data["entropy"], everywhere), data["adv_edge"], 1e-5, 1e-6
    )
    ours = advantages.entropy_scaled(data["adv"], data["entropy"], data["mask"] > 0)
    assert np.abs(ours - data["adv_edge"]).max() > 0.1, "the size of the difference"


def test_edge_loss_with_constant_entropy():
    data = golden("hapo_edge_adv")
    mask = jnp.asarray(data["mask"] > 0)

    def total(new):
        scaled = advantages.entropy_scaled(data["adv"], data["entropy"], np.ones(mask.shape, bool))
        per_token = losses.clipped_surrogate(
            new, data["old"], advantages.per_token(scaled, mask), clip_low=0.2, clip_high=0.2
        )
        return jnp.sum(weights.token_mean(mask) * per_token)

    loss, grads = jax.value_and_grad(total)(jnp.asarray(data["new"]))
    np.testing.assert_allclose(loss, data["loss"], atol=1e-5)
    np.testing.assert_allclose(grads, data["grad_const_entropy"], 1e-5, 1e-6)


def test_edge_definition_and_its_floor():
    entropies = np.array([[9.0, 2.0, 4.0], [9.0, 1.0, 9.0], [9.0, 0.0, 0.0], [9.0, 9.0, 9.0]], np.float32)
    mask = np.array([[0, 1, 1], [0, 1, 0], [0, 1, 1], [0, 0, 0]], bool)
    mean = (3 + 1 + 0) / 3  # over the rows that have tokens
    ours = advantages.entropy_scaled(jnp.array([1.0, -1.0, 2.0, 5.0]), entropies, mask)
    np.testing.assert_allclose(ours, [mean / 3, -mean, 2 / 0.1, 0], 1e-6)
    np.testing.assert_allclose(
        advantages.entropy_scaled(jnp.ones(4), entropies, mask, floor=0.5), [mean / 3, mean / 1, 2, 0], 1e-6
    )
    sure = advantages.entropy_scaled(jnp.array([1.0, -1.0, 2.0, 5.0]), np.zeros((4, 3), np.float32), mask)
    np.testing.assert_array_equal(sure, [1, -1, 2, 0], "without any entropy no row is surer than another")


TOKEN_ESTIMATORS = {
    "token_group_normalize": lambda r, h, m: advantages.token_group_normalize(r, m, 4),
    "entropy_scaled": lambda r, h, m: advantages.entropy_scaled(r, h, m),
}
TOKEN_LEVEL = pytest.mark.parametrize("f", TOKEN_ESTIMATORS.values(), ids=TOKEN_ESTIMATORS)


@TOKEN_LEVEL
def test_token_estimators_jit_vmap_precision(f):
    rewards, mask = token_rollout()
    entropies = np.random.default_rng(1).random(mask.shape, np.float32)
    plain = f(rewards, entropies, mask)
    np.testing.assert_allclose(jax.jit(f)(rewards, entropies, mask), plain, 1e-5, 1e-6)
    stacked = [jnp.stack([jnp.asarray(x)] * 2) for x in (rewards, entropies, mask)]
    np.testing.assert_allclose(jax.vmap(f)(*stacked), np.stack([plain] * 2), 1e-5, 1e-6)
    assert f(jnp.asarray(rewards, jnp.bfloat16), entropies, mask).dtype == jnp.float32
    with jax.enable_x64(True):
        assert f(rewards.astype(np.float64), entropies, mask).dtype == jnp.float64


@TOKEN_LEVEL
def test_token_estimators_have_finite_gradients_on_degenerate_rows(f):
    rewards, mask = token_rollout()
    rewards[:4], mask[4:8], mask[9] = 0.6, False, False
    garbage = np.where(mask, 0.0, np.nan).astype(np.float32)
    for g in (
        jax.grad(lambda r: jnp.sum(f(r, garbage, mask)))(jnp.asarray(rewards)),
        jax.grad(lambda h: jnp.sum(f(rewards, h, mask)))(jnp.asarray(garbage)),
    ):
        assert np.all(np.isfinite(g))
    assert np.all(g == 0), "entropies are constants"


@pytest.mark.parametrize("group_size", [5, 0])
def test_tokens_rows_must_divide_into_groups(group_size):
    with pytest.raises(ValueError, match=f"8 rewards .* group_size={group_size}"):
        advantages.token_group_normalize(jnp.zeros(8), np.ones((8, 2), bool), group_size)


# ---- PAPO ----


def papo_golden(name, x64):
    """Rows sorted into their groups of 8, and the same rows' mask."""
    data = golden(f"papo_advantage_{name}")
    order = np.argsort(data["uid"], kind="stable") if name == "verl" else np.arange(len(data["orm"]))
    dtype = np.float64 if x64 else np.float32
    outcome, process = data["orm"][order].astype(dtype), data["prm"][order].astype(dtype)
    return data, order, outcome, process, data["response_mask"][order] > 0


@PRECISIONS
def test_papo_advantages(x64, rtol, atol):
    data, order, o, q, mask = papo_golden("verl", x64)
    shaped = (o + data["overlong_reward"][order]).astype(o.dtype)
    with jax.enable_x64(x64):
        ours = {
            "dual_l1": advantages.decoupled(o, q, o, 8),
            "dual_l06": advantages.decoupled(o, q, o, 8, process_weight=0.6),
            "dual_nostd": DR_GRPO(o, 8) + advantages.correct_only(q, o, 8, scale=False),
            "proc_only": advantages.correct_only(q, o, 8),
            "out_only": advantages.decoupled(o, q, o, 8, process_weight=0.0),
            "fullnorm_l1": advantages.full_norm(o, q, o, 8),
            "fullnorm_l06": advantages.full_norm(o, q, o, 8, process_weight=0.6),
            "mult": advantages.multiplicative(o, q, 8),
            "prm_only": advantages.process_only(q, 8),
            "orm_only_grpo": GRPO(o, 8),
            "dapo_shaped_with_acc": advantages.decoupled(shaped, q, o, 8),
            # correctness read off the shaped reward: penalised right rows are no longer compared by their process
            "dapo_shaped_without_acc": advantages.decoupled(shaped, q, shaped, 8),
        }
        ours = {name: np.asarray(advantages.per_token(rows, mask)) for name, rows in ours.items()}
    for name, rows in ours.items():
        twin = f"adv_f32__{name}" if not x64 and f"adv_f32__{name}" in data else f"adv__{name}"
        theirs, same = data[twin][order], np.ones(64, bool)
        if name.startswith("fullnorm"):
            same[56:] = False  # on purpose: they also read the process scores planted on wrong rows
        np.testing.assert_allclose(rows[same], theirs[same], rtol, atol, err_msg=name)
        if name == "fullnorm_l1":
            read = GRPO(o[56:], 8) + GRPO(q[56:], 8)
            np.testing.assert_allclose(theirs[56:], advantages.per_token(read, mask[56:]), 1e-4, 1e-5)
            assert np.abs(rows[56:] - theirs[56:]).max() > 1, "the size of the difference"


def test_papo_advantages_of_the_roll_port():
    data, _, o, q, mask = papo_golden("roll", False)
    ours = advantages.per_token(advantages.decoupled(o, q, o, int(data["n_sample"])), jnp.asarray(mask))
    np.testing.assert_allclose(ours, data["adv"], 1e-4, 1e-5)


def test_papo_worked_example():
    """A_out ± .935; A_proc of the right rows .783, -.261, -1.306, .783."""
    outcome, process = np.array([1.0, 1, 0, 0, 1, 0, 1, 0]), np.array([1, 0.5, np.nan, np.nan, 0, np.nan, 1, np.nan])
    ours = advantages.decoupled(outcome, process, outcome, 8)
    np.testing.assert_allclose(ours, [1.719, 0.674, -0.935, -0.935, -0.370, -0.935, 1.719, -0.935], atol=1e-3)


def papo_rows(seed=0, rows=60):
    rng = np.random.default_rng(seed)
    correct, process = rng.integers(0, 2, rows).astype(float), rng.choice([0, 0.25, 0.5, 1, np.nan], rows)
    outcome = np.where(rng.random(rows) < 0.1, np.nan, correct - rng.choice([0, 0.3], rows))
    return outcome, process, correct, rng.random(rows) < 0.8


def papo_reference(outcome, process, correct, valid, group_size, weight):
    """The definition, one row at a time."""
    out = reference(outcome, group_size, ~np.isnan(outcome), "grpo")
    for i in range(len(outcome)):
        start = i - i % group_size
        members = [
            j
            for j in range(start, start + group_size)
            if correct[j] == 1 and valid[j] and not np.isnan(process[j]) and not np.isnan(outcome[j])
        ]
        values = process[members]
        if i in members and len(members) > 1 and np.ptp(values) > 0:
            out[i] += weight * (process[i] - values.mean()) / (values.std(ddof=1) + 1e-6)
    return out


@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_papo_definition_row_by_row(weight):
    outcome, process, correct, valid = papo_rows()
    expected = papo_reference(outcome, process, correct, valid, 6, weight)
    assert (expected != 0).mean() > 0.5
    with jax.enable_x64(True):
        ours = advantages.decoupled(outcome, process, correct, 6, process_weight=weight, valid=valid)
        as_nan = advantages.decoupled(outcome, np.where(valid, process, np.nan), correct == 1, 6, process_weight=weight)
    np.testing.assert_allclose(ours, expected, 1e-9, 1e-12)
    np.testing.assert_array_equal(ours, as_nan, "not valid is not NaN, or a boolean `correct` is not 1.0")


@pytest.mark.parametrize("size", [2, 3, 7, 8, 64])
def test_equal_process_scores_give_exactly_zero(size):
    """Where only some rows of a group are right, their mean must not round either."""
    for value in [0.1, 0.6, 1 / 3, -0.7]:
        correct = (np.arange(size + 2) < size).astype(np.float32)
        process = np.where(correct == 1, value, np.random.default_rng(0).random(size + 2)).astype(np.float32)
        ours = advantages.decoupled(correct, process, correct, size + 2)
        np.testing.assert_array_equal(ours, GRPO(correct, size + 2))
        np.testing.assert_array_equal(
            advantages.decoupled(np.ones_like(correct), np.full_like(correct, value), np.ones_like(correct), size + 2),
            0,
        )


def test_a_single_judged_right_row_has_no_process_advantage():
    process = jnp.array([0.5, jnp.nan, 1.0, 0.0])
    np.testing.assert_array_equal(advantages.correct_only(process, jnp.array([1.0, 1, 0, 0]), 4), 0)
    np.testing.assert_array_equal(advantages.correct_only(process, jnp.array([1.0, jnp.nan, jnp.nan, 0]), 4), 0)


def test_no_process_score_of_a_wrong_row_is_read():
    outcome, process, correct, _ = papo_rows()
    for f in (advantages.decoupled, advantages.full_norm):
        expected = f(outcome, process, correct, 6)
        for garbage in [9.0, np.nan, np.inf]:
            other = np.where(correct == 1, process, garbage)
            np.testing.assert_array_equal(f(outcome, other, correct, 6), expected)
    other = np.where(correct == 1, process, np.nan)
    np.testing.assert_array_equal(
        advantages.multiplicative(correct, other, 6), advantages.multiplicative(correct, process, 6)
    )


def test_full_norm_punishes_wrong_rows_twice():
    outcome, process = jnp.array([1.0, 1, 0, 0]), jnp.array([1.0, 0.5, 1, 1])
    ours = advantages.full_norm(outcome, process, outcome, 4)
    np.testing.assert_allclose(ours, GRPO(outcome, 4) + GRPO(jnp.array([1, 0.5, 0, 0]), 4), 1e-6)
    assert ours[2] < advantages.decoupled(outcome, process, outcome, 4)[2] < 0
    np.testing.assert_array_equal(
        advantages.full_norm(outcome, process, outcome, 4, process_weight=0.0), GRPO(outcome, 4)
    )


def test_multiplicative_cannot_tell_badly_reasoned_from_wrong():
    ours = advantages.multiplicative(jnp.array([1.0, 1, 1, 0]), jnp.array([1.0, 0.5, 0, jnp.nan]), 4)
    assert ours[2] == ours[3] and np.isfinite(ours).all()


PAPO = {
    "decoupled": lambda o, q, c: advantages.decoupled(o, q, c, 6),
    "full_norm": lambda o, q, c: advantages.full_norm(o, q, c, 6),
    "multiplicative": lambda o, q, c: advantages.multiplicative(o, q, 6),
    "process_only": lambda o, q, c: advantages.process_only(q, 6),
}


@pytest.mark.parametrize("f", PAPO.values(), ids=PAPO)
def test_papo_estimators_jit_vmap_precision_and_gradients(f):
    rows = [x.astype(np.float32) for x in papo_rows()[:3]]
    plain = f(*rows)
    np.testing.assert_allclose(jax.jit(f)(*rows), plain, 1e-5, 1e-6)
    np.testing.assert_allclose(jax.vmap(f)(*(np.stack([x] * 2) for x in rows)), np.stack([plain] * 2), 1e-5, 1e-6)
    assert f(*(jnp.asarray(x, jnp.bfloat16) for x in rows)).dtype == jnp.float32
    with jax.enable_x64(True):
        assert f(*(x.astype(np.float64) for x in rows)).dtype == jnp.float64
    for argument in (0, 1):
        grads = jax.grad(lambda *x: jnp.sum(jnp.arange(60.0) * f(*x)), argument)(*(jnp.asarray(x) for x in rows))
        assert np.isfinite(grads).all()


@pytest.mark.parametrize("f", PAPO.values(), ids=PAPO)
def test_papo_rows_must_divide_into_groups(f):
    with pytest.raises(ValueError, match="8 rewards .* group_size=6"):
        f(jnp.ones(8), jnp.ones(8), jnp.ones(8))

import functools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tapojax import entropy, losses, weights

PRECISIONS = pytest.mark.parametrize(("x64", "rtol", "atol"), [(True, 1e-6, 1e-7), (False, 1e-4, 1e-6)])


def golden(name):
    return np.load(Path(__file__).parent / "golden" / f"{name}.npz", allow_pickle=False)


class Case(NamedTuple):
    """One golden loss: arrays by their names in the file, our loss and our weights for them."""

    file: str
    case: str
    loss: object
    weigh: object = weights.token_mean
    logprobs: str = "log_prob"
    times: str | None = None  # an array that multiplies the per-token loss
    kl: float = 0.0  # TRL: coefficient of k3
    kl_ratio: bool = False  # TRL: k3 times the ratio


def scaled(weigh, factor):
    return lambda mask: weigh(mask) * factor(mask)


def rows(mask):
    return mask.shape[0]


def tokens(mask):
    return jnp.sum(mask)


def nonempty_share(mask):
    return jnp.mean(jnp.any(mask, axis=1))


def clipped(low, high, dual=None):
    return functools.partial(losses.clipped_surrogate, clip_low=low, clip_high=high, dual_clip=dual)


def unlimited(low, high, dual=None):
    return functools.partial(clipped(low, high, dual), max_log_ratio=jnp.inf)


def cispo(low, high):
    return functools.partial(losses.cispo, clip_low=low, clip_high=high)


def gspo(low, high):
    return functools.partial(losses.sequence_clipped, clip_low=low, clip_high=high)


def constant_length(length):
    return lambda mask: weights.constant_length(mask, length)


PPO3 = clipped(0.2, 0.2, 3.0)
DAPO10 = clipped(0.2, 0.28, 10.0)
NARROW, WIDE = gspo(3e-4, 4e-4), gspo(0.05, 0.08)
# TRL takes the mean over all rows, empty ones counting as 0.
TRL_SEQUENCE_MEAN = scaled(weights.sequence_mean, nonempty_share)
VERL = [
    Case("grpo_loss_verl_vanilla", "token_mean", PPO3),
    Case("grpo_loss_verl_vanilla", "seq_mean_token_sum", PPO3, weights.sequence_sum),
    Case("grpo_loss_verl_vanilla", "seq_mean_token_mean", PPO3, weights.sequence_mean),
    # verl's constant-length modes lack the mean over rows
    Case("grpo_loss_verl_vanilla", "seq_mean_token_sum_norm", PPO3, scaled(constant_length(10), rows)),
    Case("grpo_loss_verl_vanilla", "ext_token_mean", PPO3, logprobs="log_prob_ext"),
    Case("grpo_loss_verl_vanilla", "tis_token_mean", PPO3, times="rollout_is_weights"),
    Case("drgrpo_loss_verl", "seq_mean_token_sum_norm", PPO3, scaled(constant_length(10), rows)),
    Case("drgrpo_loss_verl", "scale10", PPO3, scaled(constant_length(10), rows)),
    Case("drgrpo_loss_verl", "scale3000", PPO3, scaled(constant_length(3000), rows)),
    Case("dapo_loss_verl", "token_mean", DAPO10),
    Case("dapo_loss_verl", "c3_token_mean", clipped(0.2, 0.28, 3.0)),
    Case("dapo_loss_verl", "ext_token_mean", DAPO10, logprobs="log_prob_ext"),
    Case("dapo_loss_verl", "global500_dp4", DAPO10, scaled(weights.token_mean, lambda mask: tokens(mask) / 500 * 4)),
    Case("gspo_loss_verl", "seq_mean_token_mean", NARROW, weights.sequence_mean),
    Case("gspo_loss_verl", "wide_seq_mean_token_mean", WIDE, weights.sequence_mean),
    Case("gspo_loss_verl", "ext_seq_mean_token_mean", WIDE, weights.sequence_mean, "log_prob_ext"),
    Case("cispo_loss_verl", "token_mean", cispo(0.2, 0.28)),
    Case("cispo_loss_verl", "seq_mean_token_mean", cispo(0.2, 0.28), weights.sequence_mean),
    Case("cispo_loss_verl", "oneside_token_mean", cispo(10.0, 0.2)),
    Case("cispo_loss_verl", "ext_token_mean", cispo(0.2, 0.28), logprobs="log_prob_ext"),
]
TRL = [
    Case("grpo_loss_trl", "grpo", unlimited(0.2, 0.2), TRL_SEQUENCE_MEAN),
    Case("grpo_loss_trl", "grpo_beta004", unlimited(0.2, 0.2), TRL_SEQUENCE_MEAN, kl=0.04),
    Case("grpo_loss_trl", "grpo_beta004_biascorr", unlimited(0.2, 0.2), TRL_SEQUENCE_MEAN, kl=0.04, kl_ratio=True),
    Case("grpo_loss_trl", "bnpo", unlimited(0.2, 0.2)),
    # TRL's delta, a cap on the unclipped ratio, is a dual clip
    Case("grpo_loss_trl", "grpo_delta15", unlimited(0.2, 0.28, 1.5), TRL_SEQUENCE_MEAN),
    Case("grpo_loss_trl", "grpo_tis", unlimited(0.2, 0.2), TRL_SEQUENCE_MEAN, times="importance_sampling_ratio_trunc"),
    Case("grpo_loss_trl", "grpo_mis", unlimited(0.2, 0.2), TRL_SEQUENCE_MEAN, times="importance_sampling_ratio_mask"),
    Case("drgrpo_loss_trl", "dr_grpo", unlimited(0.2, 0.2), constant_length(10)),
    Case("drgrpo_loss_trl", "dr_grpo_L4096", unlimited(0.2, 0.2), constant_length(4096)),
    Case("dapo_loss_trl", "dapo", unlimited(0.2, 0.28)),
    Case("dapo_loss_trl", "dapo_beta004", unlimited(0.2, 0.28), kl=0.04),
    Case("gspo_loss_trl", "gspo", NARROW, TRL_SEQUENCE_MEAN),
    Case("gspo_loss_trl", "gspo_wide", WIDE, TRL_SEQUENCE_MEAN),
    # TRL's upper bound is an absolute ratio
    Case("cispo_loss_trl", "cispo_eps5", cispo(1.0, 4.0)),
    Case("cispo_loss_trl", "cispo_eps1_1", cispo(1.0, 1.1 - 1)),
]


def per_token(case, *arrays, mask):
    return case.loss(*arrays, mask) if case.loss.func is losses.sequence_clipped else case.loss(*arrays)


def value_and_grad(case, arrays, mask, times=1.0, ref=None):
    def total(logprobs):
        loss = per_token(case, logprobs, *arrays[1:], mask=mask) * times
        if case.kl:
            kl = losses.kl_k3(logprobs, ref, max_log_ratio=jnp.inf, max_value=jnp.inf)
            loss = loss + case.kl * kl * (jnp.exp(logprobs - arrays[1]) if case.kl_ratio else 1)
        return jnp.sum(case.weigh(mask) * loss)

    return jax.value_and_grad(total)(arrays[0])


@PRECISIONS
@pytest.mark.parametrize("case", VERL, ids=lambda c: f"{c.file}-{c.case}")
def test_verl_loss(case, x64, rtol, atol):
    data = golden(case.file)
    dtype = np.float64 if x64 else np.float32
    with jax.enable_x64(x64):
        arrays = [jnp.asarray(data[k].astype(dtype)) for k in (case.logprobs, "old_log_prob", "advantages")]
        mask = jnp.asarray(data["response_mask"] > 0)
        times = jnp.asarray(data[case.times].astype(dtype)) if case.times else 1.0
        loss, grads = value_and_grad(case, arrays, mask, times)
    reference = data[f"loss__{case.case}"] if x64 else data.get(f"loss_f32__{case.case}", data[f"loss__{case.case}"])
    np.testing.assert_allclose(loss, reference, rtol)
    np.testing.assert_allclose(grads, data[f"grad__{case.case}"], rtol, atol)


@PRECISIONS
@pytest.mark.parametrize("case", TRL, ids=lambda c: f"{c.file}-{c.case}")
def test_trl_loss(case, x64, rtol, atol):
    data = golden(case.file)
    dtype = np.float64 if x64 else np.float32
    names = ("per_token_logps", "old_per_token_logps", "ref_per_token_logps")
    with jax.enable_x64(x64):
        new, old, ref = (jnp.asarray(data[k].astype(dtype)) for k in names)
        advantages = jnp.broadcast_to(jnp.asarray(data["advantages"].astype(dtype))[:, None], new.shape)
        mask = jnp.asarray(data["completion_mask"] > 0)
        times = jnp.asarray(data[case.times].astype(dtype)) if case.times else 1.0
        loss, grads = value_and_grad(case, [new, old, advantages], mask, times, ref)
    np.testing.assert_allclose(loss, data[f"loss__{case.case}"], rtol)
    np.testing.assert_allclose(grads, data[f"grad__{case.case}"], rtol, atol)


@PRECISIONS
def test_trl_rloo_loss(x64, rtol, atol):
    data = golden("rloo_trl")
    dtype = np.float64 if x64 else np.float32
    eps = float(data["loss_epsilon"])
    with jax.enable_x64(x64):
        new, old = (jnp.asarray(data[f"loss_{k}per_token_logps"].astype(dtype)) for k in ("", "old_"))
        mask = jnp.asarray(data["loss_mask"] > 0)
        advantages = jnp.broadcast_to(jnp.asarray(data["loss_advantages"].astype(dtype))[:, None], new.shape)
        loss = functools.partial(losses.sequence_product_clipped, clip_low=eps, clip_high=eps)
        value, grads = jax.value_and_grad(lambda x: jnp.sum(TRL_SEQUENCE_MEAN(mask) * loss(x, old, advantages, mask)))(
            new
        )
    # On purpose: an empty row has ratio 1 in TRL and adds the constant -A to the mean; here it adds nothing.
    empty = np.sum(data["loss_mask"], axis=1) == 0
    constant = np.sum(-data["loss_advantages"][empty].astype(np.float64)) / len(empty)
    np.testing.assert_allclose(value, data["loss"] - constant, rtol)
    np.testing.assert_allclose(grads, data["grad"], rtol, atol)


@PRECISIONS
@pytest.mark.parametrize("prefix", ["", "ext_"])
def test_verl_kl_estimators(prefix, x64, rtol, atol):
    data = golden("kl_estimators_verl")
    estimators = {"k1": losses.kl_k1, "kl": losses.kl_k1, "k2": losses.kl_k2, "mse": losses.kl_k2}
    estimators |= {"k3": losses.kl_k3, "low_var_kl": losses.kl_k3}
    with jax.enable_x64(x64):
        dtype = np.float64 if x64 else np.float32
        new = jnp.asarray(data["log_prob_ext" if prefix else "log_prob"].astype(dtype))
        ref = jnp.asarray(data["ref_log_prob"].astype(dtype))
        for name, kl in estimators.items():
            value, grads = kl(new, ref), jax.grad(lambda x, kl=kl: jnp.sum(kl(x, ref)))(new)
            np.testing.assert_allclose(value, data[f"{prefix}kl__{name}"], rtol, atol, err_msg=name)
            np.testing.assert_allclose(grads, data[f"{prefix}grad__{name}"], rtol, atol, err_msg=name)


@pytest.mark.parametrize("file", ["grpo_loss_verl_vanilla", "drgrpo_loss_verl", "dapo_loss_verl"])
def test_verl_clip_fraction_and_kl_metrics(file):
    data = golden(file)
    low, high = float(data["clip_low"]), float(data["clip_high"])
    with jax.enable_x64(True):
        mask = jnp.asarray(data["response_mask"] > 0)
        w = weights.token_mean(mask)
        for name in [k for k in data.files if k.startswith("metrics__")]:
            new = data["log_prob_ext" if "ext" in name else "log_prob"]
            new, old, advantages = (
                jnp.asarray(x.astype(np.float64)) for x in (new, data["old_log_prob"], data["advantages"])
            )
            clips = losses.clip_fraction(new, old, advantages, clip_low=low, clip_high=high)
            np.testing.assert_allclose(jnp.sum(w * clips), data[name][0], 1e-6, err_msg=name)
            kl = jnp.sum(w * jnp.clip(losses.kl_k1(old, new), -20, 20))
            np.testing.assert_allclose(kl, data[name][1], 1e-6, err_msg=name)


# ---- HAPO and the methods it is compared with: signals and losses together, as the algorithms compose them ----


def meta(name):
    return json.loads(str(golden(name)["meta_json"]))


def of_cases(name):
    return pytest.mark.parametrize("case", meta(name)["cases"])


def golden_batch(data, name, *keys):
    return jnp.asarray(data[f"{name}_mask"] > 0), *(jnp.asarray(data[f"{name}_{key}"]) for key in keys)


@of_cases("hapo_clip_adv")
def test_hapo_clip_and_advantages(case):
    data, knobs = golden("hapo_clip_adv"), meta("hapo_clip_adv")["cases"][case]
    signal = np.abs(data["h_hat"]) if case == "abs_h_recipe" else data["h_hat"]
    clip = dict(clip_low=knobs["cliprange_low"], clip_high=knobs["cliprange_high"])
    low, high = losses.adaptive_clip(signal, **clip, strength=knobs["clip_alpha"])
    np.testing.assert_allclose(low, data[f"{case}_eps_low"], 1e-5, 1e-6)
    np.testing.assert_allclose(high, data[f"{case}_eps_high"], 1e-5, 1e-6)
    clip, strength = dict(clip_low=low, clip_high=high), knobs["adv_beta"]
    ours = losses.redistribute(data["advantages"], signal, data["ratio"], **clip, strength=strength)
    np.testing.assert_allclose(ours, data[f"{case}_adv"], 1e-5, 1e-6)


@pytest.mark.parametrize("sign", ["signed", "released"])
@of_cases("hapo_policy_loss")
def test_hapo_policy_loss(case, sign):
    data, knobs = golden("hapo_policy_loss"), meta("hapo_policy_loss")["cases"][case]
    mask, new, old, advantages, entropies = golden_batch(
        data, "edge" if case == "edge" else "main", "new", "old", "adv", "entropy"
    )
    new = old if case == "onpolicy" else new
    entropies = jnp.full_like(entropies, 0.3) if case == "const_entropy" else entropies
    signal, _ = entropy.signal(entropies, mask, pivot=knobs["entropy_pivot"], signed=sign == "signed")
    low, high = losses.adaptive_clip(
        signal,
        clip_low=knobs["cliprange_low"],
        clip_high=knobs["cliprange_high"],
        strength=knobs["clip_alpha"] * knobs["adaptive_clip"],
    )
    clip, strength = dict(clip_low=low, clip_high=high), knobs["adv_beta"] * knobs["adaptive_advantage"]

    def moved(x):
        return losses.redistribute(advantages, signal, jnp.exp(x - old), **clip, strength=strength)

    def loss(x, dual_clip):
        return losses.clipped_surrogate(x, old, moved(x), **clip, dual_clip=dual_clip)

    w, c, fraction = weights.token_mean(mask), knobs["clip_ratio_c"], losses.clip_fraction(new, old, moved(new), **clip)
    for name, ours in (
        ("loss", jnp.sum(w * loss(new, c))),
        ("grad", jax.grad(lambda x: jnp.sum(w * loss(x, c)))(new)),
        ("clipfrac", jnp.sum(w * fraction)),
        ("clipfrac_count", jnp.sum(mask * fraction)),
        ("clipfrac_lower", jnp.sum(w * (loss(new, c) < loss(new, None)))),
        ("ppo_kl", jnp.sum(w * (old - new))),
    ):
        expected, atol = data[f"{case}_{sign}_{name}"], 1e-5 if name == "loss" else 1e-6
        np.testing.assert_allclose(ours, expected, 1e-5, atol, err_msg=name)
    if f"{case}_{sign}_h_hat" in data:
        for name, ours, atol in (
            ("h_hat", signal, 3e-5),
            ("eps_low", low, 1e-5),
            ("eps_high", high, 1e-5),
            ("adv_redist", moved(new), 1e-5),
        ):
            expected = jnp.asarray(data[f"{case}_{sign}_{name}"])
            np.testing.assert_allclose(ours[mask], expected[mask], 1e-5, atol, err_msg=name)


@of_cases("hapo_dapo_loss")
def test_dapo_loss_of_hapos_comparison(case):
    data, knobs = golden("hapo_dapo_loss"), meta("hapo_dapo_loss")["cases"][case]
    mask, new, old, advantages = golden_batch(data, knobs["data"].split()[0], "new", "old", "adv")
    new = jnp.asarray(data["extreme_new"]) if case == "extreme" else new
    whole = jnp.asarray(mask, float)
    w = {
        "token-mean": weights.token_mean(mask),
        "seq-mean-token-sum": weights.sequence_sum(mask),
        "seq-mean-token-mean": weights.sequence_mean(mask),
        "seq-mean-token-sum-norm": whole / mask.shape[1],
    }[knobs["loss_agg_mode"]]
    if wide := knobs["global_batch_info"]:
        w = whole / wide["batch_num_tokens"] * wide["dp_size"]
    clip, c = dict(clip_low=knobs["clip_low"], clip_high=knobs["clip_high"]), knobs["clip_c"]

    def loss(x):
        return jnp.sum(w * losses.clipped_surrogate(x, old, advantages, **clip, dual_clip=c))

    clipped = losses.clip_fraction(new, old, advantages, **clip)
    np.testing.assert_allclose(loss(new), data[f"{case}_loss"], 1e-5, 1e-5)
    np.testing.assert_allclose(jax.grad(loss)(new), data[f"{case}_grad"], 1e-5, 1e-6)
    np.testing.assert_allclose(jnp.sum(weights.token_mean(mask) * clipped), data[f"{case}_clipfrac"], 1e-5, 1e-6)


@of_cases("hapo_forking_loss")
def test_forking_loss(case):
    """N / K on the kept tokens under the mean over all N is the mean over the kept K."""
    data, knobs = golden("hapo_forking_loss"), meta("hapo_forking_loss")["cases"][case]
    mask, new, old, advantages, entropies = golden_batch(data, knobs["data"], "new", "old", "adv", "entropy")
    kept = entropy.top_fraction(entropies, mask, knobs["entropy_top_ratio"])
    assert (kept.sum(), mask.sum()) == (knobs["selected"], knobs["valid"])

    def surrogate(x, dual_clip=10.0):
        return clipped(0.2, 0.28, dual_clip)(x, old, advantages)

    def total(x):
        return jnp.sum(w * kept * (jnp.sum(mask) / jnp.sum(kept)) * surrogate(x))

    w, fraction = weights.token_mean(mask), losses.clip_fraction(new, old, advantages, clip_low=0.2, clip_high=0.28)
    for name, ours in (
        ("loss", total(new)),
        ("grad", jax.grad(total)(new)),
        ("clipfrac", jnp.sum(w * fraction)),  # over all tokens, kept or not, as in the reference
        ("clipfrac_lower", jnp.sum(w * (surrogate(new) < surrogate(new, None)))),
        ("ppo_kl", jnp.sum(w * (old - new))),
    ):
        np.testing.assert_allclose(ours, data[f"{case}_{name}"], 1e-5, 1e-5 if name == "loss" else 1e-6, err_msg=name)


@of_cases("hapo_archer_loss")
def test_archer_loss(case):
    data, knobs = golden("hapo_archer_loss"), meta("hapo_archer_loss")["cases"][case]
    mask, new, old, advantages, entropies, ref = golden_batch(
        data, knobs["data"], "new", "old", "adv", "entropy", "ref"
    )
    high = entropy.above_quantile(entropies, mask, knobs["quantile"])
    classes = {"low": mask & ~high, "high": high}
    bound = jnp.where(high, knobs["high_eps"][0], knobs["low_eps"][0])

    def surrogate(x, dual_clip=10.0):
        return clipped(bound, bound, dual_clip)(x, old, advantages)

    def loss(x):
        kl = losses.kl_k3(x, ref)
        coef = sum(knobs[f"kl_coef_{name}"] * m * (jnp.sum(mask) / jnp.sum(m)) for name, m in classes.items())
        return surrogate(x) + coef * kl

    w, fraction = weights.token_mean(mask), losses.clip_fraction(new, old, advantages, clip_low=bound, clip_high=bound)
    for name, ours in (
        ("pg_loss", jnp.sum(w * surrogate(new))),
        ("grad_pg", jax.grad(lambda x: jnp.sum(w * surrogate(x)))(new)),
        ("total_loss", jnp.sum(w * loss(new))),
        ("grad_total", jax.grad(lambda x: jnp.sum(w * loss(x)))(new)),
        ("kl_low", jnp.sum(weights.token_mean(classes["low"]) * losses.kl_k3(new, ref))),
        ("kl_high", jnp.sum(weights.token_mean(classes["high"]) * losses.kl_k3(new, ref))),
        ("clipfrac", jnp.sum(w * fraction)),
        ("clipfrac_lower", jnp.sum(w * (surrogate(new) < surrogate(new, None)))),
        ("ppo_kl", jnp.sum(w * (old - new))),
    ):
        np.testing.assert_allclose(ours, data[f"{case}_{name}"], 1e-5, 1e-5 if "loss" in name else 1e-6, err_msg=name)


# ---- properties ----


def rollout(seed=0, shape=(6, 8), spread=0.4):
    """New and old log-probs, per-token advantages, and a mask with a prompt, padding and an empty row."""
    keys = jax.random.split(jax.random.key(seed), 4)
    old = -jnp.abs(jax.random.normal(keys[0], shape))
    new = old + spread * jax.random.normal(keys[1], shape)
    position, lengths = jnp.arange(shape[1])[None, :], jax.random.randint(keys[3], (shape[0], 1), 1, shape[1])
    mask = ((position >= 1) & (position < 1 + lengths)).at[-1].set(False)
    return new, old, jax.random.normal(keys[2], shape), mask


def with_mask(loss):
    return lambda new, old, advantages, mask: loss(new, old, advantages)


def hapo(new, old, advantages, signal, strength=1.0, dual_clip=10.0):
    low, high = losses.adaptive_clip(signal, clip_low=0.2, clip_high=0.28, strength=strength)
    clip = dict(clip_low=low, clip_high=high)
    moved = losses.redistribute(advantages, signal, jnp.exp(losses.kl_k1(new, old)), **clip, strength=strength)
    return losses.clipped_surrogate(new, old, moved, **clip, dual_clip=dual_clip)


LOSSES = {
    "clipped": with_mask(clipped(0.2, 0.28)),
    "dual": with_mask(clipped(0.2, 0.2, 3)),
    "cispo": with_mask(cispo(0.2, 0.28)),
    "clip_fraction": with_mask(functools.partial(losses.clip_fraction, clip_low=0.2, clip_high=0.28)),
    "gspo": gspo(0.05, 0.08),
    "product": functools.partial(losses.sequence_product_clipped, clip_low=0.2, clip_high=0.2),
    "hapo": lambda new, old, advantages, mask: hapo(new, old, advantages, jnp.sin(40 * losses.kl_k1(old, 0 * old))),
    "k1": lambda new, old, advantages, mask: losses.kl_k1(new, old),
    "k2": lambda new, old, advantages, mask: losses.kl_k2(new, old),
    "k3": lambda new, old, advantages, mask: losses.kl_k3(new, old),
}
ALL = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
SEQUENCE = pytest.mark.parametrize("name", ["gspo", "product"])


@ALL
def test_first_inner_step_is_the_policy_gradient(loss):
    """Where new == old: surrogates have value and gradient -A, CISPO the gradient, KL terms and metrics value 0."""
    _, old, advantages, mask = rollout()
    w = jnp.where(mask, 1.0, 0.0)
    value = loss(old, old, advantages, mask)
    grads = jax.grad(lambda x: jnp.sum(w * loss(x, old, advantages, mask)))(old)
    name = next(k for k, v in LOSSES.items() if v is loss)
    if name in ("clipped", "dual", "gspo", "product"):
        np.testing.assert_allclose(w * value, -w * advantages, 1e-6)
    elif name == "hapo":  # sure tokens that rest are damped
        damped = 1 + jnp.minimum(jnp.sin(40 * old), 0)
        np.testing.assert_allclose(w * value, -w * advantages * damped, 1e-6, 1e-6)
    elif name != "cispo":
        np.testing.assert_array_equal(value, jnp.zeros_like(old))
    length = jnp.sum(mask, axis=1, keepdims=True)
    factor = {"clipped": -1, "dual": -1, "cispo": -1, "gspo": -1, "product": -length}.get(name)
    if factor is not None:
        np.testing.assert_allclose(grads, w * factor * advantages, 1e-6, err_msg="the first step's gradient is not -A")


@ALL
def test_no_nan_from_garbage_that_the_caller_masks(loss):
    new, old, advantages, mask = rollout()

    def total(x, garbage):
        clean = [jnp.where(mask, y, 0) for y in (x, jnp.where(mask, old, garbage), advantages)]
        return jnp.sum(weights.sequence_mean(mask) * loss(*clean, mask))

    expected = jax.value_and_grad(total)(new, 0.0)
    for garbage in (jnp.nan, jnp.inf, -jnp.inf, 1e30):
        value, grads = jax.value_and_grad(total)(jnp.where(mask, new, garbage), garbage)
        np.testing.assert_array_equal(value, expected[0])
        np.testing.assert_array_equal(grads, expected[1])
        assert np.all(np.asarray(grads)[~np.asarray(mask)] == 0)


@SEQUENCE
def test_sequence_losses_mask_garbage_themselves(name):
    new, old, advantages, mask = rollout()
    loss = LOSSES[name]
    expected = loss(new, old, advantages, mask)
    assert np.all(np.asarray(expected)[~np.asarray(mask)] == 0)
    for garbage in (jnp.nan, jnp.inf, -jnp.inf):
        dirty = [jnp.where(mask, x, garbage) for x in (new, old, advantages)]
        np.testing.assert_array_equal(loss(*dirty, mask), expected)
        grads = jax.grad(lambda x, dirty=dirty: jnp.sum(loss(x, *dirty[1:], mask)))(dirty[0])
        assert np.all(np.isfinite(grads)) and np.all(np.asarray(grads)[~np.asarray(mask)] == 0)


@ALL
def test_padding_does_not_matter(loss):
    arrays = rollout()
    padded = [jnp.pad(x, ((0, 3), (2, 5))) for x in arrays]
    np.testing.assert_allclose(loss(*padded)[:-3, 2:-5], loss(*arrays), 1e-5, 1e-6)
    np.testing.assert_array_equal(loss(*padded)[-3:], 0, "an empty row must give 0")


@ALL
def test_extreme_log_ratios_stay_finite(loss):
    old, advantages, mask = jnp.full((2, 3), -1.0), jnp.array([[1.0, 0.0, -1.0]] * 2), jnp.ones((2, 3), bool)
    new = jnp.array([[1e3] * 3, [-1e3] * 3])
    value, grads = jax.value_and_grad(lambda x: jnp.sum(loss(x, old, advantages, mask)))(new)
    assert np.isfinite(value) and np.all(np.isfinite(grads))


@ALL
def test_jit_and_vmap(loss):
    stacked = [jnp.stack(x) for x in zip(*(rollout(seed) for seed in range(3)), strict=True)]
    each = jnp.stack([loss(*rollout(seed)) for seed in range(3)])
    np.testing.assert_allclose(jax.jit(loss)(*rollout(0)), each[0], 1e-5, 1e-6)
    np.testing.assert_allclose(jax.vmap(loss)(*stacked), each, 1e-5, 1e-6)


@ALL
def test_precision(loss):
    new, old, advantages, mask = rollout()
    half = [x.astype(jnp.bfloat16) for x in (new, old, advantages)]
    assert loss(*half, mask).dtype == jnp.float32
    np.testing.assert_array_equal(loss(*half, mask), loss(*(x.astype(jnp.float32) for x in half), mask))
    with jax.enable_x64(True):
        assert loss(new, old, advantages, mask).dtype == jnp.float32
        assert loss(*(x.astype(jnp.float64) for x in (new, old, advantages)), mask).dtype == jnp.float64


@pytest.mark.parametrize("name", ["clipped", "dual", "k1", "k2", "k3"])
def test_gradients_are_those_of_the_value(name):
    with jax.enable_x64(True):
        new, old, advantages, mask = (x.astype(jnp.float64) if x.dtype != bool else x for x in rollout())
        check_grads(lambda x: LOSSES[name](x, old, advantages, mask), (new,), order=1, modes=["rev"])


def test_neutral_knobs_are_the_parent():
    new, old, advantages, _ = rollout()
    plain = clipped(0.2, 0.2)(new, old, advantages)
    np.testing.assert_array_equal(clipped(0.2, 0.2, jnp.inf)(new, old, advantages), plain)
    np.testing.assert_array_equal(unlimited(0.2, 0.2)(new, old, advantages), plain)
    np.testing.assert_array_equal(clipped(jnp.full_like(new, 0.2), 0.2)(new, old, advantages), plain)
    ratio = jnp.exp(new - old)
    np.testing.assert_array_equal(clipped(jnp.inf, jnp.inf)(new, old, advantages), -advantages * ratio)
    np.testing.assert_array_equal(
        losses.kl_k3(new, old), losses.kl_k3(new, old, max_log_ratio=jnp.inf, max_value=jnp.inf)
    )


@SEQUENCE
def test_one_token_rows_reduce_to_the_clipped_surrogate(name):
    new, old, advantages, _ = rollout()
    mask = jnp.zeros(new.shape, bool).at[:, 2].set(True)
    low, high = {"gspo": (0.05, 0.08), "product": (0.2, 0.2)}[name]
    plain = clipped(low, high)

    def total(loss, x):
        return jnp.sum(jnp.where(mask, loss(x), 0))

    ours = jax.value_and_grad(lambda x: total(lambda y: LOSSES[name](y, old, advantages, mask), x))(new)
    parent = jax.value_and_grad(lambda x: total(lambda y: plain(y, old, advantages), x))(new)
    np.testing.assert_array_equal(ours[0], parent[0])
    np.testing.assert_array_equal(ours[1], parent[1])


def test_clip_per_token_takes_each_tokens_bounds():
    new, old, advantages, _ = rollout()
    low, high = jnp.where(new > -0.7, 0.1, 0.3), jnp.where(old > -0.5, 0.05, 0.4)
    for f in (losses.clipped_surrogate, losses.cispo, losses.clip_fraction):
        ours = f(new, old, advantages, clip_low=low, clip_high=high)
        for index in np.ndindex(new.shape):
            bounds = {"clip_low": float(low[index]), "clip_high": float(high[index])}
            one = f(*(x[index].reshape(1, 1) for x in (new, old, advantages)), **bounds)
            np.testing.assert_allclose(ours[index], one[0, 0], 1e-6)


def test_gradient_is_zero_exactly_where_clipped():
    delta = jnp.array([[0.5, -0.5, 0.5, -0.5, 0.1, -0.1, 1.2, 21.0, -21.0]])
    advantages = jnp.array([[1.0, 1, -1, -1, 1, -1, -1, -1, 1]])
    moves = np.array([[0, 1, 1, 0, 1, 1, 0, 0, 0]], bool)
    old = jnp.full(delta.shape, -1.0)
    loss = clipped(0.2, 0.28, 3.0)
    grads = jax.grad(lambda x: jnp.sum(loss(x, old, advantages)))(old + delta)
    np.testing.assert_array_equal(grads != 0, moves)
    np.testing.assert_allclose(grads[moves], -(advantages * jnp.exp(delta))[moves], 1e-5)
    value = loss(old + delta, old, advantages)
    np.testing.assert_allclose(value[0, [0, 3, 6]], [-1.28, 0.8, 3.0], 1e-6)
    fraction = losses.clip_fraction(old + delta, old, advantages, clip_low=0.2, clip_high=0.28)
    np.testing.assert_array_equal(fraction, [[1, 0, 0, 1, 0, 0, 0, 0, 0]])


def test_a_ratio_exactly_on_the_bound_keeps_its_gradient():
    old, advantages = jnp.zeros((1, 2)), jnp.array([[1.0, -1.0]])
    grads = jax.grad(lambda x: jnp.sum(clipped(0.0, 0.0)(x, old, advantages)))(old)
    np.testing.assert_array_equal(grads, -advantages)


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    new, old, advantages, _ = rollout(spread=1.0)
    for low in (0.2, 1.0, 10.0):
        grads = jax.grad(lambda x, low=low: jnp.sum(cispo(low, 0.28)(x, old, advantages)))(new)
        expected = -jnp.clip(jnp.exp(new - old), max(1 - low, 0), 1.28) * advantages
        np.testing.assert_allclose(grads, expected, 1e-5)


@SEQUENCE
def test_sequence_losses_credit_each_token_with_its_own_advantage(name):
    new, old, advantages, mask = rollout(spread=0.01)
    delta = jnp.sum(jnp.where(mask, new - old, 0), axis=1, keepdims=True)
    length = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
    grads = jax.grad(lambda x: jnp.sum(weights.sequence_mean(mask) * LOSSES[name](x, old, advantages, mask)))(new)
    ratio = jnp.exp(delta / length) / length if name == "gspo" else jnp.exp(delta)
    expected = jnp.where(mask, -advantages * ratio, 0) / jnp.sum(jnp.any(mask, axis=1))
    np.testing.assert_allclose(grads, expected, 1e-4, 1e-7)


@pytest.mark.parametrize("name", ["gspo", "product"])
def test_sequence_gradients_equal_the_plain_form_for_row_advantages(name):
    """The ratio of the whole row with its gradient through the mean (GSPO) or the sum (RLOO), per row."""
    new, old, advantages, mask = rollout(spread=0.1)
    row, w = jnp.broadcast_to(advantages[:, :1], new.shape), weights.sequence_mean(mask)
    low, high = {"gspo": (0.05, 0.08), "product": (0.2, 0.2)}[name]

    def plain(x):
        z = jnp.sum(jnp.where(mask, x - old, 0), axis=1, keepdims=True)
        z = z / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1) if name == "gspo" else z
        return jnp.sum(w * jnp.maximum(-row * jnp.exp(z), -row * jnp.clip(jnp.exp(z), 1 - low, 1 + high)))

    ours = jax.value_and_grad(lambda x: jnp.sum(w * LOSSES[name](x, old, row, mask)))(new)
    expected = jax.value_and_grad(plain)(new)
    np.testing.assert_allclose(ours[0], expected[0], 1e-5)
    np.testing.assert_allclose(ours[1], expected[1], 1e-4, 1e-7)


def test_kl_estimators_are_never_negative_and_keep_small_differences():
    new, ref, _, _ = rollout(spread=1.0)
    assert np.all(losses.kl_k2(new, ref) >= 0) and np.all(losses.kl_k3(new, ref) >= 0)
    small = jnp.full((1, 1), 3e-3)
    np.testing.assert_allclose(losses.kl_k3(small, jnp.zeros((1, 1))), 4.4955034e-6, 1e-3, err_msg="k3 lost its digits")


def test_kl_k3_limits_both_signs_of_the_log_ratio():
    new, ref = jnp.array([[30.0, -30.0]]), jnp.zeros((1, 2))
    kl = functools.partial(losses.kl_k3, max_log_ratio=5.0, max_value=jnp.inf)
    np.testing.assert_allclose(kl(new, ref), [[np.exp(-5) + 4, np.exp(5) - 6]], 1e-6)
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(kl(x, ref)))(new), [[0, 0]])


def test_dual_clip_must_exceed_one():
    new, old, advantages, _ = rollout()
    with pytest.raises(ValueError, match=r"dual_clip=0\.5"):
        clipped(0.2, 0.2, 0.5)(new, old, advantages)


# ---- HAPO ----


def signal_like(x, seed=5):
    return jax.random.uniform(jax.random.key(seed), x.shape, minval=-1, maxval=1)


def test_hapo_without_strength_is_the_clipped_surrogate():
    new, old, advantages, _ = rollout()
    for loss in (lambda f: f(new), lambda f: jax.grad(lambda x: jnp.sum(f(x)))(new)):
        ours = loss(lambda x: hapo(x, old, advantages, signal_like(new), strength=0.0, dual_clip=3.0))
        np.testing.assert_array_equal(ours, loss(lambda x: clipped(0.2, 0.28, 3.0)(x, old, advantages)))
    low, high = losses.adaptive_clip(jnp.zeros_like(new), clip_low=0.2, clip_high=0.28)
    np.testing.assert_array_equal(low, jnp.full_like(new, 0.2))
    np.testing.assert_array_equal(high, jnp.full_like(new, 0.28))


def test_the_adaptive_clip_widens_one_side_and_never_inverts():
    signal = jnp.array([[-1.0, -0.5, 0.0, 0.5, 1.0]])
    low, high = losses.adaptive_clip(signal, clip_low=0.2, clip_high=0.3)
    np.testing.assert_allclose(low, [[0.4, 0.3, 0.2, 0.2, 0.2]], 1e-6)
    np.testing.assert_allclose(high, [[0.3, 0.3, 0.3, 0.45, 0.6]], 1e-6)
    low, high = losses.adaptive_clip(signal, clip_low=0.2, clip_high=0.3, strength=0.5)
    np.testing.assert_allclose(low[0, 0], 0.3, 1e-6)
    np.testing.assert_allclose(high[0, -1], 0.45, 1e-6)


def test_redistribution_case_by_case():
    """Amplified: unsure and on the move. Damped: sure and at rest. The neutral zone is open: its edge is a move."""
    at_rest, moving, edge = 1.05, 1.3, 1.125
    ratio = jnp.array([[at_rest, moving, edge] * 2, [0.95, 0.7, 0.875] * 2])
    signal = jnp.array([[0.5] * 3 + [-0.5] * 3] * 2)
    factors = np.array([[1, 1.5, 1.5, 0.5, 1, 1]] * 2)
    for sign in (2.0, -2.0):
        advantages = jnp.full(ratio.shape, sign)
        ours = losses.redistribute(advantages, signal, ratio, clip_low=0.25, clip_high=0.25)
        np.testing.assert_allclose(ours, sign * factors, 1e-6)
        halved = losses.redistribute(advantages, signal, ratio, clip_low=0.25, clip_high=0.25, strength=0.5)
        np.testing.assert_allclose(halved, sign * (1 + (factors - 1) / 2), 1e-6)
    zero = losses.redistribute(jnp.ones((1, 2)), jnp.zeros((1, 2)), ratio[:1, :2], clip_low=0.25, clip_high=0.25)
    np.testing.assert_array_equal(zero, 1, "a token at the pivot is left alone")


def test_redistribution_never_turns_an_advantage_around():
    new, old, advantages, _ = rollout(spread=1.0)
    for signal in (signal_like(new), jnp.sign(signal_like(new))):
        ours = losses.redistribute(advantages, signal, jnp.exp(new - old), clip_low=0.2, clip_high=0.28)
        assert np.all(ours * advantages >= 0) and np.all(np.abs(ours) <= 2 * np.abs(advantages))


def test_hapo_signals_bounds_and_advantages_are_constants():
    new, old, advantages, _ = rollout()
    clip = dict(clip_low=0.2, clip_high=0.28)
    for argument in range(3):
        arguments = [advantages, signal_like(new), jnp.exp(new - old)]

        def moved(x, argument=argument, arguments=arguments):
            return jnp.sum(losses.redistribute(*arguments[:argument], x, *arguments[argument + 1 :], **clip))

        np.testing.assert_array_equal(jax.grad(moved)(arguments[argument]), 0)
    for side in range(2):
        grads = jax.grad(lambda x, side=side: jnp.sum(losses.adaptive_clip(x, **clip)[side]))(signal_like(new))
        np.testing.assert_array_equal(grads, 0)

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tapojax import correction

DATA = np.load(Path(__file__).parent / "golden" / "kl_rollout_correction_verl.npz", allow_pickle=False)
MASK = DATA["response_mask"] > 0
WEIGHTS = [re.fullmatch(r"w__(token|sequence)_thr([\d.]+)_bn([01])", k) for k in DATA.files if k.startswith("w__")]
REJECTIONS = [
    re.fullmatch(r"rsmask__(token|seq_mean|seq_sum|seq_max)_(k\d)__([\d.]+)(?:_([\d.]+))?", k)
    for k in DATA.files
    if k.startswith("rsmask__")
]
VALID = [(e, v) for e in ("k1", "k2", "k3") for v in ("token", "mean", "sum", "max") if (e, v) != ("k1", "max")]


def inputs(dtype=np.float64):
    old, behaviour = DATA["old_log_prob"].astype(dtype), DATA["rollout_log_prob"].astype(dtype)
    return jnp.asarray(old), jnp.asarray(behaviour), jnp.asarray(MASK)


def numpy_rejection(estimator, level, low, high):
    """The definition, one row at a time."""
    kept = np.zeros_like(MASK)
    for i, mask in enumerate(MASK):
        x = (DATA["old_log_prob"][i].astype(np.float64) - DATA["rollout_log_prob"][i])[mask]
        k = {"k1": -x, "k2": x**2 / 2, "k3": np.exp(x) - 1 - x}[estimator]
        statistic = k if level == "token" or not k.size else getattr(np, level)(k)
        kept[i, mask] = (low <= statistic) & (statistic <= high)
    return kept


@pytest.mark.parametrize("match", WEIGHTS, ids=lambda m: m[0])
@pytest.mark.parametrize(("x64", "rtol"), [(True, 1e-6), (False, 1e-4)])
def test_verl_rollout_weights(match, x64, rtol):
    with jax.enable_x64(x64):
        old, behaviour, mask = inputs(np.float64 if x64 else np.float32)
        ours = correction.truncated_ratio(
            old, behaviour, mask, level=match[1], cap=float(match[2]), normalize=match[3] == "1"
        )
    np.testing.assert_allclose(ours, DATA[match[0]], rtol, 1e-7)


@pytest.mark.parametrize("match", REJECTIONS, ids=lambda m: m[0])
def test_verl_rejection_masks(match):
    estimator, level = match[2], match[1].removeprefix("seq_")
    if estimator == "k1":  # verl states the range of k1 as ratios of behaviour over old
        low, high = np.log(float(match[3])), np.log(float(match[4]))
    else:
        low, high = -np.inf, float(match[3])
    with jax.enable_x64(True):
        ours = correction.rejection_mask(*inputs(), estimator=estimator, level=level, low=float(low), high=float(high))
    np.testing.assert_array_equal(ours, DATA[match[0]] > 0)


@pytest.mark.parametrize(("estimator", "level"), VALID)
def test_rejection_row_by_row(estimator, level):
    low, high = (-0.2, 0.3) if estimator == "k1" else (0.01, 0.2)
    with jax.enable_x64(True):
        ours = correction.rejection_mask(*inputs(), estimator=estimator, level=level, low=low, high=high)
    np.testing.assert_array_equal(ours, numpy_rejection(estimator, level, low, high))
    assert 0 < np.sum(ours) < np.sum(MASK)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("normalize", [False, True])
def test_weights_are_one_without_mismatch(level, normalize):
    old, _, mask = inputs(np.float32)
    ours = correction.truncated_ratio(old, old, mask, level=level, cap=1.0, normalize=normalize)
    np.testing.assert_array_equal(ours, MASK)


def test_infinite_cap_is_the_plain_ratio():
    old, behaviour, mask = inputs(np.float32)
    ours = correction.truncated_ratio(old, behaviour, mask, level="token", cap=jnp.inf)
    np.testing.assert_allclose(ours, jnp.where(mask, jnp.exp(old - behaviour), 0), 1e-6)


@pytest.mark.parametrize(("estimator", "level"), VALID)
def test_infinite_bounds_reject_nothing(estimator, level):
    ours = correction.rejection_mask(*inputs(np.float32), estimator=estimator, level=level, low=-jnp.inf, high=jnp.inf)
    np.testing.assert_array_equal(ours, MASK)


@pytest.mark.parametrize("garbage", [jnp.nan, jnp.inf, -jnp.inf, 1e30])
def test_entries_outside_the_mask_do_not_matter(garbage):
    old, behaviour, mask = inputs(np.float32)
    dirty = jnp.where(mask, old, garbage), jnp.where(mask, behaviour, -garbage), mask
    for level in ("token", "sequence"):
        weigh = functools.partial(correction.truncated_ratio, level=level, cap=2.0, normalize=True)
        np.testing.assert_array_equal(weigh(*dirty), weigh(old, behaviour, mask))
        # Weights are constants of the loss.
        grads = jax.grad(lambda o, b, m, weigh=weigh: jnp.sum(weigh(o, b, m)), argnums=(0, 1))(*dirty)
        np.testing.assert_array_equal(grads, jnp.zeros((2, *mask.shape)))
    for estimator, level in VALID:
        reject = functools.partial(correction.rejection_mask, estimator=estimator, level=level, low=0.0, high=0.1)
        np.testing.assert_array_equal(reject(*dirty), reject(old, behaviour, mask))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_padding_empty_masks_and_extreme_ratios(level):
    old, behaviour, mask = inputs(np.float32)
    weigh = functools.partial(correction.truncated_ratio, level=level, cap=2.0, normalize=True)
    padded = weigh(*(jnp.pad(x, ((0, 2), (3, 4))) for x in (old, behaviour, mask)))
    np.testing.assert_allclose(padded[:-2, 3:-4], weigh(old, behaviour, mask), 1e-6)
    np.testing.assert_array_equal(weigh(old, behaviour, jnp.zeros_like(mask)), jnp.zeros(mask.shape))
    ones = jnp.ones((1, 3), bool)
    for difference in (1e4, -1e4):
        extreme = correction.truncated_ratio(jnp.full((1, 3), difference), jnp.zeros((1, 3)), ones, level=level, cap=2)
        np.testing.assert_allclose(extreme, jnp.full((1, 3), 2.0 if difference > 0 else np.exp(-20)), 1e-5)


def test_jit_vmap_and_precision():
    old, behaviour, mask = inputs(np.float32)
    stacked = jnp.stack([old, old[::-1]]), jnp.stack([behaviour, behaviour[::-1]]), jnp.stack([mask, mask[::-1]])
    weigh = functools.partial(correction.truncated_ratio, level="sequence", cap=2.0)
    reject = functools.partial(correction.rejection_mask, estimator="k3", level="max", low=0.0, high=0.2)
    for f in (weigh, reject):
        np.testing.assert_allclose(jax.jit(f)(old, behaviour, mask), f(old, behaviour, mask), 1e-6)
        np.testing.assert_allclose(jax.vmap(f)(*stacked)[1], f(old, behaviour, mask)[::-1], 1e-6)
    assert weigh(old.astype(jnp.bfloat16), behaviour.astype(jnp.bfloat16), mask).dtype == jnp.float32
    with jax.enable_x64(True):
        assert weigh(*inputs(np.float64)).dtype == jnp.float64
        assert weigh(*inputs(np.float32)).dtype == jnp.float32


def test_unknown_choices_are_named():
    arrays = inputs(np.float32)
    with pytest.raises(ValueError, match="level='row'"):
        correction.truncated_ratio(*arrays, level="row", cap=2.0)
    for estimator, level in [("k4", "token"), ("k1", "row")]:
        with pytest.raises(ValueError, match=f"estimator='{estimator}', level='{level}'"):
            correction.rejection_mask(*arrays, estimator=estimator, level=level, low=0.0, high=1.0)
    with pytest.raises(ValueError, match="maximum of the signed"):
        correction.rejection_mask(*arrays, estimator="k1", level="max", low=0.0, high=1.0)


# ---- statistics


def test_mismatch_by_hand():
    """λ = 0.5, -1, 0 inside the mask."""
    old, behaviour = jnp.array([[-1.0, -2.0, 5.0], [-3.0, 9.0, 9.0]]), jnp.array([[-1.5, -1.0, -9.0], [-3.0, 0.0, 0.0]])
    got = correction.mismatch(old, behaviour, jnp.array([[True, True, False], [True, False, False]]))
    assert {name: float(value) for name, value in got.items()} == {
        "mismatch_max": 1.0,
        "mismatch_mean": 0.5,
        "mismatch_k3": pytest.approx((np.exp(0.5) - 1.5 + np.exp(-1)) / 3, rel=1e-6),
    }


def test_mismatch_is_that_of_the_golden_rows_and_of_their_rejection():
    with jax.enable_x64(True):
        old, behaviour, mask = inputs()
        got = correction.mismatch(old, behaviour, mask)
        x = (DATA["old_log_prob"].astype(np.float64) - DATA["rollout_log_prob"])[MASK]
        want = {"max": np.abs(x).max(), "mean": np.abs(x).mean(), "k3": (np.exp(x) - 1 - x).mean()}
        for name, value in want.items():
            np.testing.assert_allclose(got[f"mismatch_{name}"], value, 1e-6, err_msg=name)
        whole = functools.partial(correction.rejection_mask, old.reshape(1, -1), behaviour.reshape(1, -1))
        for high, kept in ((0.999 * want["k3"], False), (1.001 * want["k3"], True)):  # the mean of one long row
            rejected = whole(mask.reshape(1, -1), estimator="k3", level="mean", low=-1.0, high=high)
            assert bool(rejected.any()) == kept, "a limit means the same for warning and for masking"


@pytest.mark.parametrize("garbage", [jnp.nan, jnp.inf, 1e30])
def test_mismatch_reads_the_mask_only_and_has_no_gradient(garbage):
    old, behaviour, mask = inputs(np.float32)
    dirty = jnp.where(mask, old, garbage), jnp.where(mask, behaviour, -garbage), mask
    clean = correction.mismatch(old, behaviour, mask)
    for name, value in jax.jit(correction.mismatch)(*dirty).items():
        np.testing.assert_allclose(value, clean[name], 1e-6, err_msg=name)
    grads = jax.grad(lambda o, b, m: sum(correction.mismatch(o, b, m).values()), argnums=(0, 1))(*dirty)
    np.testing.assert_array_equal(grads, jnp.zeros((2, *mask.shape)))


def test_mismatch_of_nothing_is_0_and_of_what_is_no_number_is_none():
    old, behaviour, mask = inputs(np.float32)
    assert not any(correction.mismatch(old, behaviour, jnp.zeros_like(mask)).values())
    assert not any(correction.mismatch(old, old, mask).values())
    broken = correction.mismatch(jnp.where(mask, jnp.nan, 0), behaviour, mask)
    assert all(jnp.isnan(value) for value in broken.values()), "a limit must not pass it"
    huge = correction.mismatch(jnp.full((1, 2), 1e4), jnp.zeros((1, 2)), jnp.ones((1, 2), bool))
    assert jnp.isfinite(huge["mismatch_k3"]) and float(huge["mismatch_max"]) == 1e4

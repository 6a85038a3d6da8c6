import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tapojax import entropy

SHAPE = (4, 6)
# one shape, so that each function compiles once; without a deadline, for the first example compiles
PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)
ENTROPIES = arrays(np.float32, SHAPE, elements=st.floats(0, 5, width=32))
DISTINCT = arrays(np.float32, SHAPE, elements=st.integers(0, 10_000), unique=True).map(lambda x: x / np.float32(1000))
MASKS = arrays(bool, SHAPE)


def golden(name):
    data = np.load(Path(__file__).parent / "golden" / f"{name}.npz", allow_pickle=False)
    return data, json.loads(str(data["meta_json"]))["cases"]


def cases(name):
    return pytest.mark.parametrize("case", golden(name)[1])


def batch(seed=0, shape=(6, 9)):
    """Entropies over many magnitudes with garbage outside a ragged mask, one row empty."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, shape[1], shape[0])
    lengths[1] = 0
    mask = (np.arange(shape[1]) >= 1) & (np.arange(shape[1]) < 1 + lengths[:, None])
    return np.exp(rng.normal(-2, 2, shape)).astype(np.float32), mask


# ---- golden numbers ----


@pytest.mark.parametrize("signed", [True, False])
@cases("hapo_entropy_norm")
def test_hapo_signal(case, signed):
    data, meta = golden("hapo_entropy_norm")
    mask = data[f"{case}_mask"] > 0
    signal, stats = entropy.signal(data[f"{case}_entropy"], mask, pivot=meta[case]["pivot"], signed=signed)
    expected = data[f"{case}_h_hat_signed" if signed else f"{case}_h_hat"]
    np.testing.assert_allclose(signal, np.where(mask, expected, 0), atol=3e-5)
    sign = -1 if signed else 1  # the released multiplier of a negative distance is itself negative
    expected = [data[f"{case}_{name}"] for name in ("median", "std", "scale_pos", "scale_neg")]
    np.testing.assert_allclose(stats, [*expected[:3], sign * expected[3]], 1e-5, 1e-6)


def sampler_stats(data, sign):
    return entropy.EntropyStats(*(data[k] for k in ("median", "std", "scale_pos", f"scale_neg_{sign}")))


@pytest.mark.parametrize("sign", ["signed", "released"])
@cases("hapo_temperature")
def test_hapo_temperature(case, sign):
    data, meta = golden("hapo_temperature")
    knobs = dict(base=meta[case]["base_temperature"], strength=meta[case]["tau"])
    ours = entropy.adaptive_temperature(data["logits"], sampler_stats(data, sign), **knobs)
    expected, finite = data[f"{case}_temp_signed" if sign == "signed" else f"{case}_temp"], ~data["row_has_neginf"]
    np.testing.assert_allclose(ours[finite], expected[finite], 1e-5)
    # On purpose: the reference computes 0 · -inf = NaN for a banned token and falls back to the base temperature.
    assert finite.sum() == len(finite) - 1 and expected[~finite] == np.float32(knobs["base"])
    assert np.all(ours[~finite] != knobs["base"])


def test_without_strength_or_statistics_the_temperature_is_the_base():
    data, _ = golden("hapo_temperature")
    off = entropy.adaptive_temperature(data["logits"], sampler_stats(data, "signed"), base=1.0, strength=0.0)
    first = entropy.adaptive_temperature(data["logits"], entropy.no_stats(), base=1.0, strength=0.05)
    np.testing.assert_array_equal(off, data["off_temp"])
    np.testing.assert_array_equal(first, data["nostats_temp"])


@cases("hapo_forking_loss")
def test_forking_tokens(case):
    data, meta = golden("hapo_forking_loss")
    name, fraction = meta[case]["data"], meta[case]["entropy_top_ratio"]
    kept = entropy.top_fraction(data[f"{name}_entropy"], data[f"{name}_mask"] > 0, fraction)
    np.testing.assert_array_equal(kept, data[f"{case}_top_mask"] > 0)


@cases("hapo_archer_loss")
def test_archer_classes(case):
    data, meta = golden("hapo_archer_loss")
    mask = data[f"{meta[case]['data']}_mask"] > 0
    high = entropy.above_quantile(data[f"{meta[case]['data']}_entropy"], mask, meta[case]["quantile"])
    np.testing.assert_array_equal(high, data[f"{case}_high_mask"] > 0)
    np.testing.assert_array_equal(mask & ~high, data[f"{case}_low_mask"] > 0)


# ---- the signal ----


def reference_signal(entropies, mask, pivot):
    """The definition in numpy, on the list of valid tokens."""
    logs = np.log(np.maximum(entropies[mask].astype(np.float64), 1e-8))
    quantile = np.sort(logs)[round(pivot * (len(logs) - 1))]
    scale = np.sqrt(max(np.mean((logs - quantile) ** 2), 1e-8))
    h = (logs - quantile) / scale
    out = np.zeros(entropies.shape)
    out[mask] = np.where(h > 0, h / max(h.max(), 1e-8), h / max(-h.min(), 1e-8))
    return out


@PROPERTY
@given(ENTROPIES, MASKS, st.sampled_from([0.0, 0.25, 0.5, 0.8, 1.0]))
def test_signal_is_its_definition_and_stays_in_its_range(entropies, mask, pivot):
    signal, stats = entropy.signal(entropies, mask, pivot=pivot)
    released, _ = entropy.signal(entropies, mask, pivot=pivot, signed=False)
    assert np.all(np.abs(signal) <= 1) and np.all(np.asarray(signal)[~mask] == 0)
    np.testing.assert_array_equal(released, np.abs(signal), "the released sign slip: |ĥ|")
    if not mask.any():
        assert np.all(np.isnan(stats))
        return
    # Differences of logs beside the 1e-4 floor of the scale lose digits: compare where the spread is not tiny.
    if stats.scale > 1e-2:
        np.testing.assert_allclose(signal, reference_signal(entropies, mask, pivot), atol=1e-3)
    middle = max(np.sort(entropies[mask])[round(pivot * (mask.sum() - 1))], 1e-8)
    difference = np.maximum(entropies, 1e-8) - middle
    clear = mask & ((difference == 0) | (np.abs(difference) > 1e-5 * middle))
    np.testing.assert_array_equal(np.sign(signal)[clear], np.sign(difference)[clear], "ĥ > 0 where H > the pivot's")


@pytest.mark.parametrize("value", [0.0, 1e-5, 0.3, 1 / 3, 2.7])
def test_equal_entropies_give_exactly_0(value):
    """The scale has a floor but ĥ is stretched to 1: any rounding would become a signal."""
    entropies, mask = jnp.full((7, 33), value), jax.random.bernoulli(jax.random.key(0), 0.8, (7, 33))
    np.testing.assert_array_equal(jax.jit(entropy.signal)(entropies, mask)[0], 0)


def test_the_unsurest_token_has_signal_1_and_the_surest_minus_1():
    signal, _ = entropy.signal(*batch())
    assert signal.max() == 1 and signal.min() == -1


@pytest.mark.parametrize("garbage", [0.0, 7.7, np.nan, np.inf])
def test_what_stands_outside_the_mask_does_not_matter(garbage):
    entropies, mask = batch()
    clean, stats = entropy.signal(np.where(mask, entropies, 1.0), mask)
    dirty = np.where(mask, entropies, garbage).astype(np.float32)
    for got, want in zip(
        [*entropy.signal(dirty, mask)[1], entropy.signal(dirty, mask)[0]], [*stats, clean], strict=True
    ):
        np.testing.assert_array_equal(got, want)
    for select in (
        functools.partial(entropy.top_fraction, fraction=0.3),
        functools.partial(entropy.above_quantile, quantile=0.6),
    ):
        np.testing.assert_array_equal(select(dirty, mask), select(np.where(mask, entropies, 1.0), mask))


@PROPERTY
@given(DISTINCT, MASKS, st.permutations(range(SHAPE[0])), st.sampled_from([0.1, 0.2, 0.5, 0.9]))
def test_row_order_and_padding_do_not_matter(entropies, mask, order, level):
    wide = [np.pad(x, ((0, 2), (1, 3))) for x in (entropies, mask)]
    for f in (
        lambda h, m: entropy.signal(h, m, pivot=level)[0],
        lambda h, m: entropy.top_fraction(h, m, level),
        lambda h, m: entropy.above_quantile(h, m, level),
    ):
        plain = np.asarray(f(entropies, mask))
        np.testing.assert_allclose(f(entropies[order], mask[order]), plain[order], atol=1e-6)
        np.testing.assert_allclose(np.asarray(f(*wide))[: SHAPE[0], 1:-3], plain, atol=1e-6)
        assert not np.asarray(f(*wide))[SHAPE[0] :].any()


# ---- the temperature ----


def stats_of_batch():
    return entropy.signal(*batch())[1]


@PROPERTY
@given(arrays(np.float32, (5, 8), elements=st.floats(-30, 30, width=32)), st.sampled_from([0.05, 0.5]))
def test_temperature_stays_within_strength_of_the_base_and_rises_with_entropy(logits, strength):
    temperatures = entropy.adaptive_temperature(logits, stats_of_batch(), base=0.7, strength=strength)
    assert np.all(np.abs(np.asarray(temperatures) / 0.7 - 1) <= strength * 1.001)
    p = jax.nn.softmax(jnp.asarray(logits))
    order = np.argsort(np.sum(jax.scipy.special.entr(p), axis=1))
    assert np.all(np.diff(np.asarray(temperatures)[order]) >= -1e-4), "surer rows must not be sampled hotter"


def test_released_statistics_sample_sure_tokens_hotter():
    _, released = entropy.signal(*batch(), signed=False)
    logits = jnp.array([[9.0, 0.0, 0.0, 0.0]])
    assert entropy.adaptive_temperature(logits, released, base=1.0, strength=0.1) > 1
    assert entropy.adaptive_temperature(logits, stats_of_batch(), base=1.0, strength=0.1) < 1


def test_a_banned_token_is_as_if_it_were_not_there():
    logits = jax.random.normal(jax.random.key(0), (3, 8))
    banned = jnp.concatenate([logits, jnp.full((3, 2), -jnp.inf)], axis=1)
    knobs = dict(base=1.0, strength=0.3)
    got = entropy.adaptive_temperature(banned, stats_of_batch(), **knobs)
    np.testing.assert_allclose(got, entropy.adaptive_temperature(logits, stats_of_batch(), **knobs), 1e-6)
    single = jnp.full((1, 8), -jnp.inf).at[0, 3].set(2.0)
    np.testing.assert_allclose(entropy.adaptive_temperature(single, stats_of_batch(), **knobs), 0.7, 1e-6)


def test_the_entropy_of_a_nearly_sure_policy_keeps_its_digits():
    """ln H of p = 1 - e^-gap, at large logits; as logsumexp - Σ p z it would be rounding noise."""
    gap, shift = 12.0, 100.0
    stats = entropy.EntropyStats(*(jnp.float32(x) for x in (-9.0, 1.0, 1 / 4, 1 / 4)))
    got = entropy.adaptive_temperature(jnp.array([[shift, shift - gap]]), stats, base=1.0, strength=1.0)
    tail = np.exp(-gap)
    log_entropy = np.log(tail * gap + tail)  # to first order in the tail
    np.testing.assert_allclose(got, 1 + (log_entropy + 9) / 4, 1e-3)


# ---- classes of tokens ----


@PROPERTY
@given(ENTROPIES, MASKS, st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.75, 1.0]))
def test_the_top_fraction_holds_the_right_number_of_the_highest(entropies, mask, fraction):
    kept, count = np.asarray(entropy.top_fraction(entropies, mask, fraction)), mask.sum()
    assert kept.sum() == (max(1, int(count * fraction + 0.9999)) if count else 0), "K = max(1, ⌈fraction·N⌉)"
    assert np.all(mask | ~kept)
    if kept.any() and (mask & ~kept).any():
        assert entropies[kept].min() >= entropies[mask & ~kept].max()


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.3, 0.7, 0.9])
@pytest.mark.parametrize("count", [10, 100, 20_000, 99_990])
def test_rounding_keeps_no_token_too_many(fraction, count):
    kept = entropy.top_fraction(jnp.arange(float(count))[None], jnp.ones((1, count), bool), fraction)
    assert kept.sum() == round(count * fraction)


def test_equal_entropies_go_by_position():
    mask = np.array([[0, 1, 1, 1], [1, 1, 1, 0]], bool)
    kept = entropy.top_fraction(np.full((2, 4), 0.5, np.float32), mask, 0.6)
    np.testing.assert_array_equal(kept, [[0, 1, 1, 1], [1, 0, 0, 0]])
    np.testing.assert_array_equal(entropy.top_fraction(np.full((2, 4), 0.5, np.float32), mask, 1.0), mask)


@PROPERTY
@given(ENTROPIES, MASKS, st.sampled_from([0.0, 0.25, 0.5, 0.8, 1.0]))
def test_above_quantile_is_numpys_linear_quantile_of_each_row(entropies, mask, quantile):
    high = np.asarray(entropy.above_quantile(entropies, mask, quantile))
    for row, valid, got in zip(entropies, mask, high, strict=True):
        if not valid.any():
            assert not got.any()
            continue
        threshold = np.quantile(row[valid].astype(np.float64), quantile)
        clear = np.abs(row - threshold) > 1e-5  # a token on the interpolated threshold may round to either side
        np.testing.assert_array_equal(got[clear], (valid & (row > threshold))[clear])
    assert not high[~mask].any()


def test_a_rows_only_token_and_its_highest_at_quantile_1_are_not_above():
    entropies, mask = batch()
    assert not entropy.above_quantile(entropies, mask, 1.0).any()
    one = np.zeros_like(mask)
    one[:, 3] = True
    assert not entropy.above_quantile(entropies, one, 0.8).any()


# ---- contracts ----


def test_no_stats_has_the_form_of_statistics():
    assert all(np.isnan(x) and x.dtype == np.float32 for x in entropy.no_stats())
    shapes = [jax.tree.map(jnp.shape, stats) for stats in (entropy.no_stats(), stats_of_batch())]
    assert shapes[0] == shapes[1] and all(x.dtype == jnp.float32 for x in stats_of_batch())


def test_they_live_in_a_jitted_loop():
    entropies, mask = batch()
    logits = jax.random.normal(jax.random.key(0), (3, 8))

    def step(stats, _):
        return entropy.signal(entropies, mask)[1], entropy.adaptive_temperature(logits, stats, base=1.0, strength=0.2)

    last, temperatures = jax.lax.scan(step, entropy.no_stats(), length=3)
    np.testing.assert_allclose(last, stats_of_batch(), 1e-6)
    np.testing.assert_array_equal(temperatures[0], 1)
    assert np.all(temperatures[1] != 1) and np.array_equal(temperatures[1], temperatures[2])


FUNCTIONS = {
    "signal": lambda h, m: entropy.signal(h, m)[0],
    "top_fraction": lambda h, m: entropy.top_fraction(h, m, 0.4).astype(float),
    "above_quantile": lambda h, m: entropy.above_quantile(h, m, 0.4).astype(float),
    "temperature": lambda h, m: entropy.adaptive_temperature(h, entropy.signal(h, m)[1], base=1.0, strength=0.2),
}
EACH = pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS)


@EACH
def test_jit_and_vmap(f):
    stacked = [
        jnp.stack([jnp.asarray(x) for x in pair]) for pair in zip(*(batch(seed) for seed in range(3)), strict=True)
    ]
    each = jnp.stack([f(*batch(seed)) for seed in range(3)])
    np.testing.assert_allclose(jax.jit(f)(*batch(0)), each[0], 1e-5, 1e-6)
    np.testing.assert_allclose(jax.vmap(f)(*stacked), each, 1e-5, 1e-6)


@EACH
def test_gradients_are_stopped_and_finite_on_empty_rows_and_masks(f):
    entropies, mask = batch()
    for m in (mask, np.zeros_like(mask)):
        for h in (entropies, np.zeros_like(entropies)):
            value, grads = jax.value_and_grad(lambda x, m=m: jnp.sum(f(x, m)))(h)
            assert np.isfinite(value)
            np.testing.assert_array_equal(grads, 0)


def test_an_empty_mask_has_no_signal_and_no_statistics():
    entropies, mask = batch()
    signal, stats = entropy.signal(entropies, np.zeros_like(mask))
    np.testing.assert_array_equal(signal, 0)
    assert np.all(np.isnan(stats))
    assert not entropy.top_fraction(entropies, np.zeros_like(mask), 0.5).any()


def test_precision():
    entropies, mask = batch()
    half = jnp.asarray(entropies, jnp.bfloat16)
    signal, stats = entropy.signal(half, mask)
    assert signal.dtype == jnp.float32 and stats.scale.dtype == jnp.float32
    np.testing.assert_array_equal(signal, entropy.signal(half.astype(jnp.float32), mask)[0])
    assert entropy.adaptive_temperature(half, stats, base=1.0, strength=0.1).dtype == jnp.float32
    with jax.enable_x64(True):
        assert entropy.signal(jnp.asarray(entropies, jnp.float64), mask)[0].dtype == jnp.float64
        assert entropy.signal(jnp.asarray(entropies, jnp.float32), mask)[0].dtype == jnp.float32


def test_the_value_for_an_algorithms_slot_takes_entropies_at_the_base_temperature():
    logits = jnp.array([[2.0, -1.0, 0.5], [0.1, 0.0, 0.2]])
    stats = entropy.EntropyStats(*(jnp.float32(x) for x in (-0.5, 0.4, 0.7, 0.9)))
    want = entropy.adaptive_temperature(logits / 0.7, stats, base=0.7, strength=0.3)
    np.testing.assert_array_equal(entropy.AdaptiveTemperature(0.7, 0.3)(logits, stats), want)

import collections
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tapojax import advantages, shaping


@pytest.mark.parametrize(("x64", "rtol"), [(True, 1e-6), (False, 1e-4)])
def test_overlong_penalty_of_dapo(x64, rtol):
    data = np.load(Path(__file__).parent / "golden" / "dapo_reward_shaping_and_filter.npz", allow_pickle=False)
    lengths, limit, buffer = data["lengths"], int(data["max_resp_len"]), int(data["overlong_buffer_len"])
    with jax.enable_x64(x64):
        factor = float(data["penalty_factor"])
        ours = shaping.overlong_penalty(
            jnp.asarray(lengths.astype(np.int32)), max_length=limit, buffer=buffer, factor=factor
        )
        ours = np.asarray(ours)
    np.testing.assert_allclose(ours, factor * data["trl_soft_overlong"], rtol, 1e-7)
    inside = lengths <= limit
    np.testing.assert_allclose(ours[inside], data["verl_overlong_penalty"][inside], rtol, 1e-7)
    # On purpose: verl's line goes on falling beyond the limit, ours stops at -factor as in the paper.
    assert np.all(ours[~inside] == -factor) and np.all(data["verl_overlong_penalty"][~inside] < -factor)


def test_overlong_penalty_by_hand():
    lengths = jnp.array([0, 6, 7, 8, 9, 10, 11, 1000])
    ours = shaping.overlong_penalty(lengths, max_length=10, buffer=4, factor=0.5)
    np.testing.assert_allclose(ours, [0, 0, -0.125, -0.25, -0.375, -0.5, -0.5, -0.5])
    whole = shaping.overlong_penalty(lengths, max_length=10, buffer=10)
    np.testing.assert_allclose(whole, [0, -0.6, -0.7, -0.8, -0.9, -1, -1, -1], 1e-6)


def test_overlong_penalty_neutral_factor():
    np.testing.assert_array_equal(shaping.overlong_penalty(jnp.arange(20), max_length=10, buffer=4, factor=0.0), 0)


def test_overlong_penalty_jit_vmap_grad():
    lengths = jnp.arange(24).reshape(2, 12)
    penalty = functools.partial(shaping.overlong_penalty, max_length=10, buffer=4)
    each = jnp.stack([penalty(x) for x in lengths])
    assert each.dtype == jnp.float32
    np.testing.assert_array_equal(jax.jit(penalty)(lengths[0]), each[0])
    np.testing.assert_array_equal(jax.vmap(penalty)(lengths), each)
    slope = jax.grad(lambda factor: jnp.sum(penalty(lengths[1], factor=factor)))(1.0)
    np.testing.assert_allclose(slope, jnp.sum(each[1]))


@pytest.mark.parametrize("buffer", [0, 11])
def test_overlong_penalty_buffer_must_fit(buffer):
    with pytest.raises(ValueError, match=f"buffer={buffer}"):
        shaping.overlong_penalty(jnp.arange(3), max_length=10, buffer=buffer)


def test_infolen_worked_example():
    """R = [1, .9, .8, .5]: mean .8, std .21602 gives A = [.926, .463, 0, -1.389]."""
    lengths, redundancy = jnp.array([40, 40, 40, 100]), jnp.array([0, 0.5, 1, 1])
    rewards = shaping.infolen(jnp.ones(4), lengths, redundancy, max_length=100)
    np.testing.assert_allclose(rewards, [1, 0.9, 0.8, 0.5], rtol=1e-6)
    ours = advantages.group_normalize(rewards, 4, std_floor=0.1)
    np.testing.assert_allclose(ours, [0.926, 0.463, 0, -1.389], atol=5e-4)


@pytest.mark.parametrize("given", [None, 60])
def test_infolen_follows_its_formula(given):
    """R = c (1 - w_L λ [(1 - κ) + κ ρ] - w_ρ ρ), by a loop over rows."""
    rng = np.random.default_rng(0)
    lengths, redundancy, correct = rng.integers(0, 130, 50), rng.random(50, np.float32), rng.integers(0, 2, 50)
    knobs = dict(length_weight=0.4, redundancy_weight=0.1, mix=0.7)
    free, expected = given or 50, []
    for c, length, rho in zip(correct, lengths, redundancy, strict=True):
        over = min(max((length - free) / (100 - free), 0), 1)
        expected.append(c * (1 - 0.4 * over * (0.3 + 0.7 * rho) - 0.1 * rho))
    c = correct.astype(np.float32)
    ours = shaping.infolen(c, lengths, redundancy, max_length=100, free_length=given, **knobs)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_infolen_leaves_wrong_rows_at_zero_and_unscored_ones_without_reward():
    correct = jnp.array([0, 0, jnp.nan, 1, 1])
    lengths, redundancy = jnp.array([0, 100, 1, 1000, 100]), jnp.array([0, 1.0, 0, 0, 1.0])
    ours = shaping.infolen(correct, lengths, redundancy, max_length=100)
    np.testing.assert_allclose(ours, [0, 0, np.nan, 0.85, 0.5], rtol=1e-6)
    neutral = shaping.infolen(correct, lengths, redundancy, max_length=100, length_weight=0, redundancy_weight=0)
    np.testing.assert_array_equal(neutral, correct)


def test_infolen_jit_vmap_grad_and_float64():
    correct, lengths = jnp.array([1.0, 0, jnp.nan]), jnp.array([80, 80, 80])
    reward = functools.partial(shaping.infolen, max_length=100)
    rho = jnp.array([0.2, 0.4, 0.6])
    each = reward(correct, lengths, rho)
    np.testing.assert_allclose(jax.jit(reward)(correct, lengths, rho), each, rtol=1e-6)
    both = jax.vmap(reward)(jnp.stack([correct, correct]), jnp.stack([lengths, lengths]), jnp.stack([rho, rho]))
    np.testing.assert_allclose(both, jnp.stack([each, each]), rtol=1e-6)
    slope = jax.grad(lambda x: jnp.nansum(reward(correct, lengths, x)))(rho)
    np.testing.assert_allclose(slope, [-0.3 * 0.6 * 0.5 - 0.2, 0, 0], rtol=1e-6)
    with jax.enable_x64(True):
        assert reward(np.ones(1), np.ones(1, np.int64), np.ones(1)).dtype == np.float64


@pytest.mark.parametrize("free", [-1, 100, 101])
def test_infolen_needs_room_above_the_free_length(free):
    with pytest.raises(ValueError, match=f"free_length={free} must be"):
        shaping.infolen(jnp.ones(1), jnp.ones(1, int), jnp.ones(1), max_length=100, free_length=free)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_lexical_redundancy_counts_distinct_ngrams(n):
    """ρ = clip((1 - distinct / count - .2) / .8, 0, 1), by Python sets; with holes in the mask no gram spans one."""
    rng = np.random.default_rng(n)
    tokens, mask = rng.integers(0, 3, (40, 24)), rng.random((40, 24)) < rng.random((40, 1)) ** 0.3
    expected = []
    for row, inside in zip(tokens, mask, strict=True):
        grams = [tuple(row[i : i + n]) for i in range(24 - n + 1) if inside[i : i + n].all()]
        expected.append(np.clip((1 - len(set(grams)) / len(grams) - 0.2) / 0.8, 0, 1) if grams else 0)
    ours = shaping.lexical_redundancy(tokens, mask, n=n)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(jax.jit(functools.partial(shaping.lexical_redundancy, n=n))(tokens, mask), ours)
    each = jax.vmap(lambda t, m: shaping.lexical_redundancy(t[None], m[None], n=n)[0])(tokens, mask)
    np.testing.assert_array_equal(each, ours)


def test_lexical_redundancy_by_hand():
    tokens = jnp.array([[7] * 12, [*range(12)], [1, 2, 3, 4, 5] * 2 + [0, 0], [3] * 12])
    mask = jnp.arange(12) < jnp.array([12, 12, 10, 4])[:, None]
    raw = shaping.lexical_redundancy(tokens, mask, allowance=0.0)
    np.testing.assert_allclose(raw, [1 - 1 / 8, 0, 1 / 6, 0], rtol=1e-6)
    ours = shaping.lexical_redundancy(tokens, mask)
    np.testing.assert_allclose(ours, [(1 - 1 / 8 - 0.2) / 0.8, 0, 0, 0], rtol=1e-6)
    for shape in ((2, 4), (2, 0), (2, 5)):
        nothing = shaping.lexical_redundancy(jnp.zeros(shape, int), jnp.ones(shape, bool))
        np.testing.assert_array_equal(nothing, 0)


def test_lexical_redundancy_does_not_see_padding_or_prompt():
    tokens = np.random.default_rng(0).integers(0, 2, (3, 20))
    mask = np.arange(20)[None] < 15
    mask = np.repeat(mask, 3, axis=0)
    padded = np.pad(tokens, [(0, 0), (4, 9)], constant_values=1), np.pad(mask, [(0, 0), (4, 9)])
    np.testing.assert_array_equal(shaping.lexical_redundancy(*padded), shaping.lexical_redundancy(tokens, mask))


def test_semantic_redundancy_follows_its_formula():
    """ρ = mean over steps j >= 2 of max(0, max_{k<j} cos - .6) / .4, by a loop over unhashed counts."""
    steps = ["add 3 to 4", "add 3 to 5", "then double it", "add 3 to 4", "So 8"]

    def cosine(a, b):
        counts = []
        for step in (a, b):
            words = step.lower().split()
            counts.append(collections.Counter(words) + collections.Counter(zip(words, words[1:], strict=False)))
        dot = sum(np.sqrt(n * counts[1][feature]) for feature, n in counts[0].items())
        return dot / np.sqrt(sum(counts[0].values()) * sum(counts[1].values()))

    nearest = [max(cosine(steps[j], steps[k]) for k in range(j)) for j in range(1, 5)]
    expected = np.mean([max(0, value - 0.6) / 0.4 for value in nearest])
    assert 0 < nearest[0] < 0.999 and nearest[2] > 0.999
    np.testing.assert_allclose(shaping.semantic_redundancy(["\n".join(steps)]), [expected], rtol=1e-5)
    low = np.mean([max(0, value - 0.1) / 0.9 for value in nearest])
    np.testing.assert_allclose(shaping.semantic_redundancy(["\n".join(steps)], threshold=0.1), [low], rtol=1e-5)


def test_semantic_redundancy_of_lines_sentences_and_clauses():
    copies = "We add 3.5 and 4. Then more.\n\nWe add 3.5 and 4. Then more."
    texts = [
        "",
        "#13",
        " \n \t\n",
        copies,
        "Wait, no. Wait, no! Is it 5?",
        "7+6+0=13,7+6+0=13,7+6+0=13",
        "7+6+0=13,5+8+1=14#143",
        "The area is 12.\nThe radius of the circle equals 3.",
        "a\n" * 500,
    ]
    ours = shaping.semantic_redundancy(texts)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, [0, 0, 0, 1, (5 / 7 - 0.6) / 0.4 / 2, 1, 0, 0, 1], atol=1e-5)
    np.testing.assert_array_equal(shaping.semantic_redundancy([]), np.zeros(0))


def test_semantic_redundancy_is_the_same_in_every_process():
    """Python's own hash is salted; a resumed run must give the rewards of an uninterrupted one."""
    code = "from tapojax import shaping; print(shaping.semantic_redundancy(['a b c d\\nb c d e\\nc d a b'])[0])"
    found = []
    for salt in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": salt}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        found.append(float(done.stdout))
    assert found[0] == found[1] > 0


# ---- FAPO ----

GOLDEN = Path(__file__).parent / "golden"
NAN = float("nan")


def golden(name):
    return np.load(GOLDEN / f"{name}.npz", allow_pickle=False)


FAPO_CASES = json.loads(str(golden("fapo_advantage")["meta_json"]))["cases"]


@pytest.mark.parametrize("case", FAPO_CASES)
def test_fapo_rewards_and_advantages(case):
    data, settings = golden("fapo_advantage"), FAPO_CASES[case]
    kind, mask, size = data[f"{case}_kind"], data[f"{case}_mask"] > 0, settings["group_size"]
    correct = (kind != "W").astype(np.float32)
    flawed = np.where(kind == "W", NAN, kind == "F").astype(np.float32)
    rewards = np.asarray(shaping.flawed_positive(correct, flawed, penalty=settings["lambda"]))
    penalty = data[f"{case}_score"] - rewards
    if case == "overlong":  # its penalties are made up, not computed
        assert (penalty <= 0).all() and (penalty < 0).sum() == 4
    else:
        np.testing.assert_allclose(penalty, 0, atol=1e-6)
    assert (np.diff(data[f"{case}_group"]) >= 0).all(), "groups are adjacent"
    rows = advantages.group_normalize(data[f"{case}_score"], size, scale=settings["norm_by_std"])
    if case == "single":  # on purpose: a row alone in its group has nothing to be compared with; there A = R
        assert np.all(rows == 0) and data["single_seq_adv"][0] == pytest.approx(1, abs=1e-5)
        return
    np.testing.assert_allclose(advantages.per_token(rows, mask), data[f"{case}_adv"], 1e-5, 1e-6)


@pytest.mark.parametrize("version", ["recipe", "remote", "orig"])
def test_fapo_reward_given_the_verdict(version):
    """All three published scorers, whatever they hold for a verdict."""
    data = golden("fapo_reward")
    correct, flawed = (data[name].astype(np.float32) for name in ("rule_correct", f"{version}_flawed"))
    np.testing.assert_array_equal(shaping.flawed_positive(correct, flawed), data[f"{version}_score"])
    baseline = shaping.flawed_positive(correct, data["orig_baseline_flawed"].astype(np.float32), penalty=0.0)
    np.testing.assert_array_equal(baseline, data["orig_baseline_score"])


def test_flawed_positive_by_hand():
    correct, flawed = jnp.array([1, 1, 0, 0, 0, 1, NAN, NAN]), jnp.array([0, 1, 0, 1, NAN, NAN, 0, NAN])
    np.testing.assert_array_equal(shaping.flawed_positive(correct, flawed), [1, 0, -1, -1, -1, NAN, NAN, NAN])
    milder = shaping.flawed_positive(correct, flawed, penalty=0.25)
    np.testing.assert_array_equal(milder, [1, 0.75, -1, -1, -1, NAN, NAN, NAN])


@pytest.mark.parametrize("penalty", [0.5, 2 / 3, 1.0, 4 / 3])
def test_flawed_rows_turn_negative_where_the_theory_says(penalty):
    """A_flawed < 0 iff right : wrong > 2 / penalty - 1."""
    for right in range(1, 12):
        correct, flawed = np.ones(16, np.float32), np.zeros(16, np.float32)
        wrong = 12 - right
        correct[:wrong], flawed[12:] = 0, 1
        got = advantages.group_normalize(shaping.flawed_positive(correct, flawed, penalty=penalty), 16)[15]
        if abs(margin := right / wrong - (2 / penalty - 1)) > 1e-6:
            assert (got < 0) == (margin > 0), (right, wrong)


def test_fapo_genrm_reward():
    data = golden("fapo_genrm_reward")
    index, label, steps = (data[name].astype(np.float32) for name in ("pred_raw", "label", "total_steps"))
    ours = np.asarray(shaping.genrm_reward(index, label, steps))
    np.testing.assert_allclose(ours, data["reward"], 1e-6)
    np.testing.assert_array_equal(ours > -1, data["acc"])
    read = np.where(data["text_pred"] == -99, NAN, data["text_pred"]).astype(np.float32)
    for label, name in ((3, "label3"), (-1, "labelm1")):
        ours = shaping.genrm_reward(read, np.full_like(read, label), np.full_like(read, 7))
        np.testing.assert_allclose(ours, data[f"text_reward_{name}"], 1e-6)


def test_genrm_reward_by_hand():
    """Whether: ± 1. Where: minus the distance over the number of steps. No verdict, or an impossible one: -1."""
    cases = [
        # predicted, label, steps, reward
        (-1, -1, 4, 1),
        (-1, 2, 4, -1),
        (2, -1, 4, -1),
        (2, 2, 4, 1),
        (0, 3, 4, 0.25),
        (3, 0, 4, 0.25),
        (4, 3, 4, -1),
        (-2, -1, 4, -1),
        (NAN, -1, 4, -1),
        (NAN, 1, 4, -1),
        (1.5, 1, 4, 0.875),
        (-1, -1, 0, 1),
        (0, NAN, 4, NAN),
        (0, 1, NAN, NAN),
        (NAN, NAN, NAN, NAN),
    ]
    predicted, label, steps, reward = (jnp.array(column) for column in zip(*cases, strict=True))
    np.testing.assert_array_equal(shaping.genrm_reward(predicted, label, steps), reward)


@pytest.mark.parametrize("f", [shaping.flawed_positive, lambda c, f: shaping.genrm_reward(c, f, jnp.full(3, 4.0))])
def test_fapo_rewards_jit_vmap_grad_and_precision(f):
    rows = jnp.array([1.0, 0, 1]), jnp.array([1.0, jnp.nan, 0])
    each = f(*rows)
    np.testing.assert_array_equal(jax.jit(f)(*rows), each)
    np.testing.assert_array_equal(jax.vmap(f)(*(jnp.stack([x, x]) for x in rows)), jnp.stack([each, each]))
    for argument in (0, 1):
        slopes = jax.grad(lambda *x: jnp.nansum(f(*x)), argument)(*rows)
        assert np.isfinite(slopes).all()
    assert f(*(x.astype(jnp.bfloat16) for x in rows)).dtype == jnp.float32
    with jax.enable_x64(True):
        assert f(*(np.ones(3), np.zeros(3))).dtype == jnp.float64


@pytest.mark.parametrize("kind", ["penalty", "reward"])
def test_fapo_overlong_penalty(kind):
    """Up to the limit it is DAPO's; beyond, theirs goes on falling and ours stops (see above)."""
    data = golden("fapo_overlong_penalty")
    keys = np.stack([data[name] for name in ("max_resp_len", "buffer_len", "factor")], axis=1)
    seen = 0
    for limit, buffer, factor in np.unique(keys, axis=0):
        rows = (keys == (limit, buffer, factor)).all(axis=1)
        lengths = data["length"][rows]
        ours = shaping.overlong_penalty(lengths, max_length=int(limit), buffer=int(buffer), factor=factor)
        ours = ours + data["score"][rows] if kind == "reward" else ours
        inside = lengths <= limit
        np.testing.assert_allclose(ours[inside], data[kind][rows][inside], 1e-6, 1e-6)
        assert (np.asarray(ours)[~inside] > data[kind][rows][~inside]).all()
        seen += inside.sum()
    assert seen > 100

"""HAPO's adaptive temperature in vLLM: the numbers of `entropy.adaptive_temperature`, through both model runners."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tapojax import entropy
from tests.vllm import reference

PROMPTS = {0: [3, 1, 4, 1, 5], 1: list(range(40)), 2: [50]}
# of logits as those of the test model: hot and cold rows, clipped and not
STATS = entropy.EntropyStats(*map(jnp.float32, (0.2, 0.5, 0.8, 0.4)))
SETTINGS = dict(base=0.9, strength=0.5, quantile=0.2, scale=0.5, above=0.8, below=0.4)
NAN = math.nan


def golden():
    file = Path(__file__).parents[1] / "golden" / "hapo_temperature.npz"
    data = np.load(file, allow_pickle=False)
    return data, json.loads(str(data["meta_json"]))["cases"]


def settings(base, strength, stats):
    return [float(x) for x in (base, strength, *stats)]


def golden_stats(data, sign):
    return [float(data[name]) for name in ("median", "std", "scale_pos", f"scale_neg_{sign}")]


@pytest.mark.parametrize("sign", ["signed", "released"])
@pytest.mark.parametrize("case", golden()[1])
def test_golden_temperatures(worker, case, sign):
    """Their logits are divided by the base temperature already, ours are not."""
    data, meta = golden()
    base, strength = meta[case]["base_temperature"], meta[case]["tau"]
    given = settings(base, strength, golden_stats(data, sign))
    logits = data["logits"].astype(np.float64) * base
    factors = worker.scenario("temperature_factors", logits=logits.tolist(), settings=given)
    expected, finite = data[f"{case}_temp_signed" if sign == "signed" else f"{case}_temp"], ~data["row_has_neginf"]
    np.testing.assert_allclose((base * np.array(factors))[finite], expected[finite], 1e-5)
    ours = entropy.adaptive_temperature(
        data["logits"], entropy.EntropyStats(*golden_stats(data, sign)), base=base, strength=strength
    )
    np.testing.assert_allclose(
        base * np.array(factors), ours, 1e-5, err_msg="banned tokens: as in the embedded sampler"
    )


def test_the_embedded_samplers_numbers(worker):
    logits = np.random.default_rng(0).normal(size=(64, 51)) * np.geomspace(0.1, 40, 64)[:, None]
    logits[5, :50], logits[6, :25] = -np.inf, -np.inf
    logits = logits.astype(np.float32)
    for base, strength in ((1.0, 0.05), (0.6, 0.5), (1.3, 0.9)):
        factors = worker.scenario(
            "temperature_factors", logits=logits.tolist(), settings=settings(base, strength, STATS)
        )
        ours = entropy.AdaptiveTemperature(base, strength)(logits, STATS)
        np.testing.assert_allclose(base * np.array(factors), ours, 1e-5)
        assert len({round(x, 3) for x in factors}) > 10


def test_without_statistics_or_strength_the_factor_is_exactly_1(worker):
    logits = np.random.default_rng(0).normal(size=(8, 51)).tolist()
    for given in ([0.9, 0.5, NAN, NAN, NAN, NAN], settings(0.9, 0.0, STATS)):
        assert worker.scenario("temperature_factors", logits=logits, settings=given) == [1.0] * 8


# ---- the two model runners


def scaled(logits, given):
    """What the processor makes of one row."""
    factor = entropy.AdaptiveTemperature(*given[:2])(logits[None], entropy.EntropyStats(*given[2:]))[0] / given[0]
    return np.asarray(logits / factor)


ONE, TWO = settings(0.9, 0.5, STATS), settings(1.2, 0.3, STATS)
LOGITS = np.random.default_rng(1).normal(size=(4, 51)).astype(np.float32) * np.array(
    [[0.5], [2], [8], [20]], np.float32
)


def assert_scaled_by(got, by_row):
    for row, given in enumerate(by_row):
        want = LOGITS[row] if given is None else scaled(LOGITS[row], given)
        np.testing.assert_allclose(got[row], want, rtol=0 if given is None else 1e-5)


def test_the_second_runner_names_slots(worker):
    said = worker.scenario(
        "second_runner", logits=LOGITS.tolist(), settings={5: ONE, 2: TWO, 0: None, 7: None}, slots=[2, 0, 5, 7]
    )
    assert said["used"] == {"5": True, "2": True, "0": False, "7": False}
    assert_scaled_by(said["logits"], [TWO, None, ONE, None])


def test_the_first_runner_adds_removes_and_moves_rows(worker):
    updates = [
        {"added": [[0, ONE], [1, None], [2, TWO], [3, ONE]]},
        {"removed": [3], "moved": [[0, 1, "SWAP"]]},  # now None, ONE, TWO, -
        {"moved": [[2, 3, "UNIDIRECTIONAL"]]},  # None, ONE, -, TWO
        {"removed": [0], "added": [[0, TWO]]},
    ]
    said = worker.scenario("first_runner", logits=LOGITS.tolist(), updates=updates)
    assert_scaled_by(said["logits"], [TWO, ONE, None, TWO])
    assert said["changes_greedy"], "or the first runner would apply it after the temperature"
    emptied = [*updates, {"removed": [0, 1, 3]}]
    assert_scaled_by(worker.scenario("first_runner", logits=LOGITS.tolist(), updates=emptied)["logits"], [None] * 4)


# ---- a request


def temperatures(model, prompt, sample, given):
    z = reference.completion_logits(model, prompt, sample)
    stats = entropy.EntropyStats(*(jnp.float32(given[name]) for name in ("quantile", "scale", "above", "below")))
    return z, np.asarray(entropy.AdaptiveTemperature(given["base"], given["strength"])(z, stats))


def test_samples_are_drawn_at_the_adaptive_temperature(worker, models):
    """Behaviour: log softmax(z / T_t). Base: log softmax(z). In one batch with requests that do not adapt."""
    worker.scenario("load", path=models[0].file, version=1)
    other = SETTINGS | dict(base=1.2, strength=0.2, above=-0.3)
    given = [SETTINGS, None, other, SETTINGS | dict(quantile=NAN, scale=NAN, above=NAN, below=NAN)]
    requests = [
        dict(prompts=PROMPTS, base_logprobs=True, sampling=dict(max_tokens=16 + 8 * i) | ({"adaptive": a} if a else {}))
        for i, a in enumerate(given)
    ]
    used = []
    for adaptive, groups in zip(given, worker.scenario("generate_together", requests=requests), strict=True):
        for prompt, sample in [(PROMPTS[int(index)], sample) for index, group in groups.items() for sample in group]:
            z, t = temperatures(models[0], prompt, sample, adaptive or SETTINGS)
            t = t if adaptive else np.ones_like(t)
            want = reference.of_tokens(z / t[:, None], sample["tokens"])
            np.testing.assert_allclose(sample["logprobs"], want, atol=reference.TOLERANCE)
            if adaptive:
                base = reference.of_tokens(z, sample["tokens"])
                np.testing.assert_allclose(sample["base_logprobs"], base, atol=reference.TOLERANCE)
                used.extend(t if adaptive is SETTINGS else [])
    assert max(used) - min(used) > 0.2, "temperatures of many sizes were at work"


def test_first_tokens_have_the_adaptive_distribution(worker, models):
    """2,000 samples of one token: total variation to softmax(z / T), within four times its mean under that law."""
    worker.scenario("load", path=models[0].file, version=1)
    adaptive = SETTINGS | dict(base=1.0, strength=0.9, quantile=-3.0, above=1.0)  # far above its pivot: T = 1.9
    options = dict(prompts={0: [1, 2]}, group_size=2000, sampling=dict(max_tokens=1, adaptive=adaptive))
    tokens = [sample["tokens"][0] for sample in worker.scenario("generate", **options)["0"]]
    z = reference.logits(models[0], [1, 2, 0])[-1]
    stats = entropy.EntropyStats(*(adaptive[name] for name in ("quantile", "scale", "above", "below")))
    t = entropy.AdaptiveTemperature(1.0, 0.9)(z[None], stats)[0]
    seen = np.bincount(tokens, minlength=51) / len(tokens)
    p = np.asarray(jax.nn.softmax(z / t))
    noise = np.sum(np.sqrt(p * (1 - p) / len(tokens))) / 2
    assert np.abs(seen - p).sum() / 2 < 2 * noise
    assert np.abs(seen - np.asarray(jax.nn.softmax(z))).sum() / 2 > 4 * noise, "and not the plain one"


REFUSED = {
    "missing": (0.9, {k: v for k, v in SETTINGS.items() if k != "below"}, "give exactly"),
    "unknown": (0.9, SETTINGS | {"tau": 1.0}, "give exactly"),
    "no settings": (0.9, [1.0], "give exactly"),
    "text": (0.9, SETTINGS | {"scale": "1"}, "give floats"),
    "another temperature": (1.0, SETTINGS, "base must be the request's temperature"),
    "cold": (0.0, SETTINGS | {"base": 0.0}, "and positive"),
    "too strong": (0.9, SETTINGS | {"strength": 1.0}, "strength in [0, 1)"),
    "negative": (0.9, SETTINGS | {"strength": -0.1}, "strength in [0, 1)"),
    "infinite": (0.9, SETTINGS | {"above": math.inf}, "statistics are numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_are_none_are_refused(worker, name):
    temperature, given, expected = REFUSED[name]
    assert expected in worker.scenario("refuse_settings", temperature=temperature, settings=given)


def test_a_request_with_bad_settings_fails_alone(worker):
    bad = dict(prompts=PROMPTS, sampling=dict(adaptive=SETTINGS | {"strength": 2.0}))
    (said,) = worker.scenario("refuse_requests", requests=[bad])
    assert "strength in [0, 1)" in said
    assert len(worker.scenario("generate", prompts=PROMPTS)) == len(PROMPTS)

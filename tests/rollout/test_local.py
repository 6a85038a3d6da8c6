"""The sampler agrees with teacher forcing, shares the prefill, stops early and compiles once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tapojax import policy, sharding
from tapojax.algorithms.hapo import hapo
from tapojax.models import decoder
from tapojax.models.config import DecoderConfig
from tapojax.rollout import local
from tapojax.types import Prompts, Sampling

MODEL = DecoderConfig(40, 32, 48, 2, 4, 2, 8, qkv_bias=True, qk_norm=True, initializer_range=0.5)
PARAMS = decoder.init(MODEL, jax.random.key(0))
ENGINE = local.local_engine(MODEL, max_prompt_tokens=7)
WEIGHTS = ENGINE.load(PARAMS, 0)
RAGGED = Prompts([{"id": i} for i in range(4)], [[5], [3, 9, 4], [2, 3, 4, 5, 6, 7, 8], [30, 2]])


def generate(sampling, key=1, group_size=3, prompts=RAGGED, **kwargs):
    return ENGINE.generate(WEIGHTS, prompts, jax.random.key(key), group_size=group_size, sampling=sampling, **kwargs)


def teacher_forced_logits(tokens):
    return np.asarray(decoder.hidden_states(MODEL, PARAMS, jnp.asarray(tokens)) @ decoder.head(PARAMS))


@pytest.mark.parametrize("stop", [(), (1, 2, 3)])
def test_sampler_and_score_agree_on_ragged_prompts(stop):
    rollout = generate(Sampling(9, stop_token_ids=stop))
    stats = policy.make_score(MODEL, max_scored=9)(PARAMS, jnp.asarray(rollout.tokens), jnp.asarray(rollout.mask))
    np.testing.assert_allclose(stats.logprobs, rollout.base_logprobs, atol=1e-4)
    np.testing.assert_array_equal(rollout.behaviour_logprobs, rollout.base_logprobs)


def test_rows_are_prompt_completion_padding():
    rollout = generate(Sampling(9, stop_token_ids=(1, 2, 3), pad_token_id=39))
    for row, (tokens, mask, length) in enumerate(
        zip(rollout.tokens, rollout.mask, rollout.prompt_lengths, strict=True)
    ):
        prompt = RAGGED.tokens[row // 3]
        assert tokens[: len(prompt)].tolist() == prompt and length == len(prompt)
        end = len(prompt) + mask.sum()
        assert mask[len(prompt) : end].all() and mask.sum() == end - len(prompt), "the mask is one run after the prompt"
        assert (tokens[end:] == 39).all()
        assert not np.isin(tokens[len(prompt) : end - 1], (1, 2, 3)).any(), "nothing follows a stop token"
        assert rollout.truncated[row] == (tokens[end - 1] not in (1, 2, 3))
    assert (rollout.base_logprobs[~rollout.mask] == 0).all()


def test_greedy_is_the_argmax_of_teacher_forcing():
    rollout = generate(Sampling(9, temperature=0.0), group_size=2)
    choice = teacher_forced_logits(rollout.tokens).argmax(-1)
    rows, columns = np.nonzero(rollout.mask)
    np.testing.assert_array_equal(choice[rows, columns - 1], rollout.tokens[rows, columns])
    np.testing.assert_array_equal(rollout.tokens[0::2], rollout.tokens[1::2])


@pytest.mark.parametrize(
    "kwargs", [{"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.7}, {"temperature": 1.3, "top_k": 9, "top_p": 0.9}]
)
def test_behaviour_logprobs_are_those_of_the_sampling_distribution(kwargs):
    sampling = Sampling(9, **kwargs)
    rollout = generate(sampling)
    logits = teacher_forced_logits(rollout.tokens) / sampling.temperature
    rows, columns = np.nonzero(rollout.mask)
    z, chosen = logits[rows, columns - 1], rollout.tokens[rows, columns]
    order = np.sort(z, axis=-1)[:, ::-1]
    keep = np.ones_like(z, bool) if not sampling.top_k else z >= order[:, [sampling.top_k - 1]]
    z = np.where(keep, z, -np.inf)
    p = np.exp(z - z.max(-1, keepdims=True)) / np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)
    ranked = np.sort(p, axis=-1)[:, ::-1]
    crossing = (ranked.cumsum(-1) - ranked < sampling.top_p).sum(-1)
    p = np.where(p >= ranked[np.arange(len(p)), crossing - 1][:, None], p, 0)
    p = p / p.sum(-1, keepdims=True)
    got = rollout.behaviour_logprobs[rows, columns]
    np.testing.assert_allclose(got, np.log(p[np.arange(len(p)), chosen]), atol=2e-4)
    base = policy.make_score(MODEL, max_scored=9)(PARAMS, jnp.asarray(rollout.tokens), jnp.asarray(rollout.mask))
    np.testing.assert_allclose(rollout.base_logprobs, base.logprobs, atol=1e-4)


def test_temperature_slot_overrides_the_temperature_per_row():
    def hot_or_cold(logits, carry):
        return jnp.where(jnp.arange(logits.shape[0]) % 3 == 0, carry, 1.0)

    rollout = generate(Sampling(9), temperature=hot_or_cold, carry=jnp.float32(2.0))
    plain = np.arange(12) % 3 != 0
    np.testing.assert_array_equal(rollout.behaviour_logprobs[plain], rollout.base_logprobs[plain])
    assert (rollout.behaviour_logprobs[~plain] != rollout.base_logprobs[~plain]).any()


def hapo_with_statistics():
    """An algorithm with a strong adaptive temperature and the statistics of a batch it could have seen."""
    algorithm = hapo(group_size=3, max_tokens=9, temperature=1.0, temperature_strength=0.5)
    rollout = generate(Sampling(9), key=2)
    stats = policy.make_score(MODEL, max_scored=9)(PARAMS, jnp.asarray(rollout.tokens), jnp.asarray(rollout.mask))
    return algorithm, algorithm.update_carry(algorithm.carry, stats, rollout)


def test_hapo_samples_from_the_adaptive_distribution_and_reports_it():
    algorithm, carry = hapo_with_statistics()
    rollout = generate(Sampling(9), temperature=algorithm.temperature, carry=carry)
    rows, columns = np.nonzero(rollout.mask)
    z, chosen = teacher_forced_logits(rollout.tokens)[rows, columns - 1], rollout.tokens[rows, columns]
    p = np.asarray(jax.nn.softmax(z))
    distance = np.log(-(p * np.log(p)).sum(-1)) - carry.quantile
    signal = np.clip(distance / carry.scale * np.where(distance > 0, carry.above, carry.below), -1, 1)
    temperatures = 1 + 0.5 * signal
    assert temperatures.min() < 0.8 and temperatures.max() > 1.2, "the temperatures vary"
    expected = jax.nn.log_softmax(z / temperatures[:, None])[np.arange(len(rows)), chosen]
    np.testing.assert_allclose(rollout.behaviour_logprobs[rows, columns], expected, atol=1e-3)
    base = policy.make_score(MODEL, max_scored=9)(PARAMS, jnp.asarray(rollout.tokens), jnp.asarray(rollout.mask))
    np.testing.assert_allclose(rollout.base_logprobs, base.logprobs, atol=1e-4)


def test_hapo_without_statistics_is_the_plain_sampler():
    algorithm, carry = hapo_with_statistics()
    plain = generate(Sampling(9))
    first = generate(Sampling(9), temperature=algorithm.temperature, carry=algorithm.carry)
    np.testing.assert_array_equal(first.tokens, plain.tokens)
    np.testing.assert_allclose(first.behaviour_logprobs, plain.behaviour_logprobs, atol=1e-6)
    later = generate(Sampling(9), temperature=algorithm.temperature, carry=carry)
    assert (later.tokens != plain.tokens).any()
    before = local.sample._cache_size()
    generate(Sampling(9), temperature=algorithm.temperature, carry=jax.tree.map(lambda x: x + 1, carry))
    assert local.sample._cache_size() == before, "statistics of another batch compiled the sampler again"


def test_first_token_frequencies_follow_the_model():
    """4,096 completions of one prompt: the first token is drawn from the softmax of its logits."""
    sampling = Sampling(1)
    rollout = generate(sampling, group_size=4096, prompts=Prompts([{"id": 0}], [[3, 9, 4]]))
    p = jax.nn.softmax(teacher_forced_logits([[3, 9, 4]])[0, -1])
    counts = np.bincount(rollout.tokens[:, 3], minlength=40)
    np.testing.assert_allclose(counts / 4096, p, atol=5 * np.sqrt(np.max(p * (1 - p)) / 4096))


def test_randomness_comes_from_the_key_alone():
    sampling = Sampling(9)
    np.testing.assert_array_equal(generate(sampling, key=5).tokens, generate(sampling, key=5).tokens)
    assert (generate(sampling, key=5).tokens != generate(sampling, key=6).tokens).any()
    rows = generate(sampling, key=5).tokens.reshape(4, 3, -1)
    assert (rows[:, 0] != rows[:, 1]).any(), "completions of a group differ"


def test_one_compiled_shape_whatever_the_prompts():
    sampling = Sampling(6, stop_token_ids=(1,))
    generate(sampling)
    before = local.sample._cache_size()
    for key in range(3):
        prompts = Prompts(RAGGED.examples, [[key + 2] * n for n in (1, 7, 2, 4)])
        generate(sampling, key=key, prompts=prompts)
    assert local.sample._cache_size() == before, "the sampler was compiled again"


def test_all_rows_done_ends_decoding():
    """With every token a stop token, only the first is drawn."""
    rollout = generate(Sampling(9, stop_token_ids=tuple(range(40))))
    assert (rollout.mask.sum(axis=1) == 1).all() and not rollout.truncated.any()


def test_same_rows_on_a_mesh():
    sampling = Sampling(9, stop_token_ids=(1, 2))
    want = generate(sampling)
    mesh = sharding.make_mesh(data=2, tensor=2)
    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, sharding.tree_shardings(PARAMS, mesh))
        got = ENGINE.generate(ENGINE.load(params, 0), RAGGED, jax.random.key(1), group_size=3, sampling=sampling)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.base_logprobs, want.base_logprobs, atol=1e-4)


@pytest.mark.parametrize("tokens", [[], [1] * 8])
def test_a_prompt_outside_the_budget_is_named(tokens):
    with pytest.raises(ValueError, match=f"'p7' has {len(tokens)} tokens, allowed are 1 to 7"):
        generate(Sampling(4), prompts=Prompts([{"id": "p7"}], [tokens]))


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"max_tokens": 0}])
def test_impossible_sampling_is_refused(bad):
    with pytest.raises(ValueError, match="need temperature"):
        Sampling(**({"max_tokens": 4} | bad))


# ---- told of finished rows


def told(sampling, count, engine=None, weights=None, **kwargs):
    """The rollout in segments of `count` tokens, and what was said of its rows while it ran."""
    engine = engine or local.local_engine(MODEL, max_prompt_tokens=7, stream_tokens=count)
    rows = []
    kwargs = {"group_size": 3, "finished": lambda row, tokens: rows.append((row, tokens))} | kwargs
    rollout = engine.generate(weights or WEIGHTS, RAGGED, jax.random.key(1), sampling=sampling, **kwargs)
    return rollout, rows


def assert_each_row_told_once(rollout, rows):
    want = {row: rollout.tokens[row][mask].tolist() for row, mask in enumerate(rollout.mask)}
    assert len(rows) == len(want) and dict(rows) == want


STOPPED = {"stop_token_ids": (1, 2, 3)}


@pytest.mark.parametrize(
    ("count", "kwargs"),
    [
        (1, STOPPED),
        (4, STOPPED),
        (64, STOPPED),
        (4, {"temperature": 0.0}),
        (2, {"temperature": 0.7, "top_k": 9, "top_p": 0.9}),
    ],
    ids=["each token", "ragged end", "one segment", "greedy", "filtered"],
)
def test_segments_give_the_rows_of_the_single_loop_bit_for_bit(count, kwargs):
    sampling = Sampling(9, pad_token_id=39, **kwargs)
    want = generate(sampling)
    rollout, rows = told(sampling, count)
    for name, values in want._asdict().items():
        np.testing.assert_array_equal(getattr(rollout, name), values, err_msg=name)
    assert_each_row_told_once(rollout, rows)


def test_rows_are_told_of_when_they_end_and_not_later():
    """In segments of 2 tokens a row of length n is among the first ceil(n / 2) segments' news."""
    rollout, rows = told(Sampling(9, stop_token_ids=(1, 2, 3, 4, 5)), 2)
    segments = [-(-len(tokens) // 2) for _, tokens in rows]
    assert segments == sorted(segments) and len(set(segments)) > 2, "the test shows nothing"
    assert rollout.truncated.sum() == sum(tokens[-1] not in (1, 2, 3, 4, 5) for _, tokens in rows)


def test_the_temperature_slot_streams_too():
    algorithm, carry = hapo_with_statistics()
    slot = dict(temperature=algorithm.temperature, carry=carry)
    rollout, rows = told(Sampling(9), 4, **slot)
    want = generate(Sampling(9), **slot)
    for name, values in want._asdict().items():
        np.testing.assert_array_equal(getattr(rollout, name), values, err_msg=name)
    assert_each_row_told_once(rollout, rows)


@pytest.mark.parametrize("stop", [(), tuple(range(40))], ids=["never", "at once"])
def test_rows_that_end_together(stop):
    rollout, rows = told(Sampling(9, stop_token_ids=stop), 4)
    assert_each_row_told_once(rollout, rows)
    assert {len(tokens) for _, tokens in rows} == {1 if stop else 9}


@pytest.mark.parametrize("axes", [{}, {"data": 2, "tensor": 2}], ids=["one device", "mesh"])
def test_all_segments_are_one_program(axes):
    sampling, mesh = Sampling(8, stop_token_ids=(1, 2)), sharding.make_mesh(**axes)
    want, before = generate(sampling), local._segment._cache_size()
    with jax.set_mesh(mesh):
        engine = local.local_engine(MODEL, max_prompt_tokens=7, stream_tokens=2)
        weights = engine.load(jax.device_put(PARAMS, sharding.tree_shardings(PARAMS, mesh)), 0)
        rollout, rows = told(sampling, 2, engine, weights)
    assert local._segment._cache_size() == before + 1
    assert_each_row_told_once(rollout, rows)
    np.testing.assert_array_equal(rollout.tokens, want.tokens)


def test_what_the_listener_raises_ends_generation():
    def refuse(row, tokens):
        raise RuntimeError("too many errors")

    with pytest.raises(RuntimeError, match="too many errors"):
        told(Sampling(9), 2, finished=refuse)


def test_an_impossible_segment_is_refused():
    with pytest.raises(ValueError, match="sampling.stream_tokens=0"):
        local.local_engine(MODEL, max_prompt_tokens=7, stream_tokens=0)

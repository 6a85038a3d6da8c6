"""Law 2 over every entry of the algorithm table, and mutants that show that each check can fail."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from launch import sections
from tapojax import advantages, entropy, losses, shaping, weights
from tapojax.algorithms import ALGORITHMS, papo_signals
from tapojax.tasks.arithmetic import arithmetic
from tests.algorithms import checks

TASK = arithmetic(seed=0, max_prompt_tokens=8)
KNOBS = {
    "grpo": [{}, {"kl_coef": 0.1, "dual_clip": 3.0}],
    "dapo": [{}, {"overlong_buffer": 4}],
    "papo": [{}, {"overlong_buffer": 4}, *({"signal": name} for name in papo_signals.SIGNALS if name != "decoupled")],
    "fapo": [{}, {"flaw_penalty": 0.5}],
    "hapo": [{}, {"signed": False}],
    "archer": [{}, {"low_entropy_kl": 0.0}],
    "pkpo": [{"k": 1}],  # with more, one right row of four drawn is enough: no signal in these groups
    "tapo": [{}, {"luffy_shaping": 0.1}, {"use_ali": False}, {"use_dti": False, "use_pai": False}],
}
CASES = [(name, knobs) for name in ALGORITHMS for knobs in KNOBS.get(name, [{}])]


@functools.cache
def build(name, **knobs):
    given = dict(group_size=checks.GROUP_SIZE, max_tokens=checks.MAX_TOKENS, temperature=1.0, steps=100, task=TASK)
    return sections.build(ALGORITHMS, {"name": name, **knobs}, "algorithm", **given)


@pytest.mark.parametrize("check", checks.ALL, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("name", "knobs"), CASES, ids=lambda x: x if isinstance(x, str) else "+".join(x) or "default")
def test_promise(check, name, knobs):
    algorithm = build(name, **knobs)
    if check is checks.equal_rewards and (algorithm.needs_reference or "overlong_buffer" in knobs):
        pytest.skip("a KL term or a length penalty is a gradient of its own")
    if check is checks.equal_rewards and algorithm.inject is not None and algorithm.signals is not None:
        pytest.skip("injected rows have advantages of their own")
    check(algorithm)


def test_the_decoder_keeps_the_promises_too():
    """The rest of the suite takes a bigram table for a policy; once with the real one, on all meshes and splits."""
    algorithm = build("dapo")
    checks.devices(algorithm, actor=checks.DECODER)
    batch = checks.batch_of(algorithm, checks.rollout(), checks.scores(), actor=checks.DECODER)
    whole = checks.gradient(algorithm, batch, actor=checks.DECODER)
    split = checks.gradient(algorithm, batch, microbatches=4, actor=checks.DECODER)
    checks.assert_same(split, whole, "4 micro-batches")


# Mutants: each is a mistake that a published trainer has made. A check must notice.


def test_mutant_divides_per_microbatch():
    """loss / (tokens of this micro-batch), added over micro-batches."""
    parent = build("dapo")

    def loss(stats, batch):
        per_token, diagnostics = parent.loss(stats, batch)
        return per_token * weights.token_mean(batch.mask), diagnostics

    mutant = parent._replace(loss=loss, weights=lambda mask: jnp.ones(mask.shape))
    with pytest.raises(AssertionError, match="micro-batches"):
        checks.microbatches(mutant)


def test_mutant_takes_the_mask_from_token_values():
    """mask = tokens != pad loses every EOS where pad == eos."""
    parent = build("grpo")

    def masked(fn):
        def with_wrong_mask(stats, batch):
            keep = batch.mask & (batch.tokens != checks.EOS)
            per_token, diagnostics = fn(stats, batch)
            return jnp.where(keep, per_token, 0), diagnostics

        return with_wrong_mask

    mutant = parent._replace(loss=masked(parent.loss))
    rows = checks.rollout()
    assert (rows.tokens[rows.mask] == checks.EOS).any(), "the test has EOS tokens"
    want = checks.gradient(parent, checks.batch_of(parent, rows, checks.scores()))
    with pytest.raises(AssertionError):
        checks.assert_same(checks.gradient(mutant, checks.batch_of(mutant, rows, checks.scores())), want, "EOS")


def test_mutant_measures_length_in_characters():
    """A token of several characters must not be punished more than one of a single character."""
    lengths = checks.rollout().mask.sum(axis=1)
    algorithm = build("dapo", overlong_buffer=4)
    got = algorithm.rewards(checks.scores([0.0] * 16), checks.rollout(), 0)
    in_tokens = shaping.overlong_penalty(jnp.asarray(lengths), max_length=checks.MAX_TOKENS, buffer=4)
    in_characters = shaping.overlong_penalty(jnp.asarray(lengths * 3), max_length=checks.MAX_TOKENS, buffer=4)
    np.testing.assert_array_equal(got, in_tokens - 1)
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(got, in_characters - 1)


def test_mutant_divides_by_the_population_std():
    """ddof 0 blows advantages up by sqrt(G / (G - 1))."""
    rewards = np.array([1.0, 0.0, 0.0, 0.0], np.float32)
    ours = advantages.group_normalize(jnp.asarray(rewards), 4)
    np.testing.assert_allclose(ours, (rewards - 0.25) / (rewards.std(ddof=1) + 1e-6), rtol=1e-6)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(ours, (rewards - 0.25) / (rewards.std(ddof=0) + 1e-6), rtol=1e-6)


def test_mutant_takes_the_ratio_against_the_behaviour_policy():
    parent = build("grpo")

    def loss(stats, batch):
        per_token = losses.clipped_surrogate(
            stats.logprobs, batch.behaviour_logprobs, batch.advantages, clip_low=0.2, clip_high=0.2
        )
        return per_token, {}

    with pytest.raises(AssertionError, match="sampler"):
        checks.behaviour_is_not_old(parent._replace(loss=loss))


def test_mutant_takes_entropy_statistics_per_microbatch():
    """The released HAPO code: quantile and scale of the current policy's entropies in this micro-batch."""
    parent = build("hapo")

    def loss(stats, batch):
        signal, _ = entropy.signal(stats.entropies, batch.mask)
        return parent.loss(stats, batch._replace(signals={"entropy_signal": signal}))

    with pytest.raises(AssertionError, match="micro-batches"):
        checks.microbatches(parent._replace(loss=loss))


def test_mutant_takes_entropy_statistics_over_the_padding_too():
    """Entropies in another row order than their masks: zeros of the padding count as very sure tokens."""
    parent = build("hapo")

    def signals(old_stats, rollout):
        signal, _ = entropy.signal(old_stats.entropies, jnp.ones_like(rollout.mask))
        return {"entropy_signal": signal}

    with pytest.raises(AssertionError, match="padding"):
        checks.padding(parent._replace(signals=signals))


def test_mutant_averages_over_the_forking_tokens_of_the_microbatch():
    """The released code of Wang et al.: the fifth of this micro-batch's tokens, divided by their number here."""
    parent = build("dapo")

    def loss(stats, batch):
        kept = entropy.top_fraction(stats.entropies, batch.mask, 0.2)
        per_token, diagnostics = parent.loss(stats, batch)
        return per_token * weights.token_mean(kept), diagnostics

    mutant = parent._replace(loss=loss, weights=lambda mask: jnp.ones(mask.shape))
    with pytest.raises(AssertionError, match="micro-batches"):
        checks.microbatches(mutant)

"""What the decoder promises beside agreeing with other implementations (for that see tests/parity)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tapojax.models import decoder
from tapojax.models.config import REMAT, DecoderConfig, Llama3Rope

SMALL = DecoderConfig(
    vocab_size=40,
    hidden_size=24,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    qkv_bias=True,
    initializer_range=0.2,  # far from linear, so that every part matters
)
FAMILIES = {
    "qwen2": dataclasses.replace(SMALL, tie_embeddings=True),
    "qwen3": dataclasses.replace(SMALL, qkv_bias=False, qk_norm=True, head_dim=10),
    "llama": dataclasses.replace(
        SMALL, output_bias=True, mlp_bias=True, rope_scaling=Llama3Rope(8.0, 1.0, 4.0, original_max_position=16)
    ),
}


hidden_states = jax.jit(decoder.hidden_states, static_argnums=0)


def randomised(config, seed=0):
    """Every leaf drawn: norms and biases start at one and zero, where a forgotten one would not show."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))
    params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(x.dtype), shapes)
    return jax.tree_util.tree_map_with_path(lambda path, x: jnp.asarray(x + ("scale" in str(path[-1]))), params)


def random_tokens(shape, seed=2):
    return jnp.asarray(np.random.default_rng(seed).integers(0, SMALL.vocab_size, shape))


@pytest.mark.parametrize("family", FAMILIES)
def test_causality_by_gradients(family):
    """The hidden state at position t depends on the tokens at 0..t, on all of them, and on no later one."""
    config, length = FAMILIES[family], 9
    params, tokens = randomised(config), jnp.arange(length)[None]  # all different: row t of the embedding is position t

    def hidden(embedding, t):
        return jnp.sum(decoder.hidden_states(config, params | {"embedding": embedding}, tokens)[0, t] ** 3)

    gradients = jax.jit(jax.vmap(jax.grad(hidden), (None, 0)))(params["embedding"], np.arange(length))
    seen = np.abs(gradients[:, :length]).max(-1) > 0  # [t, position]
    np.testing.assert_array_equal(seen, np.tril(np.ones((length, length), bool)))


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decode_steps_agree_with_the_whole_row(family):
    """Ragged prompts, G completions of each: decoding token by token = one pass over prompt + completion."""
    config, group_size, budget = FAMILIES[family], 3, 5
    lengths, params = jnp.array([7, 1, 4]), randomised(config)
    prompts, completions = random_tokens((3, 7)), random_tokens((3, group_size, budget), seed=3)
    apart = decoder.unstack_layers(config, params)

    prefill = jax.jit(lambda: decoder.prefill(config, apart, prompts, group_size=group_size, max_tokens=budget))
    step = jax.jit(lambda caches, tokens, i: decoder.decode_step(config, apart, caches, tokens, lengths, i))
    hidden, caches = prefill()
    decoded = []
    for i in range(budget):
        states, caches = step(caches, completions[:, :, i], i)
        decoded.append(states)

    rows = np.zeros((3, group_size, 7 + budget), np.int64)
    for p, length in enumerate(lengths.tolist()):
        rows[p, :, :length] = prompts[p, :length]
        rows[p, :, length : length + budget] = completions[p]
    whole = np.asarray(hidden_states(config, params, rows.reshape(9, -1))).reshape(*rows.shape, -1)
    for p, length in enumerate(lengths.tolist()):
        np.testing.assert_allclose(hidden[p, :length], whole[p, 0, :length], atol=2e-5, err_msg="prefill != whole row")
        for i, states in enumerate(decoded):
            np.testing.assert_allclose(states[p], whole[p, :, length + i], atol=2e-5, err_msg=f"decode_step {i} != row")


def test_right_padding_and_neighbours_do_not_matter():
    params, tokens = randomised(SMALL), random_tokens((3, 9))
    got = hidden_states(SMALL, params, tokens)
    other = jnp.where(jnp.arange(9) < 6, tokens, 0).at[2].set(1)
    np.testing.assert_allclose(hidden_states(SMALL, params, other)[:2, :6], got[:2, :6], atol=1e-6)


@functools.cache
def loss_and_gradient(config):
    tokens = random_tokens((2, 8))

    def loss(params):
        logits = decoder.hidden_states(config, params, tokens) @ decoder.head(params)
        return -jax.nn.log_softmax(logits.astype(jnp.float32))[:, :-1].mean()

    return jax.jit(jax.value_and_grad(loss))(randomised(config))


@pytest.mark.parametrize(("remat", "unroll"), [("none", True), *((remat, False) for remat in REMAT[1:])])
def test_remat_and_unroll_change_neither_loss_nor_gradient(remat, unroll):
    want, got = (loss_and_gradient(c) for c in (SMALL, dataclasses.replace(SMALL, remat=remat, unroll=unroll)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


def test_remat_recomputes_when_unrolled():
    """XLA must not merge the recomputation with the forward pass: then nothing would be saved."""

    def flops(remat):
        config = dataclasses.replace(SMALL, remat=remat, unroll=True)
        params = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))
        gradient = jax.grad(lambda params: decoder.hidden_states(config, params, random_tokens((2, 64))).sum())
        return jax.jit(gradient).lower(params).compile().cost_analysis()["flops"]

    assert flops("dots_with_no_batch_dims_saveable") > 1.02 * flops("none")


def test_bfloat16_compute_keeps_float32_params_and_gradients():
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    params, tokens = randomised(config), random_tokens((2, 8))
    hidden = np.asarray(hidden_states(config, params, tokens))
    exact = np.asarray(hidden_states(SMALL, params, tokens))
    _, gradient = loss_and_gradient(config)
    assert hidden.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves((params, gradient))} == {jnp.dtype("float32")}
    assert 0 < np.abs(hidden.astype(np.float32) - exact).max() < 0.05 * np.abs(exact).max()


def test_bfloat16_decoding_stays_in_bfloat16():
    config = dataclasses.replace(SMALL, dtype="bfloat16", param_dtype="bfloat16")

    def decode(key):
        apart = decoder.unstack_layers(config, decoder.init(config, key))
        prompts, lengths = jnp.zeros((2, 4), jnp.int32), jnp.array([4, 2])
        hidden, caches = decoder.prefill(config, apart, prompts, group_size=2, max_tokens=3)
        return apart, hidden, decoder.decode_step(config, apart, caches, prompts[:, :2], lengths, 0)

    everything = jax.eval_shape(decode, jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(everything)} == {jnp.dtype("bfloat16")}


def test_rotary_scores_depend_on_distance_alone():
    q, k = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 1, 1, SMALL.head_dim)), jnp.float32)

    @jax.jit
    def score(*positions):
        tables = [decoder.rotary_tables(SMALL, jnp.full((1, 1), position)) for position in positions]
        return jnp.sum(decoder.rotate(q, *tables[0]) * decoder.rotate(k, *tables[1]))

    assert float(score(11, 4)) == pytest.approx(float(score(107, 100)), rel=1e-4)
    assert float(score(11, 4)) != pytest.approx(float(score(12, 4)), rel=1e-2)
    assert float(score(0, 0)) == pytest.approx(float(np.sum(q * k)), rel=1e-5), "position 0 is not turned"


def test_llama3_stretches_slow_frequencies_only():
    """w = 2 pi theta^(2i/H): kept if M / w > high, divided by the factor if M / w < low, a linear ramp between."""
    factor, low, high, original = 8.0, 1.0, 4.0, 8192
    config = dataclasses.replace(
        SMALL, head_dim=128, rope_theta=5e5, rope_scaling=Llama3Rope(factor, low, high, original_max_position=original)
    )
    regimes = set()
    want = []
    for i in range(64):
        frequency = 5e5 ** (-2 * i / 128)
        turns = original * frequency / (2 * np.pi)  # of this channel pair over the original context
        if turns > high:
            regimes.add("kept")
        elif turns < low:
            frequency, _ = frequency / factor, regimes.add("stretched")
        else:
            ramp = (turns - low) / (high - low)
            frequency, _ = (1 - ramp) * frequency / factor + ramp * frequency, regimes.add("ramp")
        want.append(frequency)
    assert regimes == {"kept", "ramp", "stretched"}
    cos, sin = jax.jit(decoder.rotary_tables, static_argnums=0)(config, np.array([0, 1, 100]))
    angles = np.array([0, 1, 100])[:, None] * np.array(want)
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-5)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-5)


def test_init_is_reproducible_and_scaled():
    init = jax.jit(decoder.init, static_argnums=0)
    one, other = (init(SMALL, jax.random.key(7)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert np.std(one["layers"]["up"]["kernel"]) == pytest.approx(SMALL.initializer_range, rel=0.1)
    kernels = one["layers"]["up"]["kernel"]
    assert not np.array_equal(kernels[0], kernels[1]), "layers must draw apart"


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_kv_heads", 3, "num_kv_heads=3"),
        ("head_dim", 7, "must be even"),
        ("remat", "offload", "choose one of"),
    ],
)
def test_impossible_shapes_are_refused(field, value, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(SMALL, **{field: value})

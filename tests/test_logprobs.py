"""log p[y] = z[y] - logsumexp z and H = -Σ p log p, chunked or not, with their gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tapojax import logprobs


def make(rows=3, length=5, width=8, vocab=33, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    hidden = jax.random.normal(keys[0], (rows, length, width))
    head = jax.random.normal(keys[1], (width, vocab))
    return hidden, head, jax.random.randint(keys[2], (rows, length), 0, vocab)


def plain(hidden, head, targets, temperature):
    """The definition, with the whole [B, T, V] in memory."""
    log_p = jax.nn.log_softmax(hidden @ head / temperature, axis=-1)
    chosen = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return chosen, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("max_bytes", [2**27, 8 * 33 * 4, 1])
def test_matches_the_definition_and_its_gradient(temperature, max_bytes):
    hidden, head, targets = make()

    def scalar(fn):
        def f(hidden, head):
            log_p, entropy = fn(hidden, head)
            return jnp.sum(jnp.sin(log_p)) + jnp.sum(entropy**2)

        return jax.value_and_grad(f, argnums=(0, 1))

    def ours(h, w):
        return logprobs.token_logprobs_and_entropy(h, w, targets, temperature=temperature, max_bytes=max_bytes)

    for got, want in zip(ours(hidden, head), plain(hidden, head, targets, temperature), strict=True):
        np.testing.assert_allclose(got, want, rtol=5e-5, atol=5e-5)
    got, want = scalar(ours)(hidden, head), scalar(lambda h, w: plain(h, w, targets, temperature))(hidden, head)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def test_jit_vmap_and_bfloat16_inputs():
    hidden, head, targets = make()
    want = logprobs.token_logprobs_and_entropy(hidden, head, targets)
    each = jax.vmap(lambda h, t: logprobs.token_logprobs_and_entropy(h[None], head, t[None]))(hidden, targets)
    for got, reference in zip(jax.jit(lambda *xs: each)(), want, strict=True):
        np.testing.assert_allclose(got[:, 0], reference, rtol=1e-5, atol=1e-5)
    low, _ = logprobs.token_logprobs_and_entropy(hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16), targets)
    assert low.dtype == jnp.float32, "log-probs are float32 whatever the activations are"


def test_extreme_logits_stay_finite():
    hidden, head, targets = make()
    value, gradient = jax.value_and_grad(
        lambda h: sum(jnp.sum(x) for x in logprobs.token_logprobs_and_entropy(h * 1e4, head, targets))
    )(hidden)
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_no_buffer_of_all_logits_at_a_real_vocabulary(mode):
    """Law 7, on the compiled program at V = 151,936: the largest float buffer is the head or one chunk."""
    rows, length, width, vocab, budget = 4, 512, 64, 151_936, 2**26
    shapes = [
        jax.ShapeDtypeStruct((rows, length, width), jnp.float32),
        jax.ShapeDtypeStruct((width, vocab), jnp.float32),
        jax.ShapeDtypeStruct((rows, length), jnp.int32),
    ]

    def forward(hidden, head, targets):
        return logprobs.token_logprobs_and_entropy(hidden, head, targets, max_bytes=budget)

    def loss(hidden, head, targets):
        return sum(jnp.sum(x) for x in forward(hidden, head, targets))

    fn = forward if mode == "forward" else jax.grad(loss, argnums=(0, 1))
    compiled = jax.jit(fn).lower(*shapes).compile()
    text = compiled.as_text()
    sizes = [int(np.prod([int(d) for d in dims.split(",")])) for dims in re.findall(r"f32\[([\d,]+)\]", text)]
    assert max(sizes) * 4 <= max(budget, width * vocab * 4), "a buffer larger than the head and the logit budget"
    assert max(sizes) < rows * length * vocab / 10
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert temporaries < 3 * budget + 3 * width * vocab * 4, f"{temporaries / 2**20:.0f} MiB of temporaries"


@pytest.mark.parametrize("max_bytes", [2**27, 1])
@pytest.mark.parametrize("which", [0, 1])
def test_gradient_of_one_output_alone(which, max_bytes):
    """A log-prob loss pays no logarithm for the entropy, and an entropy bonus alone is right too."""
    hidden, head, targets = make()

    def ours(h):
        return jnp.sum(logprobs.token_logprobs_and_entropy(h, head, targets, max_bytes=max_bytes)[which] ** 2)

    want = jax.grad(lambda h: jnp.sum(plain(h, head, targets, 1.0)[which] ** 2))(hidden)
    np.testing.assert_allclose(jax.grad(ours)(hidden), want, rtol=2e-4, atol=2e-4)

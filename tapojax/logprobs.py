"""Log-probability of given tokens and entropy of the whole distribution, without a [B, T, V] buffer.

The vocabulary head is applied to a chunk of positions at a time, in the forward and in the backward pass: logits live
inside a byte budget (law of this house), whatever the batch. A problem that fits one chunk is not looped over.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_logprobs_and_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    *,
    temperature: float = 1.0,
    max_bytes: int = 2**27,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """log p[y] and H(p) for p = softmax(hidden · head / temperature), in float32, differentiable in hidden and head.

    With z the scaled logits, L = logsumexp z:  log p[y] = z[y] - L,  H = L - Σ p z (nats).
    Backward, for upstream a (log-prob) and b (entropy):  dz = a (1[y] - p) - b p (log p + H).

    Args:
      max_bytes: budget of one float32 chunk of logits. The backward pass holds two (logits and their gradient).
    """
    positions, vocab = targets.size, head.shape[-1]
    chunk = min(positions, max(8, max_bytes // (4 * vocab)))
    padding = -positions % chunk
    x = jnp.pad(hidden.reshape(positions, -1), ((0, padding), (0, 0)))
    y = jnp.pad(targets.reshape(-1), (0, padding))
    logprobs, entropies = _flat(x, head, y, temperature, chunk)
    return logprobs[:positions].reshape(targets.shape), entropies[:positions].reshape(targets.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _flat(x, head, y, temperature, chunk):
    return _forward(x, head, y, temperature, chunk)[0]


def _logits(x, head, temperature):
    return jnp.matmul(x, head.astype(x.dtype), preferred_element_type=jnp.float32) / temperature


def _forward(x, head, y, temperature, chunk):
    def one_chunk(x, y):
        z = _logits(x, head, temperature)
        normaliser = jax.nn.logsumexp(z, axis=-1)
        p = jnp.exp(z - normaliser[:, None])
        logprobs = jnp.take_along_axis(z, y[:, None], axis=-1)[:, 0] - normaliser
        return logprobs, normaliser - jnp.sum(p * z, axis=-1), normaliser

    logprobs, entropies, normalisers = _map_chunks(one_chunk, chunk, x, y)
    return (logprobs, entropies), (x, head, y, normalisers, entropies)


def _backward(temperature, chunk, residuals, upstream):
    x, head, y, normalisers, entropies = residuals

    def one_chunk(d_head, xs):
        x, y, normaliser, entropy, a, b = xs
        log_p = _logits(x, head, temperature) - normaliser[:, None]
        p = jnp.exp(log_p)
        dz = -a[:, None] * p - b[:, None] * p * (log_p + entropy[:, None])
        dz = dz.at[jnp.arange(y.size), y].add(a) / temperature
        dz = dz.astype(x.dtype)
        d_head = d_head + jnp.matmul(x.T, dz, preferred_element_type=jnp.float32)
        return d_head, jnp.matmul(dz, head.T.astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)

    inputs = (x, y, normalisers, entropies, *upstream)
    d_head = jnp.zeros(head.shape, jnp.float32)
    if chunk == x.shape[0]:
        d_head, d_x = one_chunk(d_head, inputs)
    else:
        d_head, d_x = jax.lax.scan(one_chunk, d_head, jax.tree.map(lambda v: _split(v, chunk), inputs))
    return d_x.reshape(x.shape), d_head.astype(head.dtype), None


def _split(v, chunk):
    return v.reshape(-1, chunk, *v.shape[1:])


def _map_chunks(fn, chunk, *args):
    if chunk == args[0].shape[0]:
        return fn(*args)
    out = jax.lax.map(lambda xs: fn(*xs), tuple(_split(v, chunk) for v in args))
    return jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), out)


_flat.defvjp(_forward, _backward)

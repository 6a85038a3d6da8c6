"""Log-probability of given tokens and entropy of the whole distribution, without a [B, T, V] buffer.

The vocabulary head is applied to a chunk of positions at a time, in the forward and in the backward pass: logits live
inside a byte budget (law of this house), whatever the batch. A problem that fits one chunk is not looped over.
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
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
    # As [V, D]: of tied embeddings the two transposes cancel, and no loop carries a transposed copy.
    logprobs, entropies = _flat(x, head.T, y, temperature, chunk)
    return logprobs[:positions].reshape(targets.shape), entropies[:positions].reshape(targets.shape)


_TINY = 1e-30  # its logarithm stands in for log 0, where p log p is 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _flat(x, table, y, temperature, chunk):
    return _forward(x, table, y, temperature, chunk)[0]


def _logits(x, table, temperature):
    return jnp.einsum("nd,vd->nv", x, table.astype(x.dtype), preferred_element_type=jnp.float32) / temperature


def _forward(x, table, y, temperature, chunk):
    def one_chunk(x, y):
        z = _logits(x, table, temperature)
        normaliser = jax.nn.logsumexp(z, axis=-1)
        log_p = z - normaliser[:, None]
        p = jnp.exp(log_p)
        logprobs = jnp.take_along_axis(z, y[:, None], axis=-1)[:, 0] - normaliser
        # All terms are of one sign: a nearly sure policy's entropy keeps digits that normaliser - Σ p·z would lose.
        return logprobs, -jnp.sum(p * log_p, axis=-1), normaliser, p

    if chunk == x.shape[0]:  # within the budget: keep p for the backward pass
        logprobs, entropies, normalisers, p = one_chunk(x, y)
        return (logprobs, entropies), (x, table, y, normalisers, entropies, p)
    out = jax.lax.map(lambda part: one_chunk(*part)[:3], (_split(x, chunk), _split(y, chunk)))
    logprobs, entropies, normalisers = (values.reshape(-1) for values in out)
    return (logprobs, entropies), (x, table, y, normalisers, entropies, None)


def _forward_of_primals(x, table, y, temperature, chunk):
    return _forward(x.value, table.value, y.value, temperature, chunk)


def _backward(temperature, chunk, residuals, upstream):
    x, table, y, normalisers, entropies, p = residuals
    a, b = upstream
    if entropy_is_constant := isinstance(b, SymbolicZero):
        b = jnp.zeros_like(entropies)
    if isinstance(a, SymbolicZero):
        a = jnp.zeros_like(entropies)

    def one_chunk(d_table, part):
        x, y, normaliser, entropy, a, b, p = part
        if p is None:
            p = jnp.exp(_logits(x, table, temperature) - normaliser[:, None])
        slope = a[:, None]
        if not entropy_is_constant:  # spares a logarithm of every probability
            slope = slope + b[:, None] * (jnp.log(jnp.maximum(p, _TINY)) + entropy[:, None])
        chosen = jnp.arange(table.shape[0])[None] == y[:, None]  # fuses, where a scatter would copy the chunk
        dz = ((jnp.where(chosen, a[:, None], 0) - p * slope) / temperature).astype(x.dtype)
        d_table = d_table + jnp.einsum("nv,nd->vd", dz, x, preferred_element_type=jnp.float32)
        d_x = jnp.matmul(dz, table.astype(x.dtype), preferred_element_type=jnp.float32)
        return d_table, d_x.astype(x.dtype)

    parts, d_table = (x, y, normalisers, entropies, a, b, p), jnp.zeros(table.shape, jnp.float32)
    if chunk == x.shape[0]:
        d_table, d_x = one_chunk(d_table, parts)
    else:
        d_table, d_x = jax.lax.scan(one_chunk, d_table, jax.tree.map(lambda v: _split(v, chunk), parts))
    return d_x.reshape(x.shape), d_table.astype(table.dtype), None


def _split(v, chunk):
    return v.reshape(-1, chunk, *v.shape[1:])


_flat.defvjp(_forward_of_primals, _backward, symbolic_zeros=True)

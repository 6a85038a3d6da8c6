import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tapojax import shaping


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

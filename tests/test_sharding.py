"""Every array of a TrainState lies where the table says, the optimizer's moments beside their parameters."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from launch import build
from tapojax import sharding
from tapojax.algorithms.grpo import grpo
from tapojax.models import decoder
from tapojax.models.config import DecoderConfig

P = jax.P
MODEL = DecoderConfig(64, 32, 48, 2, 4, 2, 8, qkv_bias=True, mlp_bias=True, output_bias=True, qk_norm=True)
WANT = {  # layers are stacked: the first dimension of their leaves is the layer
    "embedding": P("tensor", "fsdp"),
    "head": P("tensor", "fsdp"),
    "final_norm/scale": P(),
    "layers/attention_norm/scale": P(),
    "layers/mlp_norm/scale": P(),
    "layers/query_norm/scale": P(),
    "layers/key_norm/scale": P(),
    "layers/query/kernel": P(None, "fsdp", "tensor", None),
    "layers/query/bias": P(None, "tensor", None),
    "layers/key/kernel": P(None, "fsdp", "tensor", None),
    "layers/key/bias": P(None, "tensor", None),
    "layers/value/kernel": P(None, "fsdp", "tensor", None),
    "layers/value/bias": P(None, "tensor", None),
    "layers/output/kernel": P(None, "tensor", None, "fsdp"),
    "layers/output/bias": P(),
    "layers/gate/kernel": P(None, "fsdp", "tensor"),
    "layers/gate/bias": P(None, "tensor"),
    "layers/up/kernel": P(None, "fsdp", "tensor"),
    "layers/up/bias": P(None, "tensor"),
    "layers/down/kernel": P(None, "tensor", "fsdp"),
    "layers/down/bias": P(),
}


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def state(mesh):
    shardings = sharding.tree_shardings(jax.eval_shape(lambda: decoder.init(MODEL, jax.random.key(0))), mesh)
    params = jax.jit(lambda: decoder.init(MODEL, jax.random.key(0)), out_shardings=shardings)()
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return build.fresh_state(grpo(group_size=4), optimizer, params, mesh)


def assert_lies(leaf, spec, mesh, name):
    want = jax.NamedSharding(mesh, spec)
    assert leaf.sharding.is_equivalent_to(want, leaf.ndim), f"{name} {leaf.shape} lies as {leaf.sharding}, not {spec}"
    ways = np.prod([mesh.shape[axis] for axis in spec if axis])
    assert leaf.addressable_shards[0].data.size * ways == leaf.size, f"{name}: a device holds more than its part"


def test_parameters_lie_by_the_table(state, mesh):
    params = by_path(state.params)
    assert params.keys() == WANT.keys(), "the test names every leaf of the decoder"
    for name, leaf in params.items():
        assert_lies(leaf, WANT[name], mesh, name)


@pytest.mark.parametrize("moment", ["mu", "nu"])
def test_moments_lie_like_their_parameters(state, mesh, moment):
    moments = {name: leaf for name, leaf in by_path(state.opt_state).items() if f"/{moment}/" in name}
    assert len(moments) == len(WANT)
    for name, leaf in moments.items():
        assert_lies(leaf, WANT[re.sub(rf".*/{moment}/", "", name)], mesh, name)
        if name.endswith("kernel"):
            assert not leaf.sharding.is_fully_replicated, f"{name} is replicated: it costs {leaf.nbytes} bytes a device"


def test_the_rest_of_the_state_is_replicated(state):
    rest = {name: leaf for name, leaf in by_path(state).items() if not {"params", "mu", "nu"} & set(name.split("/"))}
    assert {"step", "opt_state/1/0/count"} <= rest.keys()
    assert all(leaf.sharding.is_fully_replicated for leaf in rest.values())


def test_parameters_do_not_depend_on_the_mesh(state):
    alone = by_path(jax.jit(lambda: decoder.init(MODEL, jax.random.key(0)))())
    for name, leaf in by_path(state.params).items():
        np.testing.assert_allclose(leaf, alone[name], rtol=1e-6, err_msg=name)


def test_an_axis_that_does_not_divide_is_dropped(mesh):
    """3 heads over 2 tensor devices: that dimension stays whole, the others are still split."""
    odd = dataclasses.replace(MODEL, num_heads=3, num_kv_heads=3, vocab_size=49)
    shapes = jax.eval_shape(lambda: decoder.init(odd, jax.random.key(0)))
    shardings = by_path(sharding.tree_shardings(shapes, mesh))
    assert shardings["layers/query/kernel"].spec == P(None, "fsdp", None, None)
    assert shardings["embedding"].spec == P(None, "fsdp")
    assert shardings["head"].spec == P(None, "fsdp")
    for name, leaf in by_path(shapes).items():
        jax.device_put(np.zeros(leaf.shape, leaf.dtype), shardings[name])  # raises where a part would be uneven


def test_the_first_rule_decides(mesh):
    rules = ((r"kernel$", P("data")), (r"layers/.*", P("fsdp")), (r".*", P()))
    assert sharding.spec_for("layers/query/kernel", (4,), mesh, rules) == P("data")
    assert sharding.spec_for("layers/query/bias", (4,), mesh, rules) == P("fsdp")
    assert sharding.spec_for("step", (), mesh, rules) == P()
    assert sharding.spec_for("params/subheading", (4, 4), mesh) == P(), "the table's patterns are anchored at the end"


def test_mesh_axes():
    mesh = sharding.make_mesh(data=2, tensor=3)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 3, "context": 1}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert mesh.devices.size == 6, "spare devices stay out"


def test_too_many_devices_are_refused():
    with pytest.raises(ValueError, match=r"'data': 4, 'fsdp': 4.* needs 16 devices, this process sees 8 \(cpu\).*=16"):
        sharding.make_mesh(data=4, fsdp=4)


def test_rows_are_split_over_data_and_fsdp(mesh):
    batch = {"tokens": np.arange(24).reshape(8, 3), "rewards": np.arange(8.0)}
    placed = sharding.shard_batch(batch, mesh)
    for name, x in placed.items():
        np.testing.assert_array_equal(x, batch[name])
        assert x.addressable_shards[0].data.shape[0] == 2, f"{name}: 8 rows over 4 devices"


def test_rows_that_do_not_divide_are_refused(mesh):
    with pytest.raises(ValueError, match=r"6 rows cannot be split over data \* fsdp = 4 devices: choose"):
        sharding.shard_batch((np.zeros((6, 3)), None), mesh)


def test_constrain_does_nothing_without_a_mesh(mesh):
    x = jnp.ones((8, 6))
    assert sharding.constrain(x, "batch", None) is x

    def text():
        return jax.jit(lambda x: sharding.constrain(x * 2, "batch", "tensor")).lower(x).as_text()

    assert "sharding_constraint" not in text()
    with jax.set_mesh(mesh):
        assert "sharding_constraint" in text()
        y = jax.jit(lambda x: sharding.constrain(x * 2, "batch", "tensor"))(x)
    assert y.sharding.is_equivalent_to(jax.NamedSharding(mesh, P(("data", "fsdp"), "tensor")), 2)

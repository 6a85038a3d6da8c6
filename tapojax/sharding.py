"""Where arrays live: one mesh, one table of regular expressions over the whole TrainState.

Axes: `data` replicates parameters, `fsdp` shards them and the batch, `tensor` splits heads, MLP width and vocabulary,
`context` is kept for splitting long rows. They are of Auto type: the mathematics never mentions a device.
"""

import re

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor", "context")
BATCH = ("data", "fsdp")

# The first pattern found in a leaf's path decides. Adam's moments carry the same paths as the parameters.
RULES: tuple[tuple[str, P], ...] = (
    (r"(embedding|head)$", P("tensor", "fsdp")),
    (r"layers/(query|key|value)/kernel$", P(None, "fsdp", "tensor", None)),
    (r"layers/(query|key|value)/bias$", P(None, "tensor", None)),
    (r"layers/output/kernel$", P(None, "tensor", None, "fsdp")),
    (r"layers/(gate|up)/kernel$", P(None, "fsdp", "tensor")),
    (r"layers/(gate|up)/bias$", P(None, "tensor")),
    (r"layers/down/kernel$", P(None, "tensor", "fsdp")),
    (r".*", P()),
)


def make_mesh(*, data: int = 1, fsdp: int = 1, tensor: int = 1, context: int = 1) -> Mesh:
    """A mesh over the first data * fsdp * tensor * context devices.

    Raises:
      ValueError: fewer devices than the product.
    """
    shape = (data, fsdp, tensor, context)
    needed, devices = data * fsdp * tensor * context, jax.devices()
    if needed > len(devices):
        raise ValueError(
            f"mesh {dict(zip(AXES, shape, strict=True))} needs {needed} devices, this process sees {len(devices)} "
            f"({devices[0].platform}): lower mesh.*, or for a trial set NPROC=32 "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={needed}"
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:needed])


def spec_for(path: str, shape: tuple[int, ...], mesh: Mesh, rules=RULES) -> P:
    """The first rule that matches; an axis that does not divide its dimension is dropped."""
    spec = next(spec for pattern, spec in rules if re.search(pattern, path))
    axes = [axis if axis and dim % mesh.shape[axis] == 0 else None for axis, dim in zip(spec, shape, strict=False)]
    return P(*axes)


def tree_shardings(tree, mesh: Mesh, rules=RULES):
    """A NamedSharding for each leaf of a tree of arrays or shapes, by its path such as `params/layers/query/kernel`."""

    def sharding(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec_for(name, leaf.shape, mesh, rules))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def shard_batch(batch, mesh: Mesh):
    """Puts host arrays on the mesh, rows split over the batch axes.

    Raises:
      ValueError: the number of rows is not a multiple of data * fsdp.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % ways:
        raise ValueError(f"{rows} rows cannot be split over data * fsdp = {ways} devices: choose a multiple of {ways}")
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P(BATCH))), batch)


def constrain(x, *axes):
    """Asks for a layout inside jit; "batch" stands for the batch axes. Does nothing where no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(*(BATCH if axis == "batch" else axis for axis in axes)))

"""Saving and restoring everything that decides the future of a run, with orbax.

A step is written beside the others and renamed when complete, so a kill at any moment leaves the previous ones whole.
Orbax reads a file with a changed byte without a complaint, so each step carries digests of its arrays and its record.
"""

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging


def open_manager(directory: str | Path, *, keep: int = 2) -> ocp.CheckpointManager:
    """The checkpoints of a run, the newest `keep` of them."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
    return ocp.CheckpointManager(Path(directory).absolute(), options=options)


def save(manager: ocp.CheckpointManager, step: int, state: Any, record: dict):
    """Writes `state` (a pytree of arrays) and `record` (JSON: data position, anything on the host) as one step.

    Steps from this one on that exist already are removed first: a resumed run found them damaged, and orbax would keep
    them and write nothing.

    Raises:
      OSError: naming the folder, when the disk refuses; earlier steps stay and the partial one is removed.
    """
    sealed = {"record": record, "record_digest": _text_digest(record), "state_digests": _named_digests(state)}
    try:
        for damaged in [other for other in manager.all_steps() if other >= step]:
            logging.warning(
                "checkpoint %d in %s is removed: the run goes on from an earlier one", damaged, manager.directory
            )
            manager.delete(damaged)
        manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(sealed))
        )
        manager.wait_until_finished()
    except Exception as error:  # orbax wraps tensorstore's errors in several types
        for partial in Path(manager.directory).glob(f"{step}.orbax-checkpoint-tmp*"):
            shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(manager.directory).free
        raise OSError(
            f"checkpoint {step} could not be written to {manager.directory} ({free / 2**20:.0f} MiB free): {error}. "
            f"Steps {sorted(manager.all_steps())} are whole: make room and start again with the same --workdir."
        ) from error


def restore_newest(manager: ocp.CheckpointManager, like: Any) -> tuple[int, Any, dict] | None:
    """(step, state, record) of the newest step that can be read, laid out as `like`; None where there is no step.

    A newest step that is damaged is skipped with a warning that names it.

    Args:
      like: a pytree of ShapeDtypeStructs with shardings, or of arrays.

    Raises:
      ValueError: there are steps and none can be read.
    """
    steps, problems = sorted(manager.all_steps(), reverse=True), []
    for step in steps:
        try:
            items = manager.restore(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(like), record=ocp.args.JsonRestore()),
            )
            _check_digests(items["state"], items["record"])
            return step, items["state"], items["record"]["record"]
        except Exception as error:  # a damaged step raises anything from JSONDecodeError to a bare Exception
            problems.append(f"step {step}: {type(error).__name__}: {str(error)[:200]}")
            logging.warning(
                "checkpoint in %s cannot be read, trying the one before: %s", manager.directory, problems[-1]
            )
    if problems:
        raise ValueError(
            f"no checkpoint in {manager.directory} can be read: {'; '.join(problems)}. If the model's shape was "
            "changed, use another --workdir; if the files are damaged, delete the folder to start anew."
        )
    return None


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays: what `restore_newest` takes as `like`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _check_digests(state, sealed: dict):
    if _text_digest(sealed["record"]) != sealed["record_digest"]:
        raise ValueError("the record is not what was saved")
    saved = sealed["state_digests"]
    for name, (dtype, digest) in _named_digests(state).items():
        # a leaf that was cast on the way in has another digest; there is nothing to compare it with
        if saved[name][0] == dtype and saved[name][1] != digest:
            raise ValueError(f"{name} is not what was saved")


def _text_digest(record: dict) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _named_digests(state) -> dict[str, list]:
    """By path of the leaf: its dtype and its digest."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    digests = jax.device_get([_digest(leaf) for _, leaf in leaves])
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [str(leaf.dtype), int(digest)]
        for (path, leaf), digest in zip(leaves, digests, strict=True)
    }


@jax.jit
def _digest(leaf):
    """Σ_i word_i (2i + 1) mod 2^32: any one changed word shows, and no sharded leaf is gathered for it."""
    width = 4 if leaf.dtype.itemsize == 8 else leaf.dtype.itemsize  # 8 bytes become two words
    leaf = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
    words = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)
    strides = [int(np.prod(words.shape[axis + 1 :], dtype=object)) % 2**32 for axis in range(words.ndim)]
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis, stride in enumerate(strides):
        index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride)
    return jnp.sum(words * (2 * index + 1), dtype=jnp.uint32)

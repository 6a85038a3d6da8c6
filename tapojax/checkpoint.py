"""Saving and restoring everything that decides the future of a run, with orbax.

A step is written beside the others and renamed when complete, so a kill at any moment leaves the previous ones whole.
"""

import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging


def open_manager(directory: str | Path, *, keep: int = 2) -> ocp.CheckpointManager:
    """The checkpoints of a run, the newest `keep` of them."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
    return ocp.CheckpointManager(Path(directory).absolute(), options=options)


def save(manager: ocp.CheckpointManager, step: int, state: Any, record: dict):
    """Writes `state` (a pytree of arrays) and `record` (JSON: data position, anything on the host) as one step.

    Raises:
      OSError: naming the folder, when the disk refuses; earlier steps stay and the partial one is removed.
    """
    try:
        manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)))
        manager.wait_until_finished()
    except Exception as error:  # orbax wraps tensorstore's errors in several types
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
            return step, items["state"], items["record"]
        except Exception as error:  # a damaged step raises anything from JSONDecodeError to a bare Exception
            problems.append(f"step {step}: {type(error).__name__}: {str(error)[:200]}")
            logging.warning("checkpoint in %s cannot be read, trying the one before: %s", manager.directory, problems[-1])
    if problems:
        raise ValueError(
            f"no checkpoint in {manager.directory} can be read: {'; '.join(problems)}. If the model's shape was changed, "
            "use another --workdir; if the files are damaged, delete the folder to start anew."
        )
    return None


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays: what `restore_newest` takes as `like`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)

"""A folder of safetensors, one file or shards with an index: opened whole or refused, written whole or not at all.

Knows files, not models. bfloat16 comes and goes as ml_dtypes' numpy type.
"""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  teaches numpy the name bfloat16, by which safetensors asks for it
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Shaped

PathLike = str | os.PathLike[str]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LISTED = 20


def existing(path: PathLike) -> Path:
    """The folder, if it is one.

    Raises:
      ValueError: it is not.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder. For a model of the Hugging Face Hub run `hf download {path} --local-dir DIR`, "
            "then pass DIR"
        )
    return folder


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      ValueError: the file is missing or holds something else.
    """
    if not file.is_file():
        raise ValueError(f"{file} is missing: pass a folder that save_pretrained or save_params wrote")
    try:
        value = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a {type(value).__name__}, expected an object: download it again")
    return value


def refuse(what: str, problems: dict[str, list[str]], fix: str):
    """Raises one ValueError that names every entry of every problem, if there is any; long lists end in a count."""
    listed = [f"{len(names)} {problem}: {enumerate_names(names)}" for problem, names in problems.items() if names]
    if listed:
        raise ValueError(f"{what}: {'; '.join(listed)}. {fix}")


def enumerate_names(names: Iterable[str]) -> str:
    """Sorted and joined, the first 20 and how many more there are."""
    names = sorted(names)
    more = f", ... and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[dict[str, Any]]:
    """Tensor name -> the memory-mapped file that holds it, a safetensors.safe_open of framework numpy.

    Raises:
      ValueError: no checkpoint or two of them, a missing, truncated or damaged file, an index of other shards.
    """
    if (folder / SINGLE).exists() and (folder / INDEX).exists():
        raise ValueError(f"{folder} holds both {SINGLE} and {INDEX}: delete the stale one")
    with contextlib.ExitStack() as stack:
        if (folder / INDEX).exists():
            yield _open_shards(folder, stack)
        elif (folder / SINGLE).exists():
            file = _open(folder / SINGLE, stack)
            yield dict.fromkeys(file.keys(), file)
        else:
            there = enumerate_names(file.name for file in folder.iterdir()) or "nothing"
            raise ValueError(
                f"{folder} holds neither {SINGLE} nor {INDEX} but {there}: pass a folder that save_pretrained or "
                "save_params wrote; older .bin checkpoints must be saved again by transformers"
            )


def _open_shards(folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    placed = read_json(folder / INDEX).get("weight_map")
    if not placed:
        raise ValueError(f"{folder / INDEX} has no weight_map: download it again")
    names = sorted(set(placed.values()))
    absent = [name for name in names if not (folder / name).is_file()]
    refuse(f"{folder / INDEX} names absent files", {"absent": absent}, "Download them again")
    files = {name: _open(folder / name, stack) for name in names}
    held = {name: set(file.keys()) for name, file in files.items()}
    absent = [f"{tensor} in {name}" for tensor, name in placed.items() if tensor not in held[name]]
    refuse(f"{folder / INDEX} and its shards do not belong together", {"absent": absent}, "Download all of them again")
    return {tensor: files[name] for name in names for tensor in held[name]} | {t: files[n] for t, n in placed.items()}


def _open(file: Path, stack: contextlib.ExitStack) -> Any:
    try:
        return stack.enter_context(safetensors.safe_open(file, framework="numpy"))
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is not a whole safetensors file: {error}. Download it again; "
            "a Git LFS pointer or a broken download looks like this"
        ) from error


@contextlib.contextmanager
def appearing(path: PathLike) -> Iterator[Path]:
    """A hidden folder to write in, which takes the name `path` when the block ends well and vanishes otherwise.

    Raises:
      ValueError: something is there already; it is never replaced.
      OSError: the disk is full or refuses.
    """
    final = Path(path)
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise ValueError(f"{final} exists and is not empty: delete it or choose another folder")
    partial = final.with_name(f".{final.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(final)
    except (OSError, safetensors.SafetensorError) as error:
        raise OSError(f"cannot write {final}: {error}. Nothing was left behind; free space there and repeat") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write(folder: Path, tensors: Iterable[tuple[str, Shaped[np.ndarray, "..."]]], *, max_shard_bytes: int):
    """Writes model.safetensors, or shards of at most max_shard_bytes (or one tensor) with their index.

    The arrays must be contiguous: safetensors writes their buffers and ignores strides, so a view would be scrambled.
    """
    shards: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    total = 0

    def flush():
        safetensors.numpy.save_file(held, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, x in tensors:
        if held and sum(y.nbytes for y in held.values()) + x.nbytes > max_shard_bytes:
            flush()
        held[name] = x
        total += x.nbytes
    flush()
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [SINGLE]
    else:
        weight_map = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for i, name in enumerate(names):
        (folder / f"shard-{i}").rename(folder / name)

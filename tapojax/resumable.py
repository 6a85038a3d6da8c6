"""A file of JSON lines that a killed job goes on with: what was asked, then records, each batch closed by a marker.

    {"asked": {...}}
    {"id": "a", ...}
    {"batch": 0, ...}

What follows the last marker is of a batch that was being written when the job was killed, and is dropped.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Records, and what else is known of them."""

    records: Sequence[Mapping[str, Any]]
    marker: Mapping[str, Any]


@contextlib.contextmanager
def opened(path: Path, asked: Mapping[str, Any]) -> Iterator[tuple[list[Batch], Callable[[Batch], None]]]:
    """The batches that are in the file, and a function that adds one, which is on the disk when it returns.

    Raises:
      ValueError: the file was begun with something else asked, is damaged, or another process writes it.
    """
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of by the kernel, however this process ends
        except BlockingIOError as error:
            raise ValueError(f"another process is writing {path}: wait for it, or give another --name") from error
        file.seek(0)
        lines = file.read().splitlines(keepends=True)
        header, batches, kept = _parse(lines, path)
        if header is not None:
            _check(header, json.loads(json.dumps(plain(asked))), path)
        file.truncate(kept)

        def write(*records: Mapping[str, Any]):
            file.write("".join(json.dumps(plain(record), allow_nan=False) + "\n" for record in records).encode())
            file.flush()
            os.fsync(file.fileno())

        def add(batch: Batch):
            write(*batch.records, {"batch": len(batches), **batch.marker})
            batches.append(batch)

        if header is None:
            write({"asked": asked})
        yield batches, add


def _parse(lines: Sequence[bytes], path: Path) -> tuple[dict | None, list[Batch], int]:
    """What was asked, the closed batches, and how many bytes hold them.

    Raises:
      ValueError: a line before the last one is no JSON object; it is named.
    """
    header, batches, records, kept, read = None, list[Batch](), list[dict](), 0, 0
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line) if line.endswith(b"\n") else None
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is damaged ({error}): delete the file to sample anew") from error
        if record is None:
            break  # torn: the kill came in the middle of this line
        read += len(line)
        if number == 1:
            header, kept = record.get("asked"), read
            if header is None:
                raise ValueError(f"{path} does not begin with what was asked: give another --name, or move it away")
        elif "batch" in record:
            del record["batch"]
            batches.append(Batch(records, record))
            records, kept = [], read
        else:
            records.append(record)
    return header, batches, kept


def _check(was: Mapping, now: Mapping, path: Path):
    for key, (old, new) in differences(was, now).items():
        raise ValueError(
            f"{path} holds samples of {key}={old!r}, this command says {new!r}: give the same settings to go on with "
            "it, or another --name"
        )


def plain(value: Any) -> Any:
    """What JSON can hold: numbers of numpy and jax become Python's, NaN and infinities null."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, str | bool | None):
        return value
    value = float(value) if not isinstance(value, int | np.integer) else int(value)
    return value if np.isfinite(value) else None


def differences(old, new, prefix: str = "") -> dict[str, tuple]:
    """The keys at which two nested dicts differ, dots between levels, with both values."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return {} if old == new else {prefix.rstrip("."): (old, new)}
    found: dict[str, tuple] = {}
    for key in sorted(old.keys() | new.keys()):
        found |= differences(old.get(key), new.get(key), f"{prefix}{key}.")
    return found

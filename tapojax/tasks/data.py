"""Rows of files."""

from pathlib import Path
from typing import Any

from tapojax.datasets import reading
from tapojax.types import Examples


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """All rows of a file or folder of any kind that `reading` knows: parquet, JSON, arrow, TFDS.

    Raises:
      ValueError: no such file, another kind, a damaged one; file and line or row are named.
    """
    return reading.read_rows(path)


def read_completions(path: str | Path, examples: Examples) -> dict[str, list[str]]:
    """Completions by the id of their problem, from rows {"id", "completion"}; a problem may have several.

    Raises:
      ValueError: a row without one of the two; not a single problem is among the examples.
    """
    found: dict[str, list[str]] = {}
    for number, row in enumerate(read_rows(path), 1):
        if not isinstance(row.get("completion"), str) or "id" not in row:
            raise ValueError(f"{path}, row {number}: expected an id and a completion, it has {sorted(row)}")
        found.setdefault(str(row["id"]), []).append(row["completion"])
    ids = [examples[index]["id"] for index in range(len(examples))]
    if not found.keys() & set(ids):
        first, theirs = next(iter(found), None), ids[0] if ids else None
        raise ValueError(
            f"{path} is for other problems: it has {len(found)}, the first {first!r}, and none of them is among the "
            f"{len(ids)} of task.train_path, the first {theirs!r}"
        )
    return found

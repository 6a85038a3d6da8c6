"""Rows of files, and the endless, exactly resumable order in which a run reads its problems."""

import gzip
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain

from tapojax.types import Example, Examples


def batches(examples: Examples, *, batch_size: int, seed: int) -> grain.DatasetIterator[list[Example]]:
    """Endless batches, shuffled anew each epoch. `get_state()` / `set_state(state)` resume at the exact row.

    Raises:
      ValueError: fewer examples than a batch needs.
    """
    if len(examples) < batch_size:
        raise ValueError(
            f"{len(examples)} examples cannot fill a batch of {batch_size}: lower prompts_per_step or add data"
        )
    dataset = grain.MapDataset.source(examples).seed(seed).shuffle().repeat(None, reseed_each_epoch=True)
    options = grain.ReadOptions(num_threads=0)  # rows are in memory: threads would only read ahead of the saved state
    return iter(dataset.batch(batch_size, batch_fn=list).to_iter_dataset(options))


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """All rows of a .jsonl, .jsonl.gz or .parquet file.

    Raises:
      ValueError: no such file, a damaged one, a broken line (file and line are named), another kind of file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no data file at {path}: check task.train_path, evaluation_path, teacher_path")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffixes[-1:] == [".jsonl"] or path.suffixes[-2:] == [".jsonl", ".gz"]:
        return _read_jsonl(path)
    raise ValueError(f"{path}: expected a .jsonl, .jsonl.gz or .parquet file")


def read_completions(path: str | Path, examples: Sequence[Example]) -> dict[str, list[str]]:
    """Completions by the id of their problem, from rows {"id", "completion"}; a problem may have several.

    Raises:
      ValueError: a row without one of the two; not a single problem is among the examples.
    """
    found: dict[str, list[str]] = {}
    for number, row in enumerate(read_rows(path), 1):
        if not isinstance(row.get("completion"), str) or "id" not in row:
            raise ValueError(f"{path}, row {number}: expected an id and a completion, it has {sorted(row)}")
        found.setdefault(str(row["id"]), []).append(row["completion"])
    ids = [example["id"] for example in examples]
    if not found.keys() & set(ids):
        first, theirs = next(iter(found), None), ids[0] if ids else None
        raise ValueError(
            f"{path} is for other problems: it has {len(found)}, the first {first!r}, and none of them is among the "
            f"{len(ids)} of task.train_path, the first {theirs!r}"
        )
    return found


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    rows = []
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append(_parse(line, path, number))
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged after row {len(rows)}: {error}; fetch the file again") from error
    return rows


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}; fetch the file again") from error


def _parse(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {number}: not JSON ({error.msg} at column {error.colno}): {line[:80]!r}"
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number}: expected an object with the problem's fields, got {line[:80]!r}")
    return row

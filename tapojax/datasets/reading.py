"""Rows of a file or folder, whatever it is: JSON lines, JSON, parquet, arrow, a TFDS folder. Damage is an error."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
KINDS = "a .parquet, .jsonl, .json (.gz of these two) or .arrow file, a folder of datasets.save_to_disk, a TFDS folder"
PARQUET_ROWS = 4096  # read at a time
FETCH = "fetch the file again"


def read_rows(path: str | Path) -> list[Row]:
    """All rows; see `iterate`."""
    return list(iterate(path))


def iterate(path: str | Path) -> Iterator[Row]:
    """Rows in the order of the file, one after the other: the largest are not in memory as a whole.

    A TFDS folder is `data/gsm8k/1.0.0`; of several splits one is named behind it: `data/gsm8k/1.0.0/train`.

    Raises:
      ValueError: no such file, another kind, a damaged one; file and line or row are named.
    """
    path = Path(path)
    yield from _reader(path)(path)


def _reader(path: Path) -> Callable[[Path], Iterator[Row]]:
    if path.is_dir():
        if (path / "state.json").is_file():
            return _arrow_folder
        if (path / "features.json").is_file():
            return _tfds
    elif (path.parent / "features.json").is_file() and not path.exists():
        return _tfds
    elif not path.exists():
        raise ValueError(f"no data file at {path}: check the path (task.train_path, evaluation_path, teacher_path)")
    name = path.name.removesuffix(".gz")
    if name.endswith(".jsonl"):
        return _jsonl
    if name.endswith(".json"):
        return _json
    if path.suffix in (".parquet", ".arrow") and path.is_file():
        return {".parquet": _parquet, ".arrow": _arrow}[path.suffix]
    raise ValueError(f"{path}: expected {KINDS}")


# ---- JSON


def _jsonl(path: Path) -> Iterator[Row]:
    done = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _object(_parsed(line, path, number), f"{path}, line {number}")
                    done += 1
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged after row {done}: {error}; {FETCH}") from error


def _json(path: Path) -> Iterator[Row]:
    """An array of objects, or one object on each line."""
    try:
        with _open(path) as file:
            text = file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}; {FETCH}") from error
    if not text.lstrip().startswith("["):
        yield from _jsonl(path)
        return
    for number, row in enumerate(_parsed(text, path, 1), 1):
        yield _object(row, f"{path}, row {number}")


def _open(path: Path):
    return (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8")


def _parsed(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        near = "".join(text.splitlines()[error.lineno - 1 : error.lineno])[:80]
        raise ValueError(
            f"{path}, line {first_line + error.lineno - 1}: not JSON ({error.msg} at column {error.colno}): {near!r}"
        ) from error


def _object(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: expected an object with the problem's fields, got {str(value)[:80]!r}")
    return value


# ---- arrow


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    def batches():
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from file.iter_batches(PARQUET_ROWS)

    yield from _rows(batches(), path)


def _arrow(path: Path) -> Iterator[Row]:
    """A stream, as datasets.save_to_disk writes, or an arrow file (feather)."""
    import pyarrow

    def batches():
        with pyarrow.OSFile(str(path)) as source:
            kind = source.read(6)
            source.seek(0)
            if kind == b"ARROW1":
                file = pyarrow.ipc.open_file(source)
                yield from (file.get_batch(index) for index in range(file.num_record_batches))
            else:
                yield from pyarrow.ipc.open_stream(source)

    yield from _rows(batches(), path)


def _rows(batches, path: Path) -> Iterator[Row]:
    import pyarrow

    done = 0
    try:
        for batch in batches:
            for row in batch.to_pylist():
                yield row
                done += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged after row {done}: {error}; {FETCH}") from error


def _arrow_folder(path: Path) -> Iterator[Row]:
    state = _parsed((path / "state.json").read_text(encoding="utf-8"), path / "state.json", 1)
    for part in state["_data_files"]:
        if not (path / part["filename"]).is_file():
            raise ValueError(f"{path} is damaged: its state.json names {part['filename']}, which is not there; {FETCH}")
        yield from _arrow(path / part["filename"])


# ---- TFDS


def _tfds(path: Path) -> Iterator[Row]:
    folder, split = (path, "") if path.is_dir() else (path.parent, path.name)
    source = tfds_source(folder, split)
    for number in range(len(source)):
        try:
            yield _decoded(source[number])
        except Exception as error:  # array_record, protobuf and TFDS each have their own
            raise ValueError(f"{path} is damaged at row {number + 1}: {error}; build it again") from error


def tfds_source(folder: Path, split: str = ""):
    """The rows of a TFDS folder's split by their index, texts as bytes; without a name the only one.

    Raises:
      ValueError: no such split, several and none named, TFDS not installed, files of another format than array_record.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ValueError(f"{folder} is a TFDS folder, for which TFDS is not installed: {error}") from error
    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:
        raise ValueError(f"{folder} is damaged: {error}; build it again") from error
    splits = sorted(builder.info.splits)
    if split not in splits and not (split == "" and len(splits) == 1):
        raise ValueError(f"{folder} has the splits {splits}: name one behind the folder, such as {folder}/{splits[0]}")
    try:
        return builder.as_data_source(split or splits[0])
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{folder} is damaged, or not of array_record files: {reason}; build it again") from error


def _decoded(value: Any) -> Any:
    """Plain values: TFDS gives texts as bytes and numbers as numpy's."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {key: _decoded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return _decoded(value.tolist()) if hasattr(value, "tolist") else value

"""Prepared rows into files that are either whole or not there."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
FORMATS = ("jsonl", "parquet", "tfds")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place if all goes well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    yield part
    part.replace(path)


def text(path: Path, content: str):
    with replacing(path) as part:
        part.write_text(content, encoding="utf-8")


def jsonl(path: Path, rows: Iterable[Row]):
    with replacing(path) as part, part.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def parquet(path: Path, parts: Sequence[tuple[Sequence[Row], int]]):
    """Parts are rows and how often they come; columns are those that any row has."""
    import pyarrow.parquet

    names = list(dict.fromkeys(name for rows, _ in parts for row in rows for name in row))
    tables = []
    for rows, repeat in parts:
        columns = {name: [row.get(name) for row in rows] for name in names}
        tables += [pyarrow.table(columns)] * repeat
    with replacing(path) as part:
        pyarrow.parquet.write_table(pyarrow.concat_tables(tables, promote_options="default"), part)


def repeated(parts: Sequence[tuple[Sequence[Row], int]]) -> Iterator[Row]:
    for rows, repeat in parts:
        for _ in range(repeat):
            yield from rows

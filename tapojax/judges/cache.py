"""Replies that need not be asked for again: the latest in memory, all of them in a file where one is named. No jax."""

import collections
import dataclasses
import hashlib
import json
import sqlite3
import threading
from typing import Any


@dataclasses.dataclass
class Cache:
    """Replies by key; `lock` guards all of it. Several processes may share a file."""

    rows: int  # kept in memory, 0: none
    path: str
    file: sqlite3.Connection | None
    memory: collections.OrderedDict[str, str] = dataclasses.field(default_factory=collections.OrderedDict)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)


def open_cache(rows: int, path: str) -> Cache:
    """A cache whose file is `path`, which is made where it is not; "" for none.

    Raises:
      OSError: the file cannot be opened, or is something else.
    """
    if not path:
        return Cache(rows, path, None)
    try:
        file = sqlite3.connect(path, timeout=60, check_same_thread=False, isolation_level=None)
        file.execute("pragma journal_mode = wal")
        file.execute("pragma synchronous = normal")  # the last replies before a power cut are asked for again
        file.execute("create table if not exists replies (key text primary key, reply text not null)")
    except sqlite3.Error as error:
        raise OSError(f"the replies of a judge cannot be kept in cache_file={path!r}: {error}") from error
    return Cache(rows, path, file)


def key_of(*parts: Any) -> str:
    """A key that is the same in every process, of JSON values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def get(cache: Cache, key: str) -> str | None:
    """What was put there, or None."""
    with cache.lock:
        if key in cache.memory:
            cache.memory.move_to_end(key)
            return cache.memory[key]
        found = _run(cache, "select reply from replies where key = ?", key)
        return found[0][0] if found else None


def put(cache: Cache, key: str, reply: str):
    """Keeps a reply; beyond `rows` the one that was not used for longest leaves the memory."""
    with cache.lock:
        if cache.rows:
            cache.memory[key] = reply
            if len(cache.memory) > cache.rows:
                cache.memory.popitem(last=False)
        _run(cache, "insert or replace into replies values (?, ?)", key, reply)


def _run(cache: Cache, statement: str, *values: str) -> list[tuple[str]]:
    if cache.file is None:
        return []
    try:
        return cache.file.execute(statement, values).fetchall()
    except sqlite3.Error as error:
        raise OSError(f"cache_file={cache.path!r}: {error}") from error

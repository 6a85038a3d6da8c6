"""A pool of processes that may hang, crash or eat memory, and cost only the item that made them do so.

Verifiers run mathematics written by a language model. Such input can keep a computer algebra system busy for ever in
C code, where no exception and no signal handler of Python is ever run, so the only deadline that holds is SIGKILL.
A process that is killed is replaced; its item becomes an error that says what happened; no other item is touched.

Workers are plain subprocesses spoken to in JSON (see `worker`): nothing is pickled, the caller's `__main__` is not
imported again, nothing is forked (the caller runs jax and has threads), and any thread may call `run`.
"""

import concurrent.futures
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import IO, Any, NamedTuple

from tapojax.rewards import worker

START_S = 120.0  # imports on a loaded machine
TAKE_S = 30.0  # from sending an item to the worker's word that it has begun
ATTEMPTS = 3  # fresh workers tried before it is believed that none will do


class Outcome(NamedTuple):
    """What became of one item: `value` is None exactly where `error` says why there is none."""

    value: Any
    error: str | None


class _Process(NamedTuple):
    popen: subprocess.Popen
    connection: socket.socket


class Pool:
    """Applies a function to items in worker processes.

    `factory` is "module:name" of a function without arguments that returns the function to apply; it is called in the
    worker. Items and values are JSON; values are not None. `memory_mb` is what a worker may take beyond what it holds
    once it has started. Workers start when first needed and live until `close`,
    the end of a `with` block, or the end of the program (they see the connection close).
    """

    def __init__(self, factory: str, *, workers: int, memory_mb: int):
        if workers < 1 or memory_mb < 64:
            raise ValueError(f"a pool needs workers >= 1 and memory_mb >= 64, got {workers} and {memory_mb}")
        self._factory, self._memory_mb, self._workers, self._owner = factory, memory_mb, workers, os.getpid()
        # last in, first out: a few items never start all the workers
        self._idle: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for _ in range(workers):
            self._idle.put(None)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def run(self, items: Sequence[Any], *, deadline_s: int | float) -> list[Outcome]:
        """One outcome an item, in order. The deadline of an item counts from the moment a worker begins it.

        Raises:
          RuntimeError: no worker can be started at all; the message carries the worker's own words.
        """
        if not 0 < deadline_s < math.inf:
            raise ValueError(f"deadline_s must be a positive number of seconds, got {deadline_s}")
        if os.getpid() != self._owner:
            raise RuntimeError("this pool was made before a fork; make another one in the new process")
        threads = concurrent.futures.ThreadPoolExecutor(self._workers, "tapojax-pool")
        try:
            return list(threads.map(lambda item: self._run_one(item, float(deadline_s)), items))
        finally:
            # after an error or Ctrl-C the items in flight end within their deadline, the others never begin
            threads.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Ends the workers, after the items in flight. The pool may be used again; it then starts new ones."""
        if os.getpid() != self._owner:
            return  # a forked child must not end its parent's workers
        for process in [self._idle.get() for _ in range(self._workers)]:
            if process is not None:
                _kill(process)
            self._idle.put(None)

    def _run_one(self, item: Any, deadline_s: float) -> Outcome:
        process = self._idle.get()
        try:
            for _ in range(ATTEMPTS):
                # whatever is raised from here on, a worker that may still have words for us is not used again
                process, busy = None, process or _start(self._factory, self._memory_mb)
                if _give(busy, item, deadline_s):
                    outcome, alive = _take(busy, deadline_s)
                    process = busy if alive else None
                    return outcome
                # it was broken before this item reached it, and that is not the item's fault
                _kill(busy)
            return Outcome(None, f"{ATTEMPTS} workers in a row died before they could take this item")
        finally:
            self._idle.put(process)


def _start(factory: str, memory_mb: int) -> _Process:
    ours, theirs = socket.socketpair()
    with tempfile.TemporaryFile() as words, theirs:
        popen = subprocess.Popen(
            [sys.executable, "-P", "-m", "tapojax.rewards.worker", factory, str(memory_mb)],
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=words,
            # the worker finds what the caller finds, and sets of symbols have one order in every run
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path), "PYTHONHASHSEED": "0"},
            # Ctrl-C in the terminal is for the caller
            start_new_session=True,
        )
        process = _Process(popen, ours)
        theirs.close()
        try:
            worker.receive(ours, START_S)
        except (EOFError, OSError) as error:
            why = "it was not ready in time" if isinstance(error, TimeoutError) else _death(process)
            raise RuntimeError(f"cannot start a worker for {factory}: {why}\n{_tail(words)}") from error
        return process


def _tail(words: IO[bytes]) -> str:
    words.seek(0)
    return words.read()[-2000:].decode("utf-8", "replace")


def _give(process: _Process, item: Any, deadline_s: float) -> bool:
    """Whether the worker took the item."""
    try:
        process.connection.settimeout(TAKE_S)
        worker.send(process.connection, {"item": item, "deadline_s": deadline_s})
        worker.receive(process.connection, TAKE_S)
        return True
    except (EOFError, OSError):
        return False


def _take(process: _Process, deadline_s: float) -> tuple[Outcome, bool]:
    """The outcome of the item the worker has begun, and whether the worker survived it."""
    try:
        reply = worker.receive(process.connection, deadline_s)
    except TimeoutError:
        _kill(process)
        return Outcome(None, f"deadline of {deadline_s:g} s exceeded, the worker was killed"), False
    except (EOFError, OSError):
        return Outcome(None, f"the worker died: {_death(process)}"), False
    return Outcome(reply.get("value"), reply.get("error")), True


def _death(process: _Process) -> str:
    """How a worker that hung up ended."""
    try:
        code = process.popen.wait(timeout=1.0)
    except subprocess.TimeoutExpired:
        return "it hung up"
    finally:
        _kill(process)
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _kill(process: _Process) -> None:
    process.popen.kill()
    process.popen.wait()
    process.connection.close()

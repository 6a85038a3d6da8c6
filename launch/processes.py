"""Several launchers at a time, each on its share of the machine; those that fail are told from those that do not."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

PATIENCE_SECONDS = 10.0  # between asking a process to end and killing it


class Job(NamedTuple):
    """One subprocess."""

    name: str
    module: str
    arguments: Sequence[str]
    folder: Path


def run_all(jobs: Sequence[Job], processes: int) -> list[Job]:
    """Runs them, at most `processes` at a time, and returns those that failed; an interrupt ends the running, too."""
    waiting, failed = list(jobs), []
    running: dict[int, tuple[Job, subprocess.Popen, float]] = {}
    with interrupts() as received:
        try:
            while (waiting or running) and not received:
                for slot in range(processes):
                    if waiting and slot not in running:
                        job = waiting.pop(0)
                        running[slot] = job, start(job, slot, processes), time.monotonic()
                time.sleep(0.1)
                for slot, (job, process, began) in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[slot]
                    failed += [job] if process.returncode else []
                    said = f"FAILED with status {process.returncode}" if process.returncode else "done"
                    left = f"{len(waiting)} waiting, {len(running)} running"
                    print(f"{job.name}: {said} after {time.monotonic() - began:.0f} s; {left}", flush=True)
        finally:
            stop([process for _, process, _ in running.values()])
    return failed


@contextlib.contextmanager
def interrupts():
    """Collects SIGINT and SIGTERM and exits for them at the end: at any other moment a child could be left behind."""
    received: list[int] = []
    former = {n: signal.signal(n, lambda n, _: received.append(n)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    if received:
        sys.exit(128 + received[0])


def start(job: Job, slot: int, processes: int) -> subprocess.Popen:
    """Starts a job on its share of the cores, in its own process group.

    Raises:
      ValueError: another process is at work in the folder.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", job.module, *job.arguments, f"--workdir={job.folder}"]
    memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.75 / processes:.3f}"}  # of an accelerator; jax takes .75 for one
    with (job.folder / "log.txt").open("a") as log:
        lock(log, job.folder)
        everything = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        try:
            if everything:
                os.sched_setaffinity(0, share(sorted(everything), slot, processes))  # the child inherits it
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=memory | os.environ, start_new_session=True
            )
        finally:
            if everything:
                os.sched_setaffinity(0, everything)
    print(f"{job.name}: process {process.pid} started, see {log.name}", flush=True)
    return process


def share(cores: Sequence[int], slot: int, processes: int) -> Sequence[int]:
    """An even part of the cores; a core for several where there are fewer than processes."""
    if processes >= len(cores):
        return [cores[slot % len(cores)]]
    return cores[slot * len(cores) // processes : (slot + 1) * len(cores) // processes]


def lock(log: IO, folder: Path):
    """A file that is open in a living process keeps its lock, so two commands cannot train in one folder."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process is at work in {folder}: wait for it or end it") from None


def stop(processes: Sequence[subprocess.Popen]):
    """Ends the processes and what they started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, number)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.05)

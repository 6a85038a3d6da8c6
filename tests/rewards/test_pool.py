"""The pool's promise: an item that hangs, crashes or eats memory costs itself and nothing else."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tapojax.rewards import pool

FUNCTIONS = """
import os, sys, time

def make():
    def apply(item):
        if item == "spin":
            while True:
                pass
        if item == "compute":  # C code that holds the interpreter lock and checks no signal
            return 9 ** 9 ** 9
        if item == "sleep":
            time.sleep(1000)
        if item == "kill":
            os.kill(os.getpid(), 9)
        if item == "abort":
            os.abort()
        if item == "exit":
            sys.exit(3)
        if item == "allocate":
            return len([0] * 10**11)
        if item == "swallow":  # as sympy does: the failure is caught and a wrong value returned
            try:
                text = "x" * 2**20
                while True:
                    text += text
            except MemoryError:
                return False
        if item == "recurse":
            return apply(item)
        if item == "raise":
            raise ValueError("no such thing \\ud800")
        if item == "print":
            print("noise " * 10_000, flush=True)
            os.write(1, b"\\0" * 100_000)
            os.write(2, b"\\xff" * 100_000)
        if item == "pid":
            return os.getpid()
        if item == "modules":
            return sorted(sys.modules)
        if isinstance(item, dict):
            open(item["path"], "w").write(str(os.getpid()))
            time.sleep(item["seconds"])
        return item
    return apply

def broken():
    raise ImportError("the library is not installed")
"""


@pytest.fixture(autouse=True)
def functions(tmp_path, monkeypatch):
    """A module that only the workers import, so that they stay as small as real ones."""
    (tmp_path / "pool_functions.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture
def workers():
    with pool.Pool("pool_functions:make", workers=2, memory_mb=512) as made:
        yield made


def _wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def _alive(pid):
    # a killed orphan stays a zombie where nobody reaps it
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


FAULTS = [
    ("spin", "deadline of 0.5 s exceeded"),
    ("compute", "deadline of 0.5 s exceeded"),
    ("sleep", "deadline of 0.5 s exceeded"),
    ("kill", "killed by SIGKILL"),
    ("abort", "killed by SIGABRT"),
    ("exit", "the worker died"),
    ("allocate", "out of memory"),
    ("swallow", "out of memory"),
    ("raise", "ValueError: no such thing"),
]


@pytest.mark.parametrize("fault, message", FAULTS)
def test_a_fault_is_an_error_that_says_what_happened_and_spares_the_others(workers, fault, message):
    deadline_s = 0.5 if "deadline" in message else 20
    outcomes = workers.run(["before", fault, "after", "last"], deadline_s=deadline_s)
    assert outcomes[1].value is None and message in outcomes[1].error
    assert [o for i, o in enumerate(outcomes) if i != 1] == [pool.Outcome(v, None) for v in ("before", "after", "last")]


def test_all_faults_at_once_and_every_healthy_item_keeps_its_value(workers):
    items = [item for i, (fault, _) in enumerate(FAULTS) for item in (fault, i)]
    outcomes = workers.run(items, deadline_s=1)
    assert [o.value for o in outcomes[1::2]] == list(range(len(FAULTS)))
    assert all(o.value is None and o.error for o in outcomes[::2])


def test_endless_recursion_ends_in_an_error(workers):
    recursion, healthy = workers.run(["recurse", 1], deadline_s=10.0)
    assert recursion.value is None and recursion.error
    assert healthy == (1, None)


def test_what_libraries_print_does_not_reach_the_protocol(workers):
    assert workers.run(["print", 1, "print", 2], deadline_s=5.0) == [
        ("print", None),
        (1, None),
        ("print", None),
        (2, None),
    ]


def test_values_cross_unchanged(workers):
    values = ["", "\0", "\ud800 lone surrogate", "数学", 1.5, [1, [2]], {"a": None} and "x" * 300_000, True]
    assert [o.value for o in workers.run(values, deadline_s=5.0)] == values


def test_workers_start_when_needed_and_are_used_again(workers):
    first = workers.run(["pid"], deadline_s=5.0)[0].value
    assert {workers.run(["pid"], deadline_s=5.0)[0].value for _ in range(5)} == {first}


def test_no_items_start_no_worker():
    assert pool.Pool("no_such_module:make", workers=1, memory_mb=512).run([], deadline_s=1.0) == []


def test_a_worker_that_died_idle_is_replaced_without_blame(workers):
    for _ in range(3):
        pid = workers.run(["pid"], deadline_s=5.0)[0].value
        os.kill(pid, signal.SIGKILL)
        assert workers.run(["healthy"], deadline_s=5.0) == [("healthy", None)]


def test_a_worker_that_is_stopped_idle_is_replaced_without_blame(workers, monkeypatch):
    pid = workers.run(["pid"], deadline_s=5.0)[0].value
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(pool, "TAKE_S", 0.3)
    assert workers.run(["healthy"], deadline_s=5.0) == [("healthy", None)]
    assert not _alive(pid)


def test_a_worker_killed_from_outside_costs_the_item_it_had_begun(workers, tmp_path):
    path = tmp_path / "pid"

    def kill():
        assert _wait_until(lambda: path.exists() and path.read_text())
        os.kill(int(path.read_text()), signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    outcomes = workers.run([{"path": str(path), "seconds": 60}, "a", "b"], deadline_s=30.0)
    thread.join()
    assert outcomes == [(None, "the worker died: killed by SIGKILL"), ("a", None), ("b", None)]


def test_the_deadline_counts_from_the_moment_an_item_is_begun(tmp_path):
    with pool.Pool("pool_functions:make", workers=1, memory_mb=512) as workers:
        items = [{"path": str(tmp_path / "pid"), "seconds": 0.3}] * 6
        assert all(o.error is None for o in workers.run(items, deadline_s=1.0)), "waiting for a worker was counted"


def test_the_memory_of_the_caller_is_not_charged_to_its_workers():
    ballast = bytearray(b"x") * (700 * 2**20)
    with pool.Pool("pool_functions:make", workers=1, memory_mb=512) as workers:
        assert workers.run([1], deadline_s=5.0) == [(1, None)]
    del ballast


def test_ten_thousand_items_cost_little(workers):
    workers.run([0], deadline_s=5.0)
    start = time.monotonic()
    outcomes = workers.run(list(range(10_000)), deadline_s=5.0)
    seconds = time.monotonic() - start
    print(f"\n{10_000 / seconds:,.0f} items/s through 2 workers")
    assert outcomes == [(i, None) for i in range(10_000)]
    assert seconds < 10, f"the pool costs {seconds / 10_000 * 1e6:.0f} us an item"


def test_threads_share_a_pool(workers):
    results = {}

    def use(name):
        items = [f"{name}-{i}" for i in range(200)]
        items[50] = items[150] = "kill"
        results[name] = items, workers.run(items, deadline_s=5.0)

    threads = [threading.Thread(target=use, args=(name,)) for name in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    for items, outcomes in results.values():
        assert [o.value for o in outcomes] == [None if item == "kill" else item for item in items]


def test_workers_are_small(workers):
    modules = workers.run(["modules"], deadline_s=5.0)[0].value
    heavy = {"jax", "numpy", "flax", "sympy", "math_verify", "tapojax.types"} & set(modules)
    assert not heavy, f"a worker imports {heavy} although its function does not need it"


def test_a_worker_that_cannot_start_is_the_callers_error_in_the_workers_words():
    for factory, words in [
        ("pool_functions:broken", "the library is not installed"),
        ("pool_functions:nothing", "nothing"),
        ("no_such_module:make", "no_such_module"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            pool.Pool(factory, workers=1, memory_mb=512).run([1], deadline_s=5.0)


def test_a_closed_pool_has_no_processes_and_can_start_again(workers):
    pid = workers.run(["pid"], deadline_s=5.0)[0].value
    workers.close()
    assert not _alive(pid)
    assert workers.run([1], deadline_s=5.0) == [(1, None)]


@pytest.mark.parametrize("seconds", [0, 60])
def test_workers_end_with_their_parent_even_when_it_is_killed_and_they_hang(tmp_path, seconds):
    path = tmp_path / "pid"
    script = (
        "import time\nfrom tapojax.rewards import pool\n"
        f"p = pool.Pool('pool_functions:make', workers=1, memory_mb=512)\n"
        f"p.run([{{'path': {str(path)!r}, 'seconds': {seconds}}}], deadline_s=1.0 + {seconds} / 60)\ntime.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", script], env=environment)
    assert _wait_until(lambda: path.exists() and path.read_text())
    pid = int(path.read_text())
    parent.kill()
    parent.wait()
    assert _wait_until(lambda: not _alive(pid)), "an orphan is left behind"


def test_a_pool_does_not_cross_a_fork(workers, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(RuntimeError, match="fork"):
        workers.run([1], deadline_s=1.0)


def test_nonsense_settings_are_refused():
    with pytest.raises(ValueError, match="workers"):
        pool.Pool("m:f", workers=0, memory_mb=512)
    with pytest.raises(ValueError, match="deadline_s"):
        pool.Pool("m:f", workers=1, memory_mb=512).run([1], deadline_s=0.0)

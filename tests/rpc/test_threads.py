"""Threads that do not keep the process from ending."""

import concurrent.futures
import subprocess
import sys
import threading

import pytest

from tapojax.rpc import threads


def test_results_and_errors_are_those_of_their_items():
    futures = threads.in_threads(lambda x: 6 // x, [1, 0, 3], 2, name="tests")
    concurrent.futures.wait(futures)
    assert [futures[0].result(), futures[2].result()] == [6, 2]
    with pytest.raises(ZeroDivisionError):
        futures[1].result()
    assert threads.in_threads(lambda x: x, [], 2, name="tests") == []


def test_no_more_at_a_time_than_there_are_workers_and_what_is_cancelled_never_begins():
    begun, free = [], threading.Event()

    def work(x):
        begun.append(x)
        return free.wait(20)

    first, second, third = threads.in_threads(work, [1, 2, 3], 1, name="tests")
    assert second.cancel()
    free.set()
    assert third.result(20) and first.result(20) and begun == [1, 3]


def test_the_process_ends_while_they_hang():
    program = (
        "import threading\nfrom tapojax.rpc import threads\n"
        "threads.in_threads(lambda x: threading.Event().wait(1000), [1, 2], 2, name='tests')"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0

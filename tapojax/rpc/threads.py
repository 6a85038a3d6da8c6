"""Threads that wait for other machines, and do not keep the process from ending."""

import concurrent.futures
import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any


def in_threads(
    function: Callable[[Any], Any], items: Sequence[Any], workers: int, *, name: str
) -> list[concurrent.futures.Future]:
    """Futures of function(item), begun in order by so many daemon threads; one that is cancelled in time never begins.

    Python joins the threads of a ThreadPoolExecutor at exit, however long their calls take.
    """
    futures: list[concurrent.futures.Future] = [concurrent.futures.Future() for _ in items]
    todo: queue.SimpleQueue = queue.SimpleQueue()
    for pair in zip(futures, items, strict=True):
        todo.put(pair)

    def work():
        with contextlib.suppress(queue.Empty):
            while True:
                future, item = todo.get_nowait()
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(function(item))
                    except BaseException as error:
                        future.set_exception(error)

    for _ in range(min(workers, len(items))):
        threading.Thread(target=work, name=name, daemon=True).start()
    return futures

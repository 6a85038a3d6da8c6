"""The process a pool talks to: one item in, one reply out, and nothing it does can hurt its parent.

Run as `python -m tapojax.rewards.worker module:factory memory_mb` with a socket as standard input. `factory()` is
called once and returns the function that is applied to every item. A message is four bytes of length, then JSON:

    parent -> worker   {"item": ..., "deadline_s": 5.0}
    worker -> parent   {"ready": true}, and for each item {"taken": true}, then {"value": ...} or {"error": "..."}

The socket is moved away from descriptor 0 and descriptors 1 and 2 lead nowhere, so a library that prints cannot break
the protocol. Memory is bounded twice, both counted from what the worker holds once it is ready: an allocation beyond
`memory_mb` of address space fails, and an item that drove the resident peak up by a quarter of it is an error whatever
it returned, because mathematics libraries catch MemoryError and carry on with a wrong result. (One single allocation
above the whole limit, caught by the library itself, stays invisible.) The worker ends with its parent: by end of file
when idle, by an alarm when busy.
"""

import importlib
import json
import os
import resource
import signal
import socket
import struct
import sys
import threading
import time

STACK_BYTES = 256 * 2**20
RECURSION_LIMIT = 50_000
GRACE_S = 2.0  # the parent kills at the deadline; the worker's own alarm is for orphans
MAX_ERROR = 500  # characters


def send(connection: socket.socket, message: dict) -> None:
    """Sends one message. Raises OSError when the other side is gone, TimeoutError after the socket's time-out."""
    data = json.dumps(message).encode("ascii")
    connection.sendall(struct.pack(">I", len(data)) + data)


def receive(connection: socket.socket, timeout_s: float | None) -> dict:
    """Receives one message. Raises EOFError when the other side is gone, TimeoutError when it is not here in time."""
    end = None if timeout_s is None else time.monotonic() + timeout_s
    (length,) = struct.unpack(">I", _exactly(connection, 4, end))
    return json.loads(_exactly(connection, length, end))


def _exactly(connection: socket.socket, count: int, end: float | None) -> bytes:
    data = b""
    while len(data) < count:
        # never 0, which would mean "do not block": bytes that are already here count even when the time is over
        connection.settimeout(None if end is None else max(end - time.monotonic(), 1e-3))
        part = connection.recv(count - len(data))
        if not part:
            raise EOFError("the other side closed the connection")
        data += part
    return data


def peak_mb() -> float:
    """The largest resident size of this process, in MiB."""
    if sys.platform == "linux":
        return _linux_mb("VmHWM")  # not ru_maxrss: it survives exec and would report the parent's gigabytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _linux_mb(name: str) -> float:
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**10


def _reply(function, item, memory_mb: int, ready_mb: float) -> dict:
    try:
        reply = {"value": function(item)}
    except MemoryError:
        reply = {"error": f"out of memory: the limit is {memory_mb} MB"}
    except Exception as error:
        reply = {"error": f"{type(error).__name__}: {error}"[:MAX_ERROR]}
    if (growth_mb := peak_mb() - ready_mb) > memory_mb / 4:
        reply = {"error": f"out of memory: the item took at least {growth_mb:.0f} MB, the limit is {memory_mb} MB"}
    return reply


def _serve(connection: socket.socket, factory: str, memory_mb: int) -> None:
    module, name = factory.split(":")
    function = vars(importlib.import_module(module))[name]()
    ready_mb = peak_mb()
    if sys.platform == "linux":  # macOS does not enforce it
        limit = int(_linux_mb("VmSize") + memory_mb) * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    os.dup2(1, 2)
    send(connection, {"ready": True})
    while True:
        try:
            request = receive(connection, None)
        except (EOFError, ConnectionError):
            return  # the parent is gone
        send(connection, {"taken": True})
        signal.setitimer(signal.ITIMER_REAL, request["deadline_s"] + GRACE_S)
        reply = _reply(function, request["item"], memory_mb, ready_mb)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.settimeout(None)
        send(connection, reply)
        if peak_mb() - ready_mb > memory_mb / 8:
            return  # the next item deserves a fresh process


def main() -> None:
    """Takes over the socket, sets the limits, and serves until the parent goes away."""
    connection = socket.socket(fileno=os.dup(0))
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    factory, memory_mb = sys.argv[1], int(sys.argv[2])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the kernel ends the process, whatever Python is doing
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.setrecursionlimit(RECURSION_LIMIT)
    threading.stack_size(STACK_BYTES)
    # only a new thread can have a stack that matches the recursion limit
    thread = threading.Thread(target=_serve, args=(connection, factory, memory_mb))
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()

"""Servers of one kind as a client sees them: which one to ask next, and which to leave alone until when.

A server begins outside. It is let in when its health check passes and what it says of itself is what the others said;
a failure puts it outside again, for a pause that doubles from failure to failure, with jitter that keeps clients apart.
"""

import concurrent.futures
import dataclasses
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tapojax.rpc import client
from tapojax.rpc import limits as rpc_limits
from tapojax.rpc import security as rpc_security

CHECK_S = 5.0  # for a server to say how it is
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 5.0
LOG = logging.getLogger(__name__)


class Broken(Exception):
    """A server did what the contract does not allow; the message names it."""


@dataclasses.dataclass
class Server:
    """One of them, and what is known of it."""

    address: str
    channel: grpc.Channel
    said: Any = None  # of itself, when it was last asked
    load: int = 0  # of work under way
    trouble: str | None = "not asked yet"  # why it is outside; None inside
    failures: int = 0  # since it last did some work
    ask_at: float = 0.0  # outside: when to ask how it is; infinite while somebody is asking


@dataclasses.dataclass
class Fleet:
    """All of them; `lock` guards what changes."""

    servers: Sequence[Server]
    service: str  # whose health counts
    ask: Callable[[Server, float], Any]  # (server, timeout in seconds) -> what it says of itself
    said: Any = None  # by the first that was let in, and by every other one
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)


def make(
    addresses: Sequence[str],
    service: str,
    ask: Callable[[Server, float], Any],
    *,
    security: rpc_security.Security,
    limits: rpc_limits.Limits,
) -> Fleet:
    """Nothing is sent before `check` or `take`.

    Raises:
      ValueError: there is no address, one that is none, or one twice.
    """
    if not addresses or len(set(addresses)) < len(addresses):
        raise ValueError(f"addresses={tuple(addresses)}: give the host:port of each server, once")
    return Fleet([Server(a, client.channel(a, security=security, limits=limits)) for a in addresses], service, ask)


def take(fleet: Fleet, load: int, *, tried: Sequence[str], wait_s: float, over: threading.Event) -> Server:
    """The server inside with the least load, one that was not tried where there is such; `load` is added to its own.

    Raises:
      ConnectionError: for wait_s none was inside; it says what is wrong with each.
      CancelledError: `over` was set.
    """
    until = time.monotonic() + wait_s
    while not over.is_set():
        checks = check(fleet)
        for thread in [] if inside(fleet) else checks:
            thread.join()
        with fleet.lock:
            if well := inside(fleet):
                server = min(well, key=lambda s: (s.address in tried, s.load, random.random()))
                server.load += load
                return server
        if time.monotonic() > until:
            raise ConnectionError(all_down(fleet))
        over.wait(random.uniform(0.02, 0.1))
    raise concurrent.futures.CancelledError("the work was given up")


def give_back(fleet: Fleet, server: Server, load: int, *, failure: str | None):
    """Takes `load` off the server, and puts it outside where it failed."""
    with fleet.lock:
        server.load -= load
        if failure is None:
            server.failures = 0
        elif server.trouble is None:  # once, not again for all that it was doing
            _put_outside(fleet, server, failure)


def check(fleet: Fleet) -> list[threading.Thread]:
    """Asks the servers outside how they are, where it is time, in the threads that are returned."""
    with fleet.lock:
        now = time.monotonic()
        due = [server for server in fleet.servers if server.trouble is not None and server.ask_at <= now]
        for server in due:
            server.ask_at = math.inf
    threads = [threading.Thread(target=_check_one, args=(fleet, server), daemon=True) for server in due]
    for thread in threads:
        thread.start()
    return threads


def all_down(fleet: Fleet) -> str:
    """What is wrong with each."""
    troubles, what = "; ".join(str(server.trouble) for server in fleet.servers), kind(fleet)
    return (
        f"none of the {what} servers can be used ({troubles}): start them with python -m launch.serve_{what}s, or "
        f"correct {what}.addresses"
    )


def kind(fleet: Fleet) -> str:
    """rollout or reward, as the config sections are called."""
    return fleet.service.rpartition(".")[2].lower().removesuffix("s")


def pause(failures: int) -> float:
    """Seconds to wait after so many failures in a row."""
    return random.uniform(0.5, 1.0) * min(FIRST_PAUSE_S * 2**failures, LONGEST_PAUSE_S)


def inside(fleet: Fleet) -> list[Server]:
    """Those that get work."""
    return [server for server in fleet.servers if server.trouble is None]


def _check_one(fleet: Fleet, server: Server):
    try:
        said = _ask(fleet, server)
    except Exception as error:
        with fleet.lock:
            return _put_outside(fleet, server, str(error))
    with fleet.lock:
        fleet.said = said if fleet.said is None else fleet.said
        server.said = said
        if said != fleet.said:
            return _put_outside(fleet, server, f"{server.address} says {said}, the others say {fleet.said}")
        server.trouble = None
    LOG.info("%s server let in: %s", kind(fleet), server.address)


def _ask(fleet: Fleet, server: Server) -> Any:
    with client.failures(server.address):
        request = health_pb2.HealthCheckRequest(service=fleet.service)
        status = health_pb2_grpc.HealthStub(server.channel).Check(request, timeout=CHECK_S).status
        if status != health_pb2.HealthCheckResponse.SERVING:
            raise Broken(f"{server.address}: it is not serving, or no more")
        return fleet.ask(server, CHECK_S)


def leave_out(fleet: Fleet, server: Server, why: str):
    """Puts a server outside that failed at something else than its work."""
    with fleet.lock:
        if server.trouble is None:
            _put_outside(fleet, server, why)


def _put_outside(fleet: Fleet, server: Server, why: str):
    if why != server.trouble:  # said once, not after each check
        LOG.warning("%s server left out: %s", kind(fleet), why)
    server.failures += 1
    server.trouble, server.ask_at = why, time.monotonic() + pause(server.failures)

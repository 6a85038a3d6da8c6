"""Questions to replicas of a model behind OpenAI's chat API (vLLM and others speak it). No jax.

A question goes to the replica with the fewest under way. One that fails is left out for a pause that doubles from
failure to failure, with jitter; its question goes to another replica first. One that is busy (429 or 503 with
Retry-After) is left out for as long as it says, and its questions come back one by one; this uses up no retry and goes
on for timeout_s. What a retry cannot mend (another 4xx) is not tried again. A question without a legible reply is an
error of its row, never a verdict; when too many of the last questions are, nobody is asked any more and ConnectionError
is raised.
"""

import collections
import dataclasses
import math
import os
import random
import threading
import time
import urllib.parse
from collections.abc import Callable
from typing import Any, NamedTuple

from tapojax.judges import cache

LONGEST_PAUSE_S = 60.0
REST_S = 60.0  # after too many failures, until a question is let through again


class Options(NamedTuple):
    """How a model is reached; the keys of a config section `endpoint`."""

    addresses: tuple[str, ...] = ("http://127.0.0.1:8000/v1",)  # of replicas, which serve the same model
    api_key_variable: str = "OPENAI_API_KEY"  # environment variable with the key; where unset, none is sent
    requests: int = 32  # under way at a time, at each replica
    timeout_s: float = 120.0  # of one try, to the last byte; also of a question's wait while replicas are out or busy
    retries: int = 2  # of a question, after the first try; a busy replica costs none
    pause_s: float = 1.0  # that a replica is left out for after a failure, doubling; the least where it is busy
    cache_rows: int = 100_000  # replies kept in memory
    cache_file: str = ""  # sqlite file of replies, for a resumed run and for other processes; empty: none
    max_failure_share: float = 0.5  # of the last `window` questions without a legible reply, before the run stops
    window: int = 64


DEFAULTS = Options()


class Model(NamedTuple):
    """Who is asked, and how it samples."""

    name: str
    temperature: float
    max_tokens: int


class Reply(NamedTuple):
    """What came of a question."""

    text: str | None  # None: there is no reply
    error: str | None  # why there is none, or none that is of use
    seconds: float
    tokens: float  # of question and reply, as the endpoint counts them; NaN where it does not say
    tries: int  # requests, with those that met a busy replica
    cached: bool = False
    truncated: bool = False  # max_tokens ended it


class Failure(NamedTuple):
    """Why one try gave no reply."""

    said: str
    final: bool  # the same request fails again
    wait_s: float | None = None  # that a busy server asks for


# a message of the user -> text, tokens as in Reply, whether max_tokens ended it
Try = Callable[[str], tuple[str, float, bool] | Failure]


@dataclasses.dataclass
class Replica:
    """One address, and what is known of it."""

    address: str
    ask: Try
    load: int = 0  # questions under way
    asked: int = 0
    failures: int = 0  # in a row
    out_until: float = 0.0
    spread_s: float = 0.0  # the time after that in which the questions come back, each at its own moment
    trouble: str = ""


@dataclasses.dataclass
class Endpoint:
    """All replicas; `changed` guards what changes."""

    model: Model
    options: Options
    section: str  # of the config, for messages
    replicas: list[Replica]
    cache: cache.Cache
    changed: threading.Condition = dataclasses.field(default_factory=threading.Condition)
    pending: dict[str, Any] = dataclasses.field(default_factory=dict)  # key -> future of its reply
    outcomes: collections.deque[bool] = dataclasses.field(default_factory=collections.deque)  # True: no legible reply
    down: str = ""  # too many failures: what to say
    rest_until: float = 0.0


def make(model: Model, options: Options, *, section: str) -> Endpoint:
    """Nothing is asked yet.

    Raises:
      ValueError: the openai client is not installed; an option that cannot be.
      OSError: cache_file cannot be used.
    """
    try:
        from tapojax.judges import replies  # the one module that needs the extra
    except ImportError as error:
        raise ValueError(f"{section} needs the openai client ({error}): pip install 'tapojax[judges]'") from error
    _check(model, options, section)
    key = os.environ.get(options.api_key_variable, "")
    return Endpoint(
        model=model,
        options=options,
        section=section,
        replicas=[Replica(address, replies.client(address, key, model, options)) for address in options.addresses],
        cache=cache.open_cache(options.cache_rows, options.cache_file),
        outcomes=collections.deque(maxlen=options.window),
    )


def _check(model: Model, options: Options, section: str):
    for address in options.addresses:
        url = urllib.parse.urlsplit(address)
        if url.scheme not in ("http", "https") or not url.hostname or "@" in url.netloc:
            raise ValueError(
                f"{section}.endpoint.addresses: {address.rpartition('@')[2]!r} is no address such as "
                "http://host:8000/v1; a key belongs into the environment variable of api_key_variable"
            )
    if not options.addresses or len(set(options.addresses)) < len(options.addresses):
        raise ValueError(f"{section}.endpoint.addresses={options.addresses}: give the address of each replica, once")
    if not model.name or model.max_tokens < 1 or not 0 <= model.temperature < math.inf:
        raise ValueError(f"{section}: {model}: name the model as it is served, max_tokens >= 1, temperature >= 0")
    if (
        min(options.requests, options.window) < 1
        or min(options.retries, options.cache_rows, options.pause_s) < 0
        or not 0 < options.timeout_s < math.inf
        or not 0 <= options.max_failure_share <= 1
    ):
        raise ValueError(
            f"{section}.endpoint: {options}: requests and window are 1 or more, timeout_s is positive and finite, "
            "max_failure_share a share, the other numbers 0 or more"
        )


def request(endpoint: Endpoint, message: str, over: threading.Event | None = None) -> Reply:
    """The reply to a message of the user, tried again where that can help; `over` ends the trying."""
    started, tried, said, tries, failures = time.monotonic(), list[str](), "", 0, 0
    busy_since, limit = math.inf, endpoint.options
    while failures <= limit.retries and time.monotonic() - busy_since < limit.timeout_s:
        replica = _take(endpoint, tried, over, busy_since)
        if isinstance(replica, str):
            said = f"{replica}; {said}" if said else replica
            break
        tries += 1
        found = _try(endpoint, replica, message)
        if not isinstance(found, Failure):
            text, tokens, truncated = found
            return Reply(text, None, time.monotonic() - started, tokens, tries, truncated=truncated)
        said = f"{replica.address}: {found.said}"
        if found.final:
            break
        tried.append(replica.address)
        if found.wait_s is None:
            failures, busy_since = failures + 1, math.inf
        else:
            busy_since = min(busy_since, time.monotonic())
    return Reply(None, f"no reply in {tries} tries: {said}", time.monotonic() - started, math.nan, tries)


def _take(endpoint: Endpoint, tried, over: threading.Event | None, busy_since: float) -> Replica | str:
    """The replica with the least to do, one not tried yet where there is such; or why there is none to be had."""
    limit, gone_since, lag = endpoint.options, math.inf, random.random()
    with endpoint.changed:
        while over is None or not over.is_set():
            now = time.monotonic()
            backs = [replica.out_until + lag * replica.spread_s for replica in endpoint.replicas]
            well = [replica for replica, back in zip(endpoint.replicas, backs, strict=True) if back <= now]
            choice = [replica for replica in well if replica.address not in tried] or well
            free = [replica for replica in choice if replica.load < limit.requests]
            if free:
                replica = min(free, key=lambda replica: (replica.load, replica.asked))
                replica.load, replica.asked = replica.load + 1, replica.asked + 1
                return replica
            gone_since = math.inf if well else min(gone_since, busy_since, now)
            back = min((back for back in backs if back > now), default=now + 1)
            if max(back, now) > gone_since + limit.timeout_s:
                return f"every replica is left out: {'; '.join(replica.trouble for replica in endpoint.replicas)}"
            endpoint.changed.wait(min(max(back - now, 0.001), 0.5))
    return "given up"


def _try(endpoint: Endpoint, replica: Replica, message: str) -> tuple[str, float, bool] | Failure:
    """One try; whatever comes of it, the replica has its place free again."""
    found: tuple[str, float, bool] | Failure = Failure("the try was cut short", final=True)
    try:
        found = replica.ask(message)
    finally:
        _give_back(endpoint, replica, found if isinstance(found, Failure) else None)
    return found


def _give_back(endpoint: Endpoint, replica: Replica, failure: Failure | None):
    with endpoint.changed:
        now, least = time.monotonic(), endpoint.options.pause_s
        replica.load -= 1
        if failure is None:
            replica.failures = 0
        elif failure.wait_s is not None:  # it is busy, not broken
            pause = max(failure.wait_s, least)
            if now + pause > replica.out_until:
                _leave_out(replica, failure, now + pause, pause / 4)
        elif not failure.final and replica.out_until <= now:  # once, not again for all that was under way
            replica.failures += 1
            pause = min(least * 2.0 ** min(replica.failures - 1, 16), LONGEST_PAUSE_S)
            _leave_out(replica, failure, now + pause / 2, pause / 2)
        endpoint.changed.notify_all()


def _leave_out(replica: Replica, failure: Failure, until: float, spread_s: float):
    replica.out_until, replica.spread_s = until, spread_s
    replica.trouble = f"{replica.address}: {failure.said}"

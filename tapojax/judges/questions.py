"""Questions to an endpoint, each asked once, and a breaker that stops the run when too few are answered. No jax."""

import concurrent.futures
import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tapojax.judges import cache
from tapojax.judges import endpoint as endpoints
from tapojax.judges.judged import Verdicts
from tapojax.rpc import threads

MAX_SHOWN = 200  # characters of a reply in an error


class Question(NamedTuple):
    """A message for the model, and how its reply is read: a number, or None where it does not say one."""

    message: str
    read: Callable[[str], float | None]


def verdicts(endpoint: endpoints.Endpoint, questions: Sequence[Question | str]) -> Verdicts:
    """What the model says to each; in the place of a question, a text says why there is none: NaN and that error.

    Costs: seconds until the reply, with the wait for a free replica; tokens, tries, cached (1: the reply was known, the
    others are 0).

    Raises:
      ConnectionError: too many of the last questions had no legible reply.
    """
    asked = {row: question for row, question in enumerate(questions) if isinstance(question, Question)}
    values = np.full(len(questions), np.nan, np.float32)
    costs = {name: np.full(len(questions), np.nan, np.float32) for name in ("seconds", "tokens", "tries", "cached")}
    errors: list[str | None] = [question if isinstance(question, str) else None for question in questions]
    for row, reply in zip(asked, ask(endpoint, list(asked.values())), strict=True):
        if reply.text is not None and reply.error is None:
            values[row] = asked[row].read(reply.text)
        else:
            errors[row] = f"{endpoint.section}: {reply.error}"
        for name, column in costs.items():
            column[row] = getattr(reply, name)
    return Verdicts(values, errors, costs)


def ask(endpoint: endpoints.Endpoint, questions: Sequence[Question]) -> list[endpoints.Reply]:
    """A reply to each, in their order; `error` is None exactly where it says a number.

    Raises:
      ConnectionError: as above; questions under way then end by themselves.
    """
    over = threading.Event()
    workers = len(endpoint.replicas) * endpoint.options.requests
    futures = threads.in_threads(
        lambda question: _answer(endpoint, question, over), questions, workers, name="tapojax-judge"
    )
    try:
        concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
        for future in futures:
            if future.done():
                future.result()
        return [future.result() for future in futures]
    finally:
        over.set()


def _answer(endpoint: endpoints.Endpoint, question: Question, over: threading.Event) -> endpoints.Reply:
    """From whoever is asking the same just now, from the cache, or from the model."""
    key = cache.key_of(*endpoint.model, question.message)
    with endpoint.changed:
        first = key not in endpoint.pending
        future = endpoint.pending.setdefault(key, concurrent.futures.Future())
    if not first:
        return future.result()._replace(seconds=0.0, tokens=0.0, tries=0, cached=True)
    try:
        reply = _asked(endpoint, question, key, over)
        future.set_result(reply)
        return reply
    except BaseException as error:
        future.set_exception(error)
        raise
    finally:
        with endpoint.changed:
            del endpoint.pending[key]


def _asked(endpoint: endpoints.Endpoint, question: Question, key: str, over: threading.Event) -> endpoints.Reply:
    if known := cache.get(endpoint.cache, key):
        text, truncated = json.loads(known)
        reply = _judged(endpoints.Reply(text, None, 0.0, 0.0, 0, True, truncated), question)
        if reply.error is None:  # else it was kept by a version that read replies in another way
            return reply
    _check_breaker(endpoint)
    reply = _judged(endpoints.request(endpoint, question.message, over), question)
    if reply.error is None:  # what was of no use may be better the next time
        cache.put(endpoint.cache, key, json.dumps([reply.text, reply.truncated]))
    if not over.is_set():
        _count(endpoint, reply)
    return reply


def _judged(reply: endpoints.Reply, question: Question) -> endpoints.Reply:
    if reply.text is None or question.read(reply.text) is not None:
        return reply
    why = "it reached max_tokens, raise it" if reply.truncated else f"it ends in {reply.text[-MAX_SHOWN:]!r}"
    return reply._replace(error=f"the judge's reply says no verdict: {why}")


def _count(endpoint: endpoints.Endpoint, reply: endpoints.Reply):
    """Adds an outcome, and raises when there are too many bad ones."""
    options = endpoint.options
    with endpoint.changed:
        endpoint.outcomes.append(reply.error is not None)
        bad = sum(endpoint.outcomes)
        if len(endpoint.outcomes) == options.window and bad > options.max_failure_share * options.window:
            endpoint.down = (
                f"{endpoint.section} ({endpoint.model.name}) gave no verdict on {bad} of the last {options.window} "
                f"questions, {bad / options.window:.0%}; {endpoint.section}.endpoint.max_failure_share is "
                f"{options.max_failure_share}. The last error: {reply.error}"
            )
            endpoint.rest_until = time.monotonic() + endpoints.REST_S
            endpoint.outcomes.clear()
    _check_breaker(endpoint)


def _check_breaker(endpoint: endpoints.Endpoint):
    """Raises ConnectionError while the endpoint is left to rest."""
    with endpoint.changed:
        if endpoint.down and time.monotonic() >= endpoint.rest_until:
            endpoint.down = ""
        if endpoint.down:
            raise ConnectionError(endpoint.down)

"""How much one call, one peer and all of them may ask of a server. Lengths are in tokens."""

import time
from collections.abc import Callable
from typing import NamedTuple

from tapojax.rpc import tapojax_pb2 as pb

PEERS = 4096  # remembered by a rate limiter before it forgets those that are at rest


class Limits(NamedTuple):
    """Of one server; a client only needs the first two."""

    max_message_bytes: int = 16 * 2**20  # larger messages are refused unread
    chunk_bytes: int = 2 * 2**20  # what is larger is sent in pieces of this size
    max_concurrent: int = 128  # calls that run at once
    calls_per_second: float = 500.0  # of one peer, over time
    burst: int = 1000  # of one peer, at once
    max_seconds: float = 86400.0  # a deadline further off is none
    max_prompts: int = 4096  # of one Generate
    max_group_size: int = 1024
    max_total_tokens: int = 2**27  # of one call: prompts, and every completion at its full budget
    max_weight_bytes: int = 64 * 2**30  # of one version


def at_most(what: str, value: int, limit: int, fix: str) -> None:
    """Refuses a value over its limit.

    Raises:
      ValueError: it is; the message has the fix.
    """
    if value > limit:
        raise ValueError(f"{value} {what} are over the server's limit of {limit}: {fix}")


def check_generate(request: pb.GenerateRequest, limits: Limits) -> None:
    """Refuses a Generate that asks for too much.

    Raises:
      ValueError: it does; the message names value, limit and fix.
    """
    prompts, budget = len(request.prompts), request.sampling.max_tokens
    at_most("prompts", prompts, limits.max_prompts, "send fewer a call")
    at_most("completions of a prompt", request.group_size, limits.max_group_size, "ask for a smaller group_size")
    total = sum(len(prompt.tokens) for prompt in request.prompts) + prompts * request.group_size * budget
    at_most("tokens", total, limits.max_total_tokens, "send fewer prompts a call or ask for a smaller max_tokens")


def check_logprobs(request: pb.LogprobsRequest, limits: Limits) -> None:
    """Refuses a Logprobs that asks for too much.

    Raises:
      ValueError: it does; the message names value, limit and fix.
    """
    at_most("rows", len(request.rows), limits.max_prompts, "send fewer a call")
    total = sum(len(row.tokens) for row in request.rows)
    at_most("tokens", total, limits.max_total_tokens, "send fewer rows a call")


def rate_limiter(
    *, calls_per_second: float, burst: int, clock: Callable[[], float] = time.monotonic
) -> Callable[[str], float]:
    """A function of a peer's name: 0 where its call is within the rate, else the seconds until one will be.

    A token bucket of `burst` calls that fills at `calls_per_second`, kept as the time when it is full again.
    """
    full: dict[str, float] = {}

    def wait(peer: str) -> float:
        now = clock()
        if len(full) >= PEERS:
            for name in [name for name, when in full.items() if when <= now]:
                del full[name]
        refilled = max(full.get(peer, now), now) + 1 / calls_per_second
        seconds = refilled - now - burst / calls_per_second
        # a hair of rounding must not refuse the last call of a burst
        if seconds > 1e-9:
            return seconds
        full[peer] = refilled
        return 0.0

    return wait

"""One request of OpenAI's chat API: the text of its reply, or what kind of failure it was. No jax."""

import email.utils
import logging
import math
import time
from typing import Any

import httpx
import openai

from tapojax.judges import endpoint


class _Deadline(httpx.HTTPTransport):
    """Ends a reply that is not there in time; httpx by itself only limits the pause between two pieces of it."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        until = time.monotonic() + request.extensions["timeout"]["read"]
        response = super().handle_request(request)
        response.stream = _Pieces(response.stream, until, request)
        return response


class _Pieces(httpx.SyncByteStream):
    def __init__(self, stream, until: float, request: httpx.Request):
        self._stream, self._until, self._request = stream, until, request

    def __iter__(self):
        for piece in self._stream:
            if time.monotonic() > self._until:
                raise httpx.ReadTimeout("the reply came too slowly", request=self._request)
            yield piece

    def close(self):
        self._stream.close()


logging.getLogger("httpx").setLevel(logging.WARNING)  # not a line a request


def client(address: str, key: str, model: endpoint.Model, options: endpoint.Options) -> endpoint.Try:
    """A function that asks the model at `address` once; the key is shown to it and to nobody else."""
    limits = httpx.Limits(max_connections=options.requests, max_keepalive_connections=options.requests)
    http = httpx.Client(transport=_Deadline(limits=limits), timeout=options.timeout_s)
    api = openai.OpenAI(base_url=address, api_key=key or "none", max_retries=0, http_client=http)

    def ask(message: str) -> tuple[str, float, bool] | endpoint.Failure:
        try:
            return _ask(api, model, message, options.timeout_s)
        except Exception as error:  # of the network, of the server, or whatever a strange reply does to the client
            found = _failure(error)
            return found._replace(said=found.said.replace(key, "<key>")) if key else found

    return ask


def _ask(api: openai.OpenAI, model: endpoint.Model, message: str, timeout_s: int | float) -> tuple[str, float, bool]:
    reply = api.chat.completions.create(
        model=model.name,
        messages=[{"role": "user", "content": message}],
        temperature=model.temperature,
        max_tokens=model.max_tokens,
        timeout=timeout_s,
    )
    try:
        return _read(reply)
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"the reply is no chat completion: {str(reply)[:200]!r}") from error


def _read(reply: Any) -> tuple[str, float, bool]:
    choice = reply.choices[0]
    text = choice.message.content or ""  # a model that only thought has no content
    if not isinstance(text, str):
        raise TypeError(type(text))
    tokens = float(reply.usage.prompt_tokens + reply.usage.completion_tokens) if reply.usage else math.nan
    return text, tokens, choice.finish_reason == "length"


def _failure(error: Exception) -> endpoint.Failure:
    if isinstance(error, openai.APITimeoutError):
        return endpoint.Failure("no reply in time", final=False)
    if isinstance(error, openai.APIConnectionError):
        return endpoint.Failure(f"{error} {error.__cause__ or ''}".strip(), final=False)
    if isinstance(error, openai.APIStatusError):
        status, said = error.status_code, str(error)[:500]
        if status == 429 or (status == 503 and "retry-after" in error.response.headers):
            return endpoint.Failure(
                said, final=False, wait_s=_retry_after(error.response.headers.get("retry-after", ""))
            )
        return endpoint.Failure(said, final=400 <= status < 500 and status not in (408, 409, 425))
    return endpoint.Failure(f"{type(error).__name__}: {error}"[:500], final=False)


def _retry_after(text: str) -> float | None:
    """Seconds until the time that a Retry-After header names, by number or date; None where it names none."""
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except ValueError:
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None

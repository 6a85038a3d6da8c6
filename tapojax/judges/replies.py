"""One request of OpenAI's chat API: the text of its reply, or what kind of failure it was. No jax."""

import email.utils
import logging
import math
import time
from typing import Any

import httpcore
import httpx
import openai

from tapojax.judges import endpoint


class _Transport(httpx.BaseTransport):
    """Ends a try that is not over in time; httpx by itself only limits the pause between two pieces of a reply."""

    def __init__(self, options: endpoint.Options):
        self._timeout_s = options.timeout_s
        self._pool = httpcore.ConnectionPool(
            ssl_context=httpx.create_ssl_context(),
            max_connections=options.requests,
            max_keepalive_connections=options.requests,
            keepalive_expiry=5,
            network_backend=_Network(),
        )

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        url, until = request.url, time.monotonic() + self._timeout_s
        try:
            reply = self._pool.request(
                request.method,
                httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
                headers=request.headers.raw,
                content=request.read(),
                extensions={"timeout": {"pool": self._timeout_s, "connect": until, "read": until, "write": until}},
            )
        except httpcore.TimeoutException as error:
            raise httpx.ReadTimeout(str(error), request=request) from error
        return httpx.Response(reply.status, headers=reply.headers, content=reply.content)


class _Network(httpcore.SyncBackend):
    """Connections whose time-outs are moments of the monotonic clock, so that they last for all pieces together."""

    def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        return _Stream(super().connect_tcp(host, port, _left(timeout), local_address, socket_options))


class _Stream(httpcore.NetworkStream):
    def __init__(self, stream: httpcore.NetworkStream):
        self._stream = stream

    def read(self, max_bytes, timeout=None):
        return self._stream.read(max_bytes, _left(timeout))

    def write(self, buffer, timeout=None):
        self._stream.write(buffer, _left(timeout))

    def start_tls(self, ssl_context, server_hostname=None, timeout=None):
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, _left(timeout)))

    def close(self):
        self._stream.close()

    def get_extra_info(self, info):
        return self._stream.get_extra_info(info)


def _left(until: float) -> float:
    if (left := until - time.monotonic()) <= 0:
        raise httpcore.ReadTimeout("the reply came too slowly")
    return left


logging.getLogger("httpx").setLevel(logging.WARNING)  # not a line a request


def client(address: str, key: str, model: endpoint.Model, options: endpoint.Options) -> endpoint.Try:
    """A function that asks the model at `address` once; the key is shown to it and to nobody else."""
    http = httpx.Client(transport=_Transport(options))
    api = openai.OpenAI(
        base_url=address, api_key=key or "none", max_retries=0, timeout=options.timeout_s, http_client=http
    )

    def ask(message: str) -> tuple[str, float, bool] | endpoint.Failure:
        try:
            return _ask(api, model, message)
        except Exception as error:  # of the network, of the server, or whatever a strange reply does to the client
            found = _failure(error)
            return found._replace(said=found.said.replace(key, "<key>")) if key else found

    return ask


def _ask(api: openai.OpenAI, model: endpoint.Model, message: str) -> tuple[str, float, bool]:
    reply = api.chat.completions.create(
        model=model.name,
        messages=[{"role": "user", "content": message}],
        temperature=model.temperature,
        max_tokens=model.max_tokens,
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
        except (ValueError, OverflowError):  # what is no date, or has numbers that no date has
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None

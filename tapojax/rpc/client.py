"""The calling end: channels that notice dead servers, show their token, and speak of failures in sentences."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from tapojax.rpc import limits as rpc_limits
from tapojax.rpc import security as rpc_security

KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS = 10_000, 10_000


class Failure(RuntimeError):
    """A call that failed. `code` says how: see the contract for which codes another try can help."""

    def __init__(self, code: grpc.StatusCode, address: str, message: str):
        super().__init__(message)
        self.code, self.address = code, address


def channel(address: str, *, security: rpc_security.Security, limits: rpc_limits.Limits) -> grpc.Channel:
    """A channel to host:port. Nothing is sent yet; it connects, and connects again, as calls need it.

    Raises:
      ValueError: the address has no port, or is another machine's and there is no TLS.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"{address!r} is not an address: write host:port")
    credentials = rpc_security.channel_credentials(security)
    options = _options(limits)
    if credentials is not None:
        made = grpc.secure_channel(address, credentials, options)
    elif rpc_security.is_loopback(host):
        made = grpc.insecure_channel(address, options)
    else:
        raise ValueError(f"{address} is another machine and the wire would be open: pass --authority_file for TLS")
    return made if security.token is None else grpc.intercept_channel(made, _Token(security.token))


def _options(limits: rpc_limits.Limits) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_send_message_length", limits.max_message_bytes),
        # a server that is gone without a word is noticed within the sum of the two
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),  # a probe of bandwidth in flight holds back keep-alive
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 1_000),
        ("grpc.max_reconnect_backoff_ms", 5_000),
        ("grpc.enable_retries", 0),  # a call is repeated by who knows that it may be
        ("grpc.enable_http_proxy", 0),  # a proxy of the environment is for the internet
        ("grpc.use_local_subchannel_pool", 1),  # one channel's backoff is not another's
    ]


class _Token(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Adds the token to each call. gRPC's own call credentials cost a thread a call and refuse plain loopback."""

    def __init__(self, token: str):
        self._entry = rpc_security.authorization(token)

    def _intercept(self, continuation: Callable, details: Any, request: Any) -> Any:
        return continuation(details._replace(metadata=[*(details.metadata or ()), self._entry]), request)

    intercept_unary_unary = intercept_unary_stream = intercept_stream_unary = intercept_stream_stream = _intercept


def explain(error: grpc.RpcError, address: str) -> str:
    """One sentence that names the server, the code and the message."""
    return f"{address}: {error.code().name}: {error.details() or 'no message'}"


@contextlib.contextmanager
def failures(address: str) -> Iterator[None]:
    """Turns gRPC's errors inside the block into `Failure`s."""
    try:
        yield
    except grpc.RpcError as error:
        raise Failure(error.code(), address, explain(error, address)) from error

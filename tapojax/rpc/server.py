"""The serving end: one gate before every method, health and reflection beside them, and an end that loses no call."""

import asyncio
import contextlib
import functools
import inspect
import logging
import signal
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tapojax.rpc import limits as rpc_limits
from tapojax.rpc import security as rpc_security
from tapojax.rpc import telemetry as rpc_telemetry

HEALTH = "grpc.health.v1.Health"
REFLECTION = reflection.SERVICE_NAME
KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS = 20_000, 10_000
MESSAGE_CHARACTERS = 600  # a status travels in HTTP headers of 8 KiB, where a character takes up to 12
Code = grpc.StatusCode


class Refused(Exception):
    """Raised by a servicer to end its call with a code and a message for the caller."""

    def __init__(self, code: grpc.StatusCode, message: str):
        super().__init__(message)
        self.code, self.message = code, message


class Running(NamedTuple):
    """A server that listens."""

    port: int
    drain: Callable[[float], Awaitable[None]]  # refuses new calls, waits so many seconds for those that run, and stops
    wait: Callable[[], Awaitable[Any]]  # until it has stopped


async def start(
    servicers: Sequence[Callable[[grpc.aio.Server], None]],
    service_names: Sequence[str],
    *,
    host: str,
    port: int,
    security: rpc_security.Security,
    limits: rpc_limits.Limits,
    telemetry: rpc_telemetry.Telemetry,
) -> Running:
    """Listens on host:port (0: any free port) with the servicers, each given as what adds it to a server.

    Servicers are coroutines or asynchronous generators that take a message or an asynchronous iterator of messages.
    What they raise ends the call: Refused as it says, ValueError as INVALID_ARGUMENT with its message, anything else as
    INTERNAL without one, its traceback in the log. A stream of messages that ends early may be one that broke: gRPC
    tells the two apart only by what follows, so a servicer counts what must have come.

    Raises:
      ValueError: the host needs credentials that are missing, or cannot be listened on.
    """
    rpc_security.check_bind(host, security)
    credentials = rpc_security.server_credentials(security)
    gate = _Gate(security, limits, telemetry)
    server = grpc.aio.server(interceptors=[gate], options=_options(limits))
    for add in servicers:
        add(server)
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection([*service_names, HEALTH, REFLECTION], server)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError as error:
        raise ValueError(
            f"cannot listen on {address}: pass a --port that is free and a --host of this machine"
        ) from error
    await server.start()
    for name in service_names:
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    rpc_telemetry.log("listening", host=host, port=bound, services=list(service_names), tls=credentials is not None)
    return Running(bound, functools.partial(_drain, server, gate, checks), server.wait_for_termination)


async def until_signal(running: Running, *, seconds: float) -> None:
    """Serves until SIGTERM or SIGINT comes, then drains for at most so many seconds; another signal ends it at once."""
    stop, loop, numbers = asyncio.Event(), asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, stop.set)
    await stop.wait()
    for number in numbers:
        loop.remove_signal_handler(number)
    await running.drain(seconds)


async def _drain(server: grpc.aio.Server, gate: "_Gate", checks: health.aio.HealthServicer, seconds: float) -> None:
    gate.draining = True
    rpc_telemetry.log("draining", running=len(gate.running), seconds=seconds)
    # the health servicer waits for its watchers, and a watcher may never read
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(checks.enter_graceful_shutdown(), 1.0)
    if gate.running:
        _, late = await asyncio.wait(gate.running, timeout=seconds)
        gate.stopping = True
        for task in late:
            task.cancel()
        rpc_telemetry.log("drained", cancelled=len(late))
    await server.stop(1.0)


def _options(limits: rpc_limits.Limits) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_send_message_length", limits.max_message_bytes),
        # a client that is gone without a word is noticed within the sum of the two
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),  # a probe of bandwidth in flight holds back keep-alive
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # clients ping in silence too
        ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a lottery
    ]


class _Gate(grpc.aio.ServerInterceptor):
    """Stands before every method: who asks, how often, for how long; counts and logs how it ended.

    Every method is served as a stream of bytes, whatever its kind, so that nothing of a refused call is read or parsed.
    """

    def __init__(self, security: rpc_security.Security, limits: rpc_limits.Limits, metrics: rpc_telemetry.Telemetry):
        self.draining = self.stopping = False
        self.running: set[asyncio.Task] = set()
        self.checks: set[asyncio.Task] = set()  # of health, which have places of their own
        self._security, self._limits, self._metrics = security, limits, metrics
        self._wait = rpc_limits.rate_limiter(calls_per_second=limits.calls_per_second, burst=limits.burst)

    async def intercept_service(self, continuation: Callable, handler_call_details: Any) -> Any:
        handler, method = await continuation(handler_call_details), handler_call_details.method.removeprefix("/")
        if handler is None:
            return None
        serve = functools.partial(self._serve, handler, method)
        return grpc.stream_stream_rpc_method_handler(serve, None, handler.response_serializer)

    async def _serve(self, handler: Any, method: str, requests: AsyncIterator[bytes], context: Any) -> None:
        started, code, message, about = time.monotonic(), Code.OK, "", {"method": method, "peer": context.peer()}
        try:
            with self._place(method, context):
                await _call(handler, requests, context, about)
        except Refused as refused:
            code, message = refused.code, refused.message
        except ValueError as error:
            code, message = Code.INVALID_ARGUMENT, str(error)
        except grpc.aio.AbortError:
            code = _code(context)
            raise
        except asyncio.CancelledError:
            # by the caller, by its deadline, or because its connection is gone
            if not self.stopping:
                code = Code.CANCELLED
                raise
            code, message = Code.UNAVAILABLE, "the server stops and waited no longer: ask another one"
        except Exception:
            code, message = Code.INTERNAL, "an error inside the server; its log has more"
            rpc_telemetry.log("failed", level=logging.ERROR, failed=True, **about)
        finally:
            message = message[:MESSAGE_CHARACTERS].encode(errors="replace").decode()
            self._record(method, code, time.monotonic() - started, about | ({"message": message} if message else {}))
        if code is not Code.OK:
            await context.abort(code, message)

    @contextlib.contextmanager
    def _place(self, method: str, context: Any) -> Iterator[None]:
        """A place among the running calls, for a caller that may have one."""
        checking, task = method.startswith(f"{HEALTH}/"), asyncio.current_task()
        assert task
        self._check_caller(method, context, checking)
        places = self.checks if checking else self.running
        if len(places) >= self._limits.max_concurrent:
            raise Refused(Code.RESOURCE_EXHAUSTED, f"{len(places)} calls run already: ask again later")
        places.add(task)
        try:
            with self._metrics.running.labels(method).track_inprogress():
                yield
        finally:
            places.discard(task)

    def _check_caller(self, method: str, context: Any, checking: bool) -> None:
        peer, remaining = context.peer().rpartition(":")[0], context.time_remaining()
        if seconds := self._wait(f"{peer} {checking}"):
            raise Refused(Code.RESOURCE_EXHAUSTED, f"too many calls from {peer}: wait {seconds:.3f} s")
        if checking:
            return
        token = self._security.token
        if token is not None and not rpc_security.authorized(context.invocation_metadata(), token):
            raise Refused(
                Code.UNAUTHENTICATED, "the call shows no token or a wrong one: pass the server's --token_file"
            )
        if self.draining:
            raise Refused(Code.UNAVAILABLE, "draining: ask another server")
        if method.startswith(f"{REFLECTION}/"):
            return
        if remaining is None or remaining > self._limits.max_seconds:
            most = f"at most {self._limits.max_seconds:g} s"
            raise Refused(Code.INVALID_ARGUMENT, f"{method} takes a deadline of {most}: pass timeout=")

    def _record(self, method: str, code: grpc.StatusCode, seconds: float, about: dict[str, Any]) -> None:
        self._metrics.calls.labels(method, code.name).inc()
        self._metrics.seconds.labels(method).observe(seconds)
        # a flood of calls must not become a flood of lines
        quiet = method.startswith(f"{HEALTH}/") or code is Code.RESOURCE_EXHAUSTED
        level = logging.DEBUG if quiet else logging.INFO
        rpc_telemetry.log("call", level=level, code=code.name, seconds=round(seconds, 6), **about)


async def _call(handler: Any, requests: AsyncIterator[bytes], context: Any, about: dict[str, Any]) -> None:
    """Serves one call by a servicer's method of any of the four kinds."""
    serve = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    async with contextlib.aclosing(_parsed(handler.request_deserializer, requests)) as messages:
        request: Any = messages
        if not handler.request_streaming:
            request = await anext(messages, None)
            if request is None:
                raise Refused(Code.INVALID_ARGUMENT, "the call ended without a message")
            if named := getattr(request, "request_id", ""):
                about["request_id"] = named[:MESSAGE_CHARACTERS]
        replies = serve(request, context)
        if inspect.isasyncgen(replies):
            async with contextlib.aclosing(replies):
                async for reply in replies:
                    await context.write(reply)
            return
        # health's Watch writes its replies itself
        reply = await replies
        if not handler.response_streaming:
            await context.write(reply)


async def _parsed(parse: Callable[[bytes], Any], requests: AsyncIterator[bytes]) -> AsyncGenerator[Any, None]:
    async for raw in requests:
        try:
            message = parse(raw)
        except DecodeError as error:
            raise Refused(Code.INVALID_ARGUMENT, f"a message of {len(raw)} bytes cannot be parsed: {error}") from error
        yield message


def _code(context: Any) -> grpc.StatusCode:
    """Of a call that its servicer aborted: gRPC has a number there."""
    return next((code for code in Code if code.value[0] == context.code()), Code.UNKNOWN)

"""What a server tells its operators: Prometheus metrics over HTTP, and a log of one JSON object a line."""

import datetime
import json
import logging
from collections.abc import Callable
from typing import NamedTuple

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

LOGGER = logging.getLogger("tapojax.rpc")
SECONDS = (0.001, 0.01, 0.1, 1, 10, 60, 300, 1800)


class Telemetry(NamedTuple):
    """Metrics of one server, in a registry of their own."""

    registry: CollectorRegistry
    calls: Counter  # finished calls, by method and gRPC code, OK included
    seconds: Histogram  # by method
    running: Gauge  # calls, by method
    tokens: Counter  # by kind: prompt, completion
    sampling_seconds: Counter  # of requests in the sampler; two at a time count twice
    weight_version: Gauge  # of the loaded weights, -1: none were loaded
    weight_bytes: Counter  # received


def telemetry() -> Telemetry:
    """A server's metrics at zero."""
    registry = CollectorRegistry()
    made = Telemetry(
        registry,
        Counter("tapojax_calls", "Finished calls.", ["method", "code"], registry=registry),
        Histogram("tapojax_call_seconds", "Time of a call.", ["method"], registry=registry, buckets=SECONDS),
        Gauge("tapojax_calls_running", "Calls that run now.", ["method"], registry=registry),
        Counter("tapojax_tokens", "Tokens read (prompt) and sampled (completion).", ["kind"], registry=registry),
        Counter("tapojax_sampling_seconds", "Time of requests in the sampler.", registry=registry),
        Gauge("tapojax_weight_version", "Version of the loaded weights.", registry=registry),
        Counter("tapojax_weight_bytes", "Bytes of weights received.", registry=registry),
    )
    made.weight_version.set(-1)
    return made


def serve_metrics(metrics: Telemetry, *, port: int, host: str = "127.0.0.1") -> Callable[[], None]:
    """Answers http://host:port/metrics from a thread; returns what ends it. Port 0 is off.

    Raises:
      ValueError: the port is taken or not allowed.
    """
    if port == 0:
        return lambda: None
    try:
        server, thread = prometheus_client.start_http_server(port, host, metrics.registry)
    except OSError as error:
        message = f"metrics cannot listen on {host}:{port} ({error.strerror}): pass another --metrics_port, 0 for none"
        raise ValueError(message) from error

    def close():
        server.shutdown()
        server.server_close()
        thread.join()

    return close


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        line = {"time": when, "level": record.levelname, "event": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_json(level: int = logging.INFO) -> None:
    """Makes every log line of the process one JSON object on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Json())
    logging.basicConfig(level=level, handlers=[handler], force=True)


def log(event: str, *, level: int = logging.INFO, failed: bool = False, **fields: object) -> None:
    """Logs an event with its fields; `failed` adds the traceback of the exception in flight."""
    LOGGER.log(level, event, extra={"fields": fields}, exc_info=failed)

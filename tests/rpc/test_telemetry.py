"""Prometheus reads the metrics, and every log line is one JSON object."""

import io
import json
import logging
import socket
import sys
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tapojax.rpc import telemetry


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture
def lines(monkeypatch):
    """What log_json writes while the test runs; the handlers of before come back."""
    root, stream = logging.getLogger(), io.StringIO()
    handlers, level = root.handlers[:], root.level
    root.handlers = []
    monkeypatch.setattr(sys, "stderr", stream)
    telemetry.log_json()
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    root.handlers = handlers
    root.setLevel(level)


def read(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
        assert reply.headers["Content-Type"].startswith("text/plain")
        families = text_string_to_metric_families(reply.read().decode())
    return {(s.name, *map(s.labels.get, sorted(s.labels))): s.value for family in families for s in family.samples}


def test_metrics_are_served_as_prometheus_text(port):
    numbers = telemetry.telemetry()
    close = telemetry.serve_metrics(numbers, port=port)
    try:
        assert read(port)["tapojax_weight_version",] == -1
        numbers.weight_version.set(7)
        numbers.weight_bytes.inc(1e9)
        numbers.tokens.labels("completion").inc(123)
        numbers.calls.labels("tapojax.v1.Rollouts/Generate", "UNAVAILABLE").inc()
        numbers.seconds.labels("tapojax.v1.Rollouts/Generate").observe(3.0)
        values = read(port)
        assert values["tapojax_weight_version",] == 7
        assert values["tapojax_weight_bytes_total",] == 1e9
        assert values["tapojax_tokens_total", "completion"] == 123
        assert values["tapojax_calls_total", "UNAVAILABLE", "tapojax.v1.Rollouts/Generate"] == 1
        assert values["tapojax_call_seconds_bucket", "10.0", "tapojax.v1.Rollouts/Generate"] == 1
        assert values["tapojax_call_seconds_bucket", "1.0", "tapojax.v1.Rollouts/Generate"] == 0
        with pytest.raises(ValueError, match=f"127.0.0.1:{port} .*: pass another --metrics_port, 0 for none"):
            telemetry.serve_metrics(numbers, port=port)
    finally:
        close()
    with pytest.raises(OSError):
        read(port)


def test_metrics_listen_on_loopback_only(port):
    close = telemetry.serve_metrics(telemetry.telemetry(), port=port)
    try:
        with socket.create_server(("127.0.0.2", port)):
            pass  # would fail if all addresses were taken
    finally:
        close()


def test_port_zero_serves_nothing():
    telemetry.serve_metrics(telemetry.telemetry(), port=0)()


def test_two_servers_of_a_process_do_not_share_metrics():
    first, second = telemetry.telemetry(), telemetry.telemetry()
    first.weight_version.set(3)
    assert second.registry.get_sample_value("tapojax_weight_version") == -1


def test_a_log_line_is_one_json_object(lines):
    telemetry.log("listening", port=7, services=["a", "b"])
    logging.getLogger("other.library").warning("of %s too\nwith a second line", "others")
    telemetry.log("call", peer='forged"}\n{"event": "call"', value=object())
    telemetry.log("hidden", level=logging.DEBUG)
    first, second, third = lines()
    assert first["event"] == "listening" and first["level"] == "INFO"
    assert first["port"] == 7 and first["services"] == ["a", "b"] and first["time"].endswith("+00:00")
    assert second["event"] == "of others too\nwith a second line" and second["level"] == "WARNING"
    assert third["peer"] == 'forged"}\n{"event": "call"' and "object" in third["value"]


def test_a_failure_has_its_traceback(lines):
    try:
        raise KeyError("lost")
    except KeyError:
        telemetry.log("failed", level=logging.ERROR, failed=True, method="m")
    (line,) = lines()
    assert line["level"] == "ERROR" and line["method"] == "m"
    assert line["error"].startswith("Traceback") and line["error"].endswith("KeyError: 'lost'")

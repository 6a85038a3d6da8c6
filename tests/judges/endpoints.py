"""OpenAI's chat API in this process, as good or as bad as a test wants it."""

import contextlib
import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Act(NamedTuple):
    """What the server does with one request."""

    status: int = 200
    body: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    after_s: float = 0.0  # before the first byte
    pause_s: float = 0.0  # between any two bytes of the body
    header_s: float = 0.0  # before each line of the headers
    cut: int | None = None  # bytes of the body after which the connection breaks; -1: before the status line
    content_type: str = "application/json"


def say(text: str | None, *, reason: str = "stop", usage=(20, 5), **options) -> Act:
    message = {"role": "assistant", "content": text}
    reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "wise"}
    reply["choices"] = [{"index": 0, "message": message, "finish_reason": reason}]
    if usage:
        reply["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    return Act(body=json.dumps(reply), **options)


def fail(status: int, said: str = "broken", **headers: str) -> Act:
    names = tuple((name.replace("_", "-"), value) for name, value in headers.items())
    return Act(status, json.dumps({"error": {"message": said}}), names)


HANG, DROP = say("\\boxed{1}", after_s=60.0), Act(cut=-1)
PAGE = Act(body="<html>hello</html>", content_type="text/html")


class _Http(http.server.ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True


class Server:
    """`respond(message, turn)` says what to do with the turn-th request that carries the message, from 1."""

    def __init__(self, respond: Callable[[str, int], Act]):
        self.messages: list[str] = []
        self.bodies: list[dict] = []
        self.keys: list[str] = []
        self.times: list[float] = []
        self.under_way = self.most_under_way = 0
        self.lock, self.end = threading.Lock(), threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                message = body["messages"][0]["content"]
                with outer.lock:
                    outer.bodies.append(body)
                    outer.messages.append(message)
                    outer.keys.append(self.headers["Authorization"])
                    outer.times.append(time.monotonic())
                    turn = outer.messages.count(message)
                    outer.under_way += 1
                    outer.most_under_way = max(outer.most_under_way, outer.under_way)
                what = respond(message, turn)
                outer.end.wait(what.after_s)
                with outer.lock:  # before the client can know that it is done
                    outer.under_way -= 1
                with contextlib.suppress(OSError):  # the client is gone
                    self.act(what)

            def act(self, what: Act):
                data = what.body.encode()
                if what.cut == -1:
                    return self.hang_up()
                self.send_response(what.status)
                for name, value in (*what.headers, ("Content-Type", what.content_type)):
                    self.flush_headers()
                    outer.end.wait(what.header_s)
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                for start in range(0, len(data), 1 if what.pause_s else len(data)):
                    outer.end.wait(what.pause_s)
                    self.wfile.write(data[start : start + 1] if what.pause_s else data[: what.cut])
                    self.wfile.flush()
                if what.cut is not None:
                    self.hang_up()

            def hang_up(self):
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

            def log_message(self, *_):
                pass

        self.http = _Http(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def stop(self):
        self.end.set()
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@contextlib.contextmanager
def served(*responds: Callable[[str, int], Act] | Act) -> Iterator[list[Server]]:
    """One server for each; a plain act is done with every request."""
    servers = [Server(r if callable(r) else lambda message, turn, act=r: act) for r in responds]
    try:
        yield servers
    finally:
        for server in servers:
            server.stop()


def nobody() -> str:
    """An address where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"

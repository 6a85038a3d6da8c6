"""A file server in this process that breaks off, changes its files, or fails, as it is told."""

import contextlib
import http.server
import threading


class Files(dict):
    """Content by path, and how the next requests go: "break" after half of the body, "500", "from the start"."""

    def __init__(self, *args):
        super().__init__(*args)
        self.plan: list[str] = []
        self.requests: list[tuple[str, str | None]] = []  # path and Range of each
        self.tag = '"v1"'
        self.ranges = True


@contextlib.contextmanager
def serving(files: Files):
    """The address of the server."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            files.requests.append((self.path, self.headers.get("Range")))
            how = files.plan.pop(0) if files.plan else ""
            content = files.get(self.path)
            if how.isdigit() or content is None:
                self.send_error(int(how or 404))
                return
            begin = 0
            asked = self.headers.get("Range")
            if asked and files.ranges and self.headers.get("If-Range") == files.tag:
                begin = int(asked.removeprefix("bytes=").rstrip("-"))
                if begin >= len(content):
                    self.send_error(416)
                    return
                begin = 0 if how == "from the start" else begin
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            self.send_header("ETag", files.tag)
            self.send_header("Content-Length", str(len(content) - begin))
            self.end_headers()
            body = content[begin:]
            self.wfile.write(body[: len(body) // 2] if how == "break" else body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

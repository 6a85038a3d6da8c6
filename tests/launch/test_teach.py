"""`python -m launch.teach` against a chat endpoint in this process: what it keeps, and what it says when lost."""

import contextlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.tasks.test_files import make, save_tokenizer

ROOT = Path(__file__).parents[2]
PROBLEMS = [{"problem": f"{n}+1?", "answer": str(n + 1), "id": f"sum/{n}"} for n in range(6)]


@contextlib.contextmanager
def endpoint(respond):
    """A chat API on a free port; `respond(request, headers) -> (status, JSON or text)`. Gives its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, body = respond(request, self.headers) if self.path == "/v1/chat/completions" else (404, {})
            text = body if isinstance(body, str) else json.dumps(body)
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if isinstance(body, str) else "application/json")
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def says(text, reason="stop"):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
    return 200, {"id": "1", "object": "chat.completion", "created": 0, "model": "wise", "choices": [choice]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("teach")
    save_tokenizer(path)
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    (path / "config.py").write_text(
        "from configs import base\n\n\ndef get_config():\n    c = base.get_config(task='files')\n"
        f"    c.task.tokenizer_path = {str(path)!r}\n    c.task.train_path = {str(path / 'rows.jsonl')!r}\n"
        "    c.sampling.max_prompt_tokens = 200\n    return c\n"
    )
    return path


def teach(folder, output, *flags, **environment):
    command = [sys.executable, "-m", "launch.teach", f"--config={folder / 'config.py'}", "--teacher=wise", *flags]
    env = {key: value for key, value in os.environ.items() if not key.startswith("OPENAI_")} | environment
    return subprocess.run(
        [*command, f"--config.task.teacher_path={output}"], cwd=ROOT, env=env, capture_output=True, text=True
    )


def test_right_completions_are_kept_and_taught_problems_are_not_asked_again(folder, tmp_path):
    requests, headers, lock = [], [], threading.Lock()
    output = tmp_path / "new" / "teacher.jsonl"
    confused = True

    def respond(request, header):
        with lock:
            requests.append(request)
            headers.append(header["Authorization"])
            n = int(re.match(r"\d+", request["messages"][0]["content"])[0])
            turn = sum(other["messages"] == request["messages"] for other in requests)
        if n == 1 and turn == 1:
            return 500, {"error": {"message": "out of memory"}}  # the client asks again
        if n == 2:
            return 400, {"error": {"message": "prompt is too long"}}
        if n == 3:
            return says("So \\boxed{5}.") if confused else says("So \\boxed{4}.")
        if n == 4:
            return says("Let me think: \\boxed{5}", "length")
        return says(f"{n} and 1 is\n\\boxed{{{n + 1}}}" + "." * (turn > 2))

    with endpoint(respond) as address:
        flags = (f"--endpoint={address}", "--completions=3", "--requests=2", "--max_tokens=50")
        first = teach(folder, output, *flags, OPENAI_API_KEY="secret")
        assert first.returncode == 0, first.stdout + first.stderr
        assert set(headers) == {"Bearer secret"} and "secret" not in first.stdout + first.stderr
        assert "sum/2: asked no further:" in first.stdout and "prompt is too long" in first.stdout
        assert "taught   3 of 6 problems; 0 were in the file before" in first.stdout
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        texts = {n: [row["completion"] for row in rows if row["id"] == f"sum/{n}"] for n in range(6)}
        assert texts[0] == ["0 and 1 is\n\\boxed{1}", "0 and 1 is\n\\boxed{1}."], "equal ones once"
        assert len(texts[1]) == 2 and len(texts[5]) == 2 and not texts[2] + texts[3] + texts[4]
        assert {key: requests[0][key] for key in ("model", "temperature", "max_tokens")} == {
            "model": "wise",
            "temperature": 0.7,
            "max_tokens": 50,
        }
        assert "put your final answer within \\boxed{}" in requests[0]["messages"][0]["content"]

        requests.clear()
        confused = False
        second = teach(folder, output, *flags)
    assert "taught   1 of 3 problems; 3 were in the file before" in second.stdout, second.stdout + second.stderr
    assert {request["messages"][0]["content"][0] for request in requests} == {"2", "3", "4"}
    assert len(output.read_text().splitlines()) == len(rows) + 1

    task = make(str(folder), str(folder / "rows.jsonl"), teacher_path=str(output))
    assert task.teacher(task.train[3]) == ["So \\boxed{4}."] and task.teacher(task.train[4]) == []


@pytest.mark.parametrize(
    ("respond", "why"),
    [
        (lambda request, headers: (200, "<html>hello</html>"), "no chat completion: '<html>hello"),
        (None, "Connection error"),
    ],
    ids=["page", "nobody"],
)
def test_an_endpoint_that_does_not_answer_is_named(folder, tmp_path, respond, why):
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(endpoint(respond))
        if respond is None:
            stack.close()  # nobody listens there now
        done = teach(folder, tmp_path / "t.jsonl", f"--endpoint={address}", "--retries=0")
    assert done.returncode == 1 and why in done.stderr, done.stdout + done.stderr
    assert f"error: {address} gave no reply for 6 problems in a row" in done.stderr
    assert "Check --endpoint, --teacher=wise and the key in OPENAI_API_KEY" in done.stderr


def test_the_file_to_write_must_be_named(folder):
    done = teach(folder, "")
    assert done.returncode == 1 and "--config.task.teacher_path=teacher.jsonl" in done.stderr

"""Reward servers for tests: in a thread of this process, or in a process of their own that can be killed.

    python -m tests.rewards.servers journal seconds

serves `toy` until it is killed, and writes the id of every example it scores into the journal.
"""

import asyncio
import contextlib
import functools
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tapojax.rewards import serving
from tapojax.rpc import client, limits, security, server, telemetry
from tapojax.rpc import tapojax_pb2 as pb
from tapojax.rpc import tapojax_pb2_grpc as pb_grpc

ROOT = Path(__file__).parents[2]
OPEN = security.Security()
SERVICE = "tapojax.v1.Rewards"
CHANNELS = ("correct", "length")


def rows(count: int):
    """Problems and completions of every kind that `toy` knows."""
    kinds = ["right", "wrong {}", "unsure", "no verdict", "日本語 \N{PILE OF POO}"]
    return [{"id": f"row {i}", "answer": i} for i in range(count)], [kinds[i % 5].format(i) for i in range(count)]


def toy(examples, completions):
    """Two channels; some rows have NaN in one of them, with an error text or without."""
    correct = [
        math.nan if text in ("unsure", "no verdict") else float(text == "right") + example["answer"] / 7
        for example, text in zip(examples, completions, strict=True)
    ]
    errors = ["the judge gave no verdict: ∅" if text == "no verdict" else None for text in completions]
    return {"correct": correct, "length": [len(text) for text in completions]}, errors


class Served:
    """A server in a thread, around any score function."""

    def __init__(self, score=toy, *, port: int = 0, secrets=OPEN, task="toy", channels=CHANNELS, **options):
        self.arguments, self.options = dict(task=task, channels=channels), options
        self.score, self.secrets, self.ready = score, secrets, threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve(port)), daemon=True)
        self.thread.start()
        assert self.ready.wait(30)

    async def _serve(self, port: int):
        self.loop = asyncio.get_running_loop()
        self.telemetry = telemetry.telemetry()
        servicer = serving.Rewards(self.score, telemetry=self.telemetry, **self.arguments, **self.options)
        self.running = await start(servicer, port, self.secrets)
        self.address = f"127.0.0.1:{self.running.port}"
        self.end, self.drain_s = asyncio.Event(), 0.0
        self.ready.set()
        await self.end.wait()
        await self.running.drain(self.drain_s)

    def stop(self, drain_s: float = 0.0):
        if self.thread.is_alive():
            self.drain_s = drain_s
            self.loop.call_soon_threadsafe(self.end.set)
            self.thread.join(30)


async def start(servicer, port: int = 0, secrets=OPEN):
    return await server.start(
        [functools.partial(pb_grpc.add_RewardsServicer_to_server, servicer)],
        [SERVICE],
        host="127.0.0.1",
        port=port,
        security=secrets,
        limits=limits.Limits(),
        telemetry=telemetry.telemetry(),
    )


@contextlib.contextmanager
def served(*scores, **options) -> Iterator[list[Served]]:
    """One server around each score function."""
    servers = [Served(score, **options) for score in scores]
    try:
        yield servers
    finally:
        for one in servers:
            one.stop()


@contextlib.contextmanager
def stub(address: str, secrets=OPEN) -> Iterator[pb_grpc.RewardsStub]:
    with client.channel(address, security=secrets, limits=limits.Limits()) as channel:
        yield pb_grpc.RewardsStub(channel)


@contextlib.contextmanager
def process(command: list[str], **options) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server process that has said where it listens; it is killed at the end."""
    environment = {key: value for key, value in os.environ.items() if key != "NPROC"} | {"XLA_FLAGS": ""}
    with subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, **options
    ) as popen:
        try:
            line = popen.stdout.readline()
            assert line.startswith("listening on "), line
            yield popen, line.removeprefix("listening on ").strip()
        finally:
            popen.kill()


def toy_process(journal: Path, seconds: float = 0.0):
    return process(["-m", "tests.rewards.servers", str(journal), str(seconds)])


def item(name: str, example: bytes = b'{"answer": 0}', completion: str = "right") -> pb.ScoreItem:
    return pb.ScoreItem(id=name, example=example, completion=completion)


def wait_until(condition, seconds: float = 20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


async def _main(journal: str, seconds: float):
    def score(examples, completions):
        time.sleep(seconds * len(examples))
        with open(journal, "a") as file:
            file.write("".join(f"{example['id']}\n" for example in examples))
        return toy(examples, completions)

    numbers = telemetry.telemetry()
    running = await start(serving.Rewards(score, task="toy", channels=CHANNELS, telemetry=numbers, max_batch=4))
    print(f"listening on 127.0.0.1:{running.port}", flush=True)
    await running.wait()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], float(sys.argv[2])))

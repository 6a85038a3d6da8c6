"""Batches as bytes: to keep in a checkpoint what is collected ahead, and to train again on the very same rollouts.

A recording is the folder recorded/ of a run: one file a batch, and schedule.jsonl with one line a batch, which says
what version of the weights it began with, how many tokens each version sampled, and the digest of the file.
"""

import base64
import io
import json
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from tapojax import metrics, report
from tapojax.asynchrony import Snapshot, Source, token_versions
from tapojax.rollout.collect import Collected
from tapojax.types import Prompts, Rollout


def pack(part: Collected) -> bytes:
    """All that trains and all that is written down, which of a problem is `id` and `problem`; not the memory."""
    said = {name: x for name, x in part._asdict().items() if name not in ("rollout", "scores", "prompts", "memory")}
    said["examples"] = [{"id": str(e["id"]), "problem": str(e["problem"])} for e in part.prompts.examples]
    said["tokens"] = [[int(token) for token in tokens] for tokens in part.prompts.tokens]
    arrays = {f"rollout {name}": x for name, x in part.rollout._asdict().items() if x is not None}
    arrays |= {f"score {name}": x for name, x in part.scores.items()}
    file = io.BytesIO()
    np.savez_compressed(file, said=np.frombuffer(json.dumps(said).encode(), np.uint8), **arrays)
    return file.getvalue()


def unpack(data: bytes) -> Collected:
    """The inverse, to the bit."""
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    said = json.loads(arrays.pop("said").tobytes())
    kinds: dict[str, dict] = {"rollout": {}, "score": {}}
    for name, x in arrays.items():
        kind, _, rest = name.partition(" ")
        kinds[kind][rest] = x
    prompts = Prompts(said.pop("examples"), said.pop("tokens"))
    return Collected(rollout=Rollout(**kinds["rollout"]), scores=kinds["score"], prompts=prompts, **said)


def to_text(part: Collected) -> str:
    """For the record of a checkpoint."""
    return base64.b64encode(pack(part)).decode()


def from_text(text: str) -> Collected:
    return unpack(base64.b64decode(text))


def record(source: Source, log: metrics.Log) -> Source:
    """The same batches, each written down when it is its turn to train."""
    folder = log.workdir / "recorded"
    folder.mkdir(exist_ok=True)

    def next_batch(step: int, snapshot: Snapshot) -> Collected:
        part = source.next(step, snapshot)
        data, file = pack(part), f"{step:06d}.npz"
        (folder / file).write_bytes(data)
        by_version = {str(version): count for version, count in sorted(Counter(token_versions(part).tolist()).items())}
        line = {"step": step, "version": part.version, "tokens_by_version": by_version}
        metrics.append(log, "recorded/schedule", {**line, "file": file, "digest": zlib.crc32(data)})
        return part

    return source._replace(next=next_batch)


def replay(folder: Path, *, steps: int, rows: int) -> Source:
    """The batches that `record` wrote; nothing is sampled.

    Raises:
      ValueError: the recording is not of all steps, or (when its turn comes) a file is damaged or has other rows.
    """
    schedule = read_schedule(folder, steps)

    def next_batch(step: int, snapshot: Snapshot) -> Collected:
        del snapshot
        file = folder / schedule[step]["file"]
        data = file.read_bytes()
        if zlib.crc32(data) != schedule[step]["digest"]:
            raise ValueError(f"{file} is not what was recorded: fetch the recording again")
        part = unpack(data)
        if len(part.rollout.tokens) != rows:
            raise ValueError(
                f"{file} has {len(part.rollout.tokens)} rows, this config has prompts_per_step * group_size = {rows}: "
                "replay with the config of the recorded run"
            )
        return part._replace(seconds={}, call_seconds=())

    return Source(next_batch, lambda: [])


def read_schedule(folder: Path, steps: int) -> dict[int, dict]:
    """The lines of schedule.jsonl by step.

    Raises:
      ValueError: one is missing.
    """
    path = folder / "schedule.jsonl"
    schedule = {line["step"]: line for line in report.read_jsonl(path)}
    for step in range(steps):
        if step not in schedule:
            raise ValueError(
                f"{path} has no batch of step {step}: asynchrony.replay takes the folder recorded/ of a run of {steps} "
                "steps or more with asynchrony.record=True"
            )
    return schedule

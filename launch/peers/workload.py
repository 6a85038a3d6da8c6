"""What every library has to do in `launch.benchmark`, and how it is timed.

Each library's own Python imports this file, so it needs the standard library alone (and Linux, for memory). Prompts and
completions are random words such as "w17", one token each; four ids are kept for padding, end, start and unknown.
"""

import ctypes
import dataclasses
import gc
import importlib.metadata
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

PAD, EOS, BOS, UNKNOWN = range(4)
FIRST_WORD = 4
MATMUL_SIZE = 2048
GROUP_SIZE = 8

# of every train step: GRPO's usual ones, so that no library is asked for something unusual
LEARNING_RATE, CLIP_NORM, CLIP_RATIO = 1e-5, 1.0, 0.2
ROPE_THETA, NORM_EPS = 10_000.0, 1e-6


@dataclasses.dataclass(frozen=True)
class Model:
    """A Qwen3 decoder: grouped queries, norms of queries and keys, gated MLP, tied embeddings, float32."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclasses.dataclass(frozen=True)
class Job:
    """One case for one process. Rows are prompts * group_size, each prompt_tokens + completion_tokens long."""

    kind: str  # a key of the library's CASES
    model: Model
    prompts: int
    group_size: int
    prompt_tokens: int
    completion_tokens: int
    warmup: int  # repetitions that are not counted: compilation, caches, first allocations
    repetitions: int
    threads: int
    kl_coef: float = 0.0
    started: float = 0.0  # time.time() just before the process was started
    folder: str = ""  # temporary, for what a library wants on disk

    @property
    def rows(self) -> int:
        return self.prompts * self.group_size


SMALL = Model(4096, 256, 1024, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=64)
TINY = Model(64, 32, 64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16)


def jobs(*, quick: bool, rows: int | None, repetitions: int | None, threads: int) -> dict[str, Job]:
    """All cases by name; quick: at shapes that only show that they run. None leaves a number at its default.

    Raises:
      ValueError: rows do not make whole groups.
    """
    rows = rows or (8 if quick else 64)
    if rows % GROUP_SIZE:
        raise ValueError(f"--rows={rows} is not a multiple of the group size {GROUP_SIZE}")
    step = Job(
        kind="step",
        model=TINY if quick else SMALL,
        prompts=rows // GROUP_SIZE,
        group_size=GROUP_SIZE,
        prompt_tokens=4 if quick else 32,
        completion_tokens=8 if quick else 64,
        warmup=1 if quick else 2,
        repetitions=repetitions or (1 if quick else 3),
        threads=threads,
    )
    generate = dataclasses.replace(step, kind="generate")
    startup = dataclasses.replace(step, kind="startup", warmup=0, repetitions=1)
    logprobs = dataclasses.replace(
        step,
        kind="logprobs",
        model=dataclasses.replace(step.model, vocab_size=512 if quick else 151_936),
        prompts=1,
        completion_tokens=16 if quick else 480,
        warmup=1,
    )
    return {
        "generate": generate,
        "generate_large": dataclasses.replace(generate, prompts=4 * step.prompts),
        "train": dataclasses.replace(step, kind="train"),
        "step": step,
        "step_kl": dataclasses.replace(step, kl_coef=0.04),
        "logprobs": logprobs,
        "logprobs_backward": dataclasses.replace(logprobs, kind="logprobs_backward"),
        "startup": startup,
        "startup_again": startup,
    }


def words(rows: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Random token ids [rows, length] without the four special ones."""
    generator = random.Random(seed)
    return [[generator.randrange(FIRST_WORD, vocab_size) for _ in range(length)] for _ in range(rows)]


def prompts(job: Job) -> list[list[int]]:
    return words(job.prompts, job.prompt_tokens, job.model.vocab_size, seed=0)


def grouped_prompts(job: Job) -> list[list[int]]:
    """Each prompt once per row."""
    return [tokens for tokens in prompts(job) for _ in range(job.group_size)]


def completions(job: Job) -> list[list[int]]:
    return words(job.rows, job.completion_tokens, job.model.vocab_size, seed=1)


def advantages(job: Job) -> list[float]:
    """From -1 to 1 over the rows."""
    return [2 * row / max(job.rows - 1, 1) - 1 for row in range(job.rows)]


def reward(completion: str) -> float:
    """Share of words with an even id: cheap, and different from row to row."""
    ids = tokens(completion)
    return sum(token % 2 == 0 for token in ids) / max(len(ids), 1)


def text(tokens) -> str:
    return " ".join(f"w{int(token)}" for token in tokens if token >= FIRST_WORD)


def tokens(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


class Stopwatch:
    """Times consecutive repetitions, and finds the memory they need beyond what stands when the watch is made.

    Make it when the parameters (and the reference's) stand and the optimizer's state does not.
    """

    def __init__(self, job: Job):
        self.job = job
        tidy_memory()
        self.memory_before = memory_mib("VmRSS")
        self.laps = [clocks()]
        self.first_lap = 0.0

    def repetitions(self) -> Iterator[int]:
        """0, 1, ...: the body of a loop over them is timed; it must end with its work done, not only dispatched."""
        for number in range(self.job.warmup + self.job.repetitions):
            yield number
            self.lap()

    def lap(self):
        """Ends a repetition."""
        self.laps.append(clocks())
        if len(self.laps) == 2:
            self.first_lap = time.time() - self.job.started
        if len(self.laps) == 1 + self.job.warmup:
            tidy_memory()
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak so far, starts anew
            self.laps[-1] = clocks()

    def result(self) -> dict:
        counted = self.laps[self.job.warmup :]
        seconds, cpu, busy = ([b - a for a, b in itertools.pairwise(column)] for column in zip(*counted, strict=True))
        return {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "others_cores": max(0.0, (sum(busy) - sum(cpu)) / sum(seconds)),
            "start_to_first_repetition_seconds": self.first_lap,
            "extra_peak_mib": memory_mib("VmHWM") - self.memory_before,
        }


def clocks() -> tuple[float, float, float]:
    """Seconds of the wall, of this process on all its cores, and of the whole machine's cores being busy."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
    idle, waiting_for_disk = ticks[3:5]
    busy = (sum(ticks) - idle - waiting_for_disk) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), time.process_time(), busy


def memory_mib(entry: str) -> float:
    """VmRSS (resident now) or VmHWM (its peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{entry}:")) / 1024


def tidy_memory():
    """Hands freed memory back to the system, so that what a process was once given does not count as standing."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def summary(parts: list[dict], tokens: int) -> dict:
    """One cell of the table: all repetitions of all rounds together."""
    seconds = [value for part in parts for value in part["seconds"]]
    median = statistics.median(seconds)
    return {
        "median_seconds": median,
        "min_seconds": min(seconds),
        "max_seconds": max(seconds),
        "median_cpu_seconds": statistics.median(value for part in parts for value in part["cpu_seconds"]),
        "others_cores": statistics.median(part["others_cores"] for part in parts),
        "tokens_per_second": tokens / median,
        "extra_peak_mib": statistics.median(part["extra_peak_mib"] for part in parts),
        "seconds": seconds,
    }


def main(cases: Mapping[str, Callable[..., Stopwatch]], packages: tuple[str, ...]):
    """Runs the job in argv[1] (JSON) and writes what was measured to argv[2]."""
    fields = json.loads(sys.argv[1])
    job = Job(**fields | {"model": Model(**fields["model"])})
    watch = cases[job.kind](job)
    versions = {name: importlib.metadata.version(name) for name in packages}
    Path(sys.argv[2]).write_text(json.dumps({**watch.result(), "versions": versions}))

"""How fast is it, and how much memory does it take: ours beside TRL and Tunix, the same work in the same run.

    python -m launch.benchmark
    python -m launch.benchmark --trl_python=venvs/trl/bin/python --tunix_python=venvs/tunix/bin/python
    python -m launch.benchmark --cases=generate,train --rounds=5

Cases, on a random 4-layer Qwen3 decoder of width 256 and vocabulary 4,096, prompts of 32 and completions of 64 tokens:
generate and generate_large (4 times the rows), train (one update on given rows), step and step_kl (sample, score,
reward, update; step_kl with a reference and its k3 penalty at 0.04), logprobs and logprobs_backward (log-prob and
entropy of 8 x 480 tokens at vocabulary 151,936; backward adds the gradient of the mean log-prob), startup (a fresh
process until its first step is done) and startup_again (after a startup with a compilation cache, which both JAX
libraries are given).

Compared: the same shapes, float32, the same number of CPU threads; GRPO with one update a step, clip 0.2 and AdamW,
each library with its own sampler, loss, log-probs and loop, entropies included. Every case runs in its own process, one
at a time, libraries in turn, so that a machine that slows down slows all. Seconds are medians over all rounds without
warm-up; memory is the peak of the counted repetitions beyond what stood when the parameters did (so compiled programs
and the optimizer's state count); tokens are completion tokens.

Not compared: accelerators and several devices, vLLM and other sampling servers, rows of different length (ours has no
stop token; TRL and Tunix insist on one, which a random model draws in one row of 64 without ending the batch), lower
precision and recomputation, large models, and how well a policy learns.
"""

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags

from launch.peers import workload

CASES = flags.DEFINE_list("cases", None, "which cases, in this order [all]")
QUICK = flags.DEFINE_bool("quick", False, "tiny shapes, one repetition: only to see that all of it runs")
ROWS = flags.DEFINE_integer("rows", None, "rows of a step, a multiple of 8 [64]", lower_bound=8)
REPETITIONS = flags.DEFINE_integer("repetitions", None, "counted in each process [3]", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", None, "processes of each library for each case [3]", lower_bound=1)
THREADS = flags.DEFINE_integer("threads", 2, "CPU threads, and cores that all processes are kept on", lower_bound=1)
TRL_PYTHON = flags.DEFINE_string("trl_python", "", "the Python that has trl; empty: TRL is left out")
TUNIX_PYTHON = flags.DEFINE_string("tunix_python", "", "the Python that has tunix; empty: Tunix is left out")
RESULTS = flags.DEFINE_string("folder", "results", "folder for benchmark-<time>.json and benchmark-history.jsonl")

ROOT = Path(__file__).parents[1]
OURS = "tapojax"
LIMIT_SECONDS = 1800  # of one process
QUIET_CORES = 0.1  # that others may keep busy
INSTALL = {
    "trl": "pip install trl==1.16.0 transformers==5.23.0 torch==2.13.0 "
    "--extra-index-url https://download.pytorch.org/whl/cpu",
    "tunix": "pip install google-tunix==0.1.7 jax==0.10.2 flax==0.12.8",
}


def chosen(known: dict[str, workload.Job]) -> dict[str, workload.Job]:
    """The cases of --cases.

    Raises:
      ValueError: a name that does not exist, or startup_again without the startup that fills its cache.
    """
    names = CASES.value or list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"--cases: no case is called {name!r}; there are {', '.join(known)}")
    if "startup_again" in names and "startup" not in names[: names.index("startup_again")]:
        raise ValueError("--cases: startup_again reads the cache that startup writes: put startup before it")
    return {name: known[name] for name in names}


def libraries() -> dict[str, str]:
    """Library -> its Python. Says how to install those that are left out.

    Raises:
      ValueError: a Python that is not there.
    """
    found = {OURS: sys.executable}
    for name, python in (("trl", TRL_PYTHON.value), ("tunix", TUNIX_PYTHON.value)):
        if not python:
            print(f"{name} is left out. To measure it: python -m venv venvs/{name}; venvs/{name}/bin/{INSTALL[name]}")
            print(f"  and then --{name}_python=venvs/{name}/bin/python")
        elif not Path(python).is_file():
            raise ValueError(f"--{name}_python: there is no {python}")
        else:
            found[name] = str(Path(python).absolute())
    return found


def run(job: workload.Job, library: str, python: str, cache: Path | None = None) -> dict:
    """Measures one job in a fresh process; {"error": ...} where that fails."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        command = [python, "-W", "ignore", "-m", f"launch.peers.{library}"]
        job = dataclasses.replace(job, folder=folder, started=time.time())
        try:
            process = subprocess.run(
                [*command, json.dumps(dataclasses.asdict(job)), str(output)],
                cwd=ROOT,
                env=environment(cache),
                capture_output=True,
                text=True,
                timeout=LIMIT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {LIMIT_SECONDS} s"}
        if process.returncode:
            return {"error": f"exit status {process.returncode}: {process.stderr.strip()[-2000:]}"}
        return json.loads(output.read_text())


def environment(cache: Path | None) -> dict[str, str]:
    """Equal for all: CPU, a number of threads, offline, and no compilation cache but the given one."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(THREADS.value))
    fixed = {
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    cached = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
    return {**ours, **threads, **fixed, **(cached if cache else {})}


def measure(name: str, job: workload.Job, pythons: dict[str, str], rounds: int, caches: Path) -> dict:
    """One case: {library: cell of the table}, the libraries taking turns."""
    parts: dict[str, list[dict]] = {library: [] for library in pythons}
    for number in range(rounds):
        for library, python in pythons.items():
            cache = caches / f"{library}-{number}" if job.kind == "startup" else None
            part = run(job, library, python, cache)
            if "error" not in part and job.kind == "startup":
                part["seconds"] = [part["start_to_first_repetition_seconds"]]
            parts[library].append(part)
            said = part.get("error") or f"{statistics.median(part['seconds']):.3f} s"
            print(f"{name:18} round {number + 1} of {rounds}  {library:8} {said}", flush=True)
    return {library: cell(results, job) for library, results in parts.items()}


def cell(parts: list[dict], job: workload.Job) -> dict:
    errors = [part["error"] for part in parts if "error" in part]
    if errors:
        return {"error": errors[0]}
    return {**workload.summary(parts, job.rows * job.completion_tokens), "versions": parts[0]["versions"]}


def matmul_gflops() -> float:
    """What the machine gives at the moment, in one large float32 product."""
    job = workload.Job("matmul", workload.TINY, 1, 1, 1, 1, warmup=3, repetitions=10, threads=THREADS.value)
    part = run(job, OURS, sys.executable)
    if "error" in part:
        raise ValueError(f"the matrix product failed: {part['error']}")
    return 2e-9 * workload.MATMUL_SIZE**3 / statistics.median(part["seconds"])


def machine() -> dict:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.machine(),
        "cores": os.cpu_count(),
        "threads": THREADS.value,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
    }


def table(cases: dict[str, dict]) -> str:
    """Markdown; the last two columns say how many times our seconds and our memory a library takes."""
    lines = [
        "| case | library | seconds, median (min-max) | CPU s | tokens/s | extra peak MiB | s / ours | MiB / ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, cells in cases.items():
        ours = cells[OURS]
        for library, values in cells.items():
            lines.append(f"| {name} | {library} | {' | '.join(columns(name, values, ours))} |")
    return "\n".join(lines)


def columns(name: str, values: dict, ours: dict) -> list[str]:
    if "error" in values:
        return [f"failed: {values['error'].splitlines()[-1][:100]}", *["-"] * 5]
    seconds, memory = values["median_seconds"], values["extra_peak_mib"]
    compared = values is not ours and "error" not in ours
    timed = [
        f"{seconds:.3f} ({values['min_seconds']:.3f}-{values['max_seconds']:.3f})",
        f"{values['median_cpu_seconds']:.2f}",
    ]
    slower = f"{seconds / ours['median_seconds']:.2f}" if compared else "-"
    if name.startswith("startup"):  # there the process as a whole is what one waits for
        return [timed[0], "-", "-", "-", slower, "-"]
    larger = f"{memory / ours['extra_peak_mib']:.2f}" if compared and ours["extra_peak_mib"] > 0 else "-"
    return [*timed, f"{values['tokens_per_second']:,.0f}", f"{memory:,.0f}", slower, larger]


def write(record: dict) -> Path:
    """Its own file, and a line of the history."""
    folder = Path(RESULTS.value)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"benchmark-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    with (folder / "benchmark-history.jsonl").open("a") as history:
        history.write(json.dumps(record) + "\n")
    return path


def benchmark() -> dict:
    known = workload.jobs(quick=QUICK.value, rows=ROWS.value, repetitions=REPETITIONS.value, threads=THREADS.value)
    todo, pythons = chosen(known), libraries()
    rounds = ROUNDS.value or (1 if QUICK.value else 3)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: THREADS.value])  # child processes inherit it
    facts = machine() | {"load_before": os.getloadavg()[0], "matmul_gflops_before": matmul_gflops()}
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    with tempfile.TemporaryDirectory() as caches:
        cases = {name: measure(name, job, pythons, rounds, Path(caches)) for name, job in todo.items()}
    return {
        "time": started,
        "quick": QUICK.value,
        "rounds": rounds,
        "machine": facts | {"load_after": os.getloadavg()[0], "matmul_gflops_after": matmul_gflops()},
        "shapes": {name: dataclasses.asdict(job) for name, job in todo.items()},
        "cases": cases,
    }


def versions(cases: dict[str, dict]) -> str:
    """One line a library."""
    found = {
        library: values["versions"]
        for cells in cases.values()
        for library, values in cells.items()
        if "versions" in values
    }
    return "\n".join(
        f"{library}: " + ", ".join(f"{k} {v}" for k, v in names.items()) for library, names in found.items()
    )


def busy_with_others(cases: dict[str, dict]) -> list[str]:
    """Cells that were measured while the machine did other work."""
    return [
        f"{name}/{library} ({values['others_cores']:.1f})"
        for name, cells in cases.items()
        for library, values in cells.items()
        if values.get("others_cores", 0) > QUIET_CORES
    ]


def main(argv):
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}: options are given as --name=value")
    try:
        record = benchmark()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    path, facts = write(record), record["machine"]
    print(f"\n{table(record['cases'])}\n")
    print(
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads used; float32 matrix product "
        f"{facts['matmul_gflops_before']:.0f} GFLOP/s before, {facts['matmul_gflops_after']:.0f} after"
    )
    print(versions(record["cases"]))
    print(f"written  {path}")
    if disturbed := busy_with_others(record["cases"]):
        print(f"warning: other processes kept more than {QUIET_CORES} cores busy during {', '.join(disturbed)}.")
        print("  Repeat these on a quiet machine: PyTorch's threads wait by spinning, so load multiplies TRL's seconds")
    if any("error" in values for cells in record["cases"].values() for values in cells.values()):
        sys.exit("error: some cases failed; the JSON has their messages")


if __name__ == "__main__":
    app.run(main)

"""What a rollout server on the other end of a loopback connection costs, and what asynchrony gives.

    python -m launch.benchmark_remote
    python -m launch.benchmark_remote --cases=generate,streams --rounds=9

Cases; all of them with one JAX server in a process of its own, on the same machine:
generate   the same batch sampled by the engine inside this process and by the server, in turn: what gRPC costs. Two
           processes sample at speeds some per cent apart, so the time outside the server's sampler is told by itself
streams    the same prompts as one request and as 100 requests at a time
staleness  a training run of the quick start with staleness 0 and 1, in turn

Seconds are medians over the rounds, without the first. Both ends share the cores; with --own_cores (Linux, taskset)
each has half of them, as on machines of their own. What the weights cost is the matter of launch.benchmark_weights.
"""

import contextlib
import os
import signal
import socket
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
from absl import app, flags

from configs import quickstart
from launch import build, cli, train, train_with_servers
from tapojax import policy
from tapojax.models import config_json, decoder, presets
from tapojax.rollout import delivery, local, remote
from tapojax.types import Prompts, Sampling

CASES = flags.DEFINE_list("cases", ["generate", "streams", "staleness"], "which, in this order")
ROUNDS = flags.DEFINE_integer("rounds", 7, "counted", lower_bound=1)
OWN_CORES = flags.DEFINE_bool("own_cores", False, "the server on one half of the cores, the trainer on the other")
STEPS = flags.DEFINE_integer("steps", 12, "of a run of the case staleness", lower_bound=3)


@contextlib.contextmanager
def served(model, *, max_prompt_tokens: int, max_tokens: int, metrics_port: int = 0) -> Iterator[str]:
    """The address of a JAX server for the model."""
    with tempfile.TemporaryDirectory() as folder:
        config_json.write_config(model, folder)
        command = [sys.executable, "-m", "launch.serve_rollouts", "--engine=jax", f"--model={folder}", "--port=0"]
        command += [f"--max_prompt_tokens={max_prompt_tokens}", f"--max_tokens={max_tokens}", "--dtype=float32"]
        command += [f"--metrics_port={metrics_port}"]
        if OWN_CORES.value:
            command = ["taskset", "-c", ",".join(str(core) for core in halves()[1]), *command]
        with train_with_servers.servers(command, 1, Path(folder)) as servers:
            yield servers[0].address


def halves() -> tuple[list[int], list[int]]:
    """The cores of this machine, for the trainer and for the server."""
    cores = range(os.cpu_count() or 1)
    return [*cores[: len(cores) // 2]], [*cores[len(cores) // 2 :]]


def connected(address: str, model, **options):
    score = policy.make_score(model, max_scored=delivery.PROBE_TOKENS)
    return remote.remote_engine(
        [address],
        model,
        max_prompt_tokens=32,
        probe=lambda *args: score(*args).logprobs,
        options=remote.Options(**{"weights_dtype": "float32"} | options),
    )


def in_turn(jobs: Mapping[str, Callable[..., object]]) -> dict[str, float]:
    """Median seconds of each, run one after the other in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for round_number in range(ROUNDS.value + 1):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            if round_number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def generation():
    """The model and the batch of the cases generate and streams: 100 prompts of 32, 2 completions of 64 tokens."""
    model = presets.PRESETS["gym-medium"]
    params = jax.jit(lambda: decoder.init(model, jax.random.key(0)))()
    prompts = Prompts([{"id": str(i)} for i in range(100)], [[2 + (i + j) % 49 for j in range(32)] for i in range(100)])
    how = dict(group_size=2, sampling=Sampling(64))
    return model, params, prompts, how


def generate():
    model, params, prompts, how = generation()
    how["finished"] = lambda row, tokens: None  # as a trainer asks that scores meanwhile
    here, port = local.local_engine(model, max_prompt_tokens=32), free_port()
    with served(model, max_prompt_tokens=32, max_tokens=64, metrics_port=port) as address:
        there = connected(address, model)
        weights = {"in process": (here, here.load(params, 0)), "over gRPC": (there, there.load(params, 0))}
        key = jax.random.key(1)
        jobs = {name: (lambda e=e, w=w: e.generate(w, prompts, key, **how)) for name, (e, w) in weights.items()}
        outside = []

        def over_grpc():
            before, started = sampling_seconds(port), time.perf_counter()
            jobs["over gRPC"]()
            took = time.perf_counter() - started
            outside.append(took - (sampling_seconds(port) - before))

        seconds = in_turn({"in process": jobs["in process"], "over gRPC": over_grpc})
        there.close()
    share, own = seconds["over gRPC"] / seconds["in process"] - 1, statistics.median(outside)
    print(
        f"generate  {seconds['in process']:.3f} s in process, {seconds['over gRPC']:.3f} s over gRPC: {share:+.1%}; "
        f"{own:.3f} s of it outside the server's sampler: {own / seconds['in process']:.1%}"
    )


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return asked.getsockname()[1]


def sampling_seconds(metrics_port: int) -> float:
    """How long the server's sampler has worked."""
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics") as page:
        (line,) = [
            line for line in page.read().decode().splitlines() if line.startswith("tapojax_sampling_seconds_total")
        ]
    return float(line.split()[1])


def streams():
    model, params, prompts, how = generation()
    how = how | {"sampling": Sampling(1)}  # sampling is next to nothing, so that the wire is what is timed
    with served(model, max_prompt_tokens=32, max_tokens=64) as address:
        engines = {
            "one request": connected(address, model),
            "100 requests": connected(address, model, prompts_per_request=1, requests_per_server=100),
        }
        jobs = {}
        for name, engine in engines.items():
            weights = engine.load(params, 0)
            jobs[name] = lambda e=engine, w=weights: e.generate(w, prompts, jax.random.key(1), **how)
        # one server has the weights of one trainer: each engine is measured by itself
        seconds = {name: in_turn({name: job})[name] for name, job in jobs.items()}
        for engine in engines.values():
            engine.close()
    each = (seconds["100 requests"] - seconds["one request"]) / 100 * 1000
    print(
        f"streams   {seconds['one request']:.3f} s as one request, {seconds['100 requests']:.3f} s as 100 at a time "
        f"({each:.1f} ms a request)"
    )


def staleness():
    """A step is timed as the difference between runs of --steps and of 2 steps."""
    config = quickstart.get_config()
    config.evaluation.every, config.task.evaluation_size = 0, 64
    config.sft.updates, config.sft.warmup_updates = 20, 5
    config.rollout.weights_dtype, config.train.correction = "float32", "token"
    model = build.model(config.model, build.problems(config).tokenizer)
    budgets = {key: config.sampling[key] for key in ("max_prompt_tokens", "max_tokens")}

    def run(lag: int, steps: int) -> float:
        config.asynchrony.staleness, config.steps = lag, steps
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
            train.train(config, Path(folder))
        return time.perf_counter() - started

    seconds: dict[int, list[float]] = {0: [], 1: []}
    with served(model, **budgets) as address:
        config.rollout.addresses = (address,)
        for round_number in range(ROUNDS.value + 1):
            for lag, values in seconds.items():
                step = (run(lag, STEPS.value) - run(lag, 2)) / (STEPS.value - 2)
                if round_number:
                    values.append(step)
    strict, ahead = (statistics.median(values) for values in seconds.values())
    print(f"staleness {strict:.3f} s a step with staleness 0, {ahead:.3f} s with 1: {strict / ahead:.2f} times as fast")


def main(argv):
    del argv
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are ended
    if OWN_CORES.value:
        os.sched_setaffinity(0, halves()[0])  # before XLA starts its threads
    cli.cache_compilations()
    for name in CASES.value:
        {"generate": generate, "streams": streams, "staleness": staleness}[name]()


if __name__ == "__main__":
    app.run(main)

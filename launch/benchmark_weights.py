"""How long new weights take to reach a rollout server: whole and as deltas, in one process and over gRPC on loopback.

    python -m launch.benchmark_weights
    python -m launch.benchmark_weights --preset=qwen2.5-1.5b --num_layers=28 --vocab_size=151936

Random params in the shape of a preset (matrices of its initializer_range, 0.02) take AdamW steps on random gradients.
Those have no direction, so the steps of a run are between the first one here, in which every element moves by the
whole learning rate, and the last, in which Adam's average of noise has become small. A delta holds what this changes
in the dtype that travels.

Columns: `publish` casts and renames on the device, `encode` finds the changes there, fetches the weights and takes
their checksums, once for all servers. `in process` is encoding and parsing the messages and receiving them, checksums
and all, without a network; `gRPC` is LoadWeights of a server in another process on this machine. Seconds are those of
the fastest repetition, without compilation. GB/s are of the whole model, 10^9 bytes, also where a delta brings it.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import optax

from tapojax import weight_sync
from tapojax.models import decoder, presets
from tapojax.models.config import DecoderConfig
from tapojax.rollout import serving
from tapojax.rollout.sampler import Description, Sampler
from tapojax.rpc import client, limits, security, server, telemetry, weights
from tapojax.rpc import tapojax_pb2 as pb
from tapojax.rpc import tapojax_pb2_grpc as pb_grpc

BOUNDS = limits.Limits()
COLUMNS = "transfer | changed | MB | of whole | publish s | encode s | in process s | GB/s | gRPC s | GB/s"


class Link(NamedTuple):
    """A way to a server: `load` takes an update there, `commit` makes the version loaded last the server's own."""

    load: Callable[[weight_sync.Update], Any]
    commit: Callable[[int], Any]


def in_process(shapes) -> Link:
    """Messages are encoded, parsed and received, and go nowhere."""
    held: dict[str, Any] = {"version": -1, "tensors": None, "staged": None}

    async def receive(update):
        async def chunks():
            for message in weight_sync.stream(update, chunk_bytes=BOUNDS.chunk_bytes):
                yield pb.WeightsChunk.FromString(message.SerializeToString())

        _, held["staged"], _ = await weights.receive(
            chunks(), held["tensors"], held["version"], shapes, max_bytes=BOUNDS.max_weight_bytes
        )

    return Link(
        load=lambda update: asyncio.run(receive(update)),
        commit=lambda version: held.update(version=version, tensors=held["staged"]),
    )


@contextlib.contextmanager
def over_grpc(shapes) -> Iterator[Link]:
    """A rollout server without a model, in a process of its own."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(shapes, theirs), daemon=True)
    process.start()
    try:
        with client.channel(f"127.0.0.1:{ours.recv()}", security=security.Security(), limits=BOUNDS) as channel:
            stub = pb_grpc.RolloutsStub(channel)
            yield Link(
                load=lambda update: stub.LoadWeights(
                    weight_sync.stream(update, chunk_bytes=BOUNDS.chunk_bytes), timeout=600
                ),
                commit=lambda version: stub.CommitWeights(pb.CommitRequest(version=version), timeout=600),
            )
    finally:
        process.terminate()
        process.join()


def serve(shapes, connection):
    """The other process: says its port and serves until it is ended."""

    async def nothing(*_):
        pass

    async def run():
        idle: list[Any] = [nothing] * (len(Sampler._fields) - 1)
        sampler = Sampler(Description("none", 1, 1, shapes), *idle)
        numbers = telemetry.telemetry()
        servicer = serving.Rollouts(sampler, limits=BOUNDS, telemetry=numbers)
        running = await server.start(
            [functools.partial(pb_grpc.add_RolloutsServicer_to_server, servicer)],
            ["tapojax.v1.Rollouts"],
            host="127.0.0.1",
            port=0,
            security=security.Security(),
            limits=BOUNDS,
            telemetry=numbers,
        )
        connection.send(running.port)
        await running.wait()

    asyncio.run(run())


def trained(config: DecoderConfig, learning_rate: float, steps: int) -> Iterator[Any]:
    """Params before the first step and after each one."""
    optimizer = optax.adamw(learning_rate)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, key):
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        grads = jax.tree.unflatten(tree, [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.jit(lambda: decoder.init(config, jax.random.key(0)))()
    state = jax.jit(optimizer.init)(params)
    yield params
    for number in range(steps):
        params, state = step(params, state, jax.random.key(number + 1))
        yield params


def seconds(work: Callable[[], Any], repetitions: int) -> float:
    """Of the fastest call, after one that may compile."""
    times = []
    for _ in range(repetitions + 1):
        began = time.perf_counter()
        jax.block_until_ready(work())
        times.append(time.perf_counter() - began)
    return min(times[1:])


def benchmark(config: DecoderConfig, args: argparse.Namespace) -> Iterator[list[str]]:
    """The cells of one row after another."""
    shapes, versions = weight_sync.shapes(config), itertools.count()
    with over_grpc(shapes) as wire:
        links = (in_process(shapes), wire)
        measure = functools.partial(measured, links=links, versions=versions, repetitions=args.repetitions)
        for learning_rate in args.learning_rates:
            previous = None
            for step, params in enumerate(trained(config, learning_rate, args.steps)):
                publish = functools.partial(weight_sync.publish, params, config, args.dtype)
                if step == 0 and learning_rate == args.learning_rates[0]:
                    yield ["whole", *measure(publish, None)]
                elif step in (1, args.steps):
                    yield [f"{learning_rate:g}, step {step}", *measure(publish, previous)]
                previous = publish()


def measured(publish, previous, *, links: Sequence[Link], versions: Iterator[int], repetitions: int) -> list[str]:
    """A row but for its name: the whole weights, or their delta against `previous`, which the servers get first."""
    bits, base = publish(), -1
    if previous is not None:
        base = next(versions)
        for link in links:
            link.load(weight_sync.encode(previous, version=base))
            link.commit(base)
    encode = functools.partial(weight_sync.encode, bits, previous, version=next(versions), base_version=base)
    ours, update = [seconds(publish, repetitions), seconds(encode, repetitions)], encode()
    theirs = [seconds(functools.partial(link.load, update), repetitions) for link in links]
    whole, size = sum(x.nbytes for x in bits.values()), sum(encoded.data.nbytes for encoded in update.tensors)
    changed = sum(int((x != previous[name]).sum()) for name, x in bits.items()) if previous else None
    return [
        "-" if changed is None else f"{changed / sum(x.size for x in bits.values()):.2%}",
        f"{size / 1e6:.1f}",
        f"{size / whole:.1%}",
        *(f"{x:.3f}" for x in ours),
        *(cell for x in theirs for cell in (f"{x:.3f}", f"{whole / x / 1e9:.2f}")),
    ]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch.benchmark_weights", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--preset", choices=sorted(presets.PRESETS), default="qwen2.5-0.5b")
    add("--num_layers", type=int, default=6)
    add("--vocab_size", type=int, default=32768)
    add("--dtype", choices=sorted(weight_sync.DTYPES.values()), default="bfloat16", help="that travels")
    add("--learning_rates", type=float, nargs="+", default=[1e-6, 1e-5])
    add("--steps", type=int, default=10, help="of AdamW; the first and the last are in the table")
    add("--repetitions", type=int, default=3, help="of each measurement")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None):
    args = parse(arguments)
    config = dataclasses.replace(
        presets.PRESETS[args.preset], num_layers=args.num_layers, vocab_size=args.vocab_size, param_dtype="float32"
    )
    count = sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))))
    print(f"{args.preset} with {args.num_layers} layers and {args.vocab_size} tokens: {count / 1e6:.0f} M parameters,")
    print(f"{args.dtype} on the wire; {jax.default_backend()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print(f"| {COLUMNS} |\n|{'---|' * len(COLUMNS.split('|'))}", flush=True)
    for row in benchmark(config, args):
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()

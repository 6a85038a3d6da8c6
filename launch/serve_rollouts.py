"""A rollout server: samples completions for trainers elsewhere, with vLLM on GPUs or with the embedded JAX sampler.

    python -m launch.serve_rollouts --engine=vllm --model=Qwen2.5-Math-1.5B --port=7777
    python -m launch.serve_rollouts --engine=jax --config=configs/quickstart.py --port=7777

The trainer names it in rollout.addresses and sends the weights: --model may be a folder with a config.json alone. A
vLLM server runs in an environment of its own, made by launch/make_vllm_env.sh, and needs no jax. A host that other
machines can reach takes TLS and a token. SIGTERM lets running requests finish, for at most --drain_s seconds.
"""

import argparse
import asyncio
import sys
from pathlib import Path

import grpc

from tapojax.rollout import serving
from tapojax.rollout.sampler import Sampler
from tapojax.rpc import limits, security, server, telemetry
from tapojax.rpc import tapojax_pb2_grpc as pb_grpc

SERVICE = "tapojax.v1.Rollouts"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch.serve_rollouts", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--engine", choices=["vllm", "jax"], required=True)
    add("--model", default="", help="folder of the model; its config.json is enough")
    add("--config", default="", help="jax: a file of configs/ instead of --model; gives the budgets too")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=7777, help="0: any free one")
    add("--metrics_port", type=int, default=0, help="Prometheus on loopback; 0: off")
    for name in ("token", "certificate", "key", "authority"):
        add(f"--{name}_file", default="", help="of this server; authority: who signs clients, for mutual TLS")
    add("--max_prompt_tokens", type=int, default=1024)
    add("--max_tokens", type=int, default=3072, help="of a completion")
    add("--dtype", default="", help="of weights and activations: bfloat16, float32; empty: the model's")
    add("--weights_root", default="", help="folder that trainers with rollout.shared_folder write to")
    add("--max_weight_gib", type=float, default=200.0, help="of one version of the weights")
    add("--drain_s", type=float, default=600.0)
    add("--reward_addresses", default="", help="host:port,...: score completions there before they are sent")
    add("--reward_deadline_s", type=float, default=60.0, help="of one try at a reward server; a judge may need more")
    add("--reward_retries", type=int, default=3, help="at reward servers, before rows go without a score")
    add("--tokenizer", default="", help="with --reward_addresses: a folder, or gym; empty: --model")
    add("--max_num_seqs", type=int, default=256, help="vllm: rows at a time")
    add("--gpu_memory_utilization", type=float, default=0.9, help="vllm")
    add("--kv_cache_mib", type=int, default=0, help="vllm: instead of --gpu_memory_utilization; needed on CPU")
    add("--tensor_parallel_size", type=int, default=1, help="vllm: GPUs of one model")
    add("--enforce_eager", action="store_true", help="vllm: no CUDA graphs")
    return parser.parse_args(arguments)


async def serve(args: argparse.Namespace):
    """Listens until a signal comes."""
    files = {name: getattr(args, name) for name in ("token_file", "certificate_file", "key_file", "authority_file")}
    secrets = security.load_security(**files)
    security.check_bind(args.host, secrets)  # before a model is loaded for nothing
    numbers = telemetry.telemetry()
    bounds = limits.Limits(max_weight_bytes=int(args.max_weight_gib * 2**30))
    scorer, channels = score_through(args, secrets)
    sampler = await make_sampler(args)
    servicer = serving.Rollouts(
        sampler,
        limits=bounds,
        telemetry=numbers,
        scorer=scorer,
        score_channels=channels,
        weights_root=Path(args.weights_root) if args.weights_root else None,
    )
    running = await server.start(
        [lambda grpc_server: pb_grpc.add_RolloutsServicer_to_server(servicer, grpc_server)],
        [SERVICE],
        host=args.host,
        port=args.port,
        security=secrets,
        limits=bounds,
        telemetry=numbers,
    )
    stop_metrics = telemetry.serve_metrics(numbers, port=args.metrics_port)
    print(f"listening on {args.host}:{running.port}", flush=True)
    try:
        await until_broken_or_told(servicer, running, args.drain_s)
    finally:
        await servicer.close()
        stop_metrics()


async def until_broken_or_told(servicer: serving.Rollouts, running: server.Running, drain_s: float):
    """Raises RuntimeError when the sampler cannot go on: whoever watches the process starts it anew."""
    told = asyncio.create_task(server.until_signal(running, seconds=drain_s))
    broken = asyncio.create_task(servicer.broken.wait())
    await asyncio.wait([told, broken], return_when=asyncio.FIRST_COMPLETED)
    if told.done():
        return await told
    told.cancel()
    await running.drain(1.0)
    raise RuntimeError("the sampler is broken, see the log above: start the server again")


async def make_sampler(args: argparse.Namespace) -> Sampler:
    """The engine that was asked for; each imports what only it needs."""
    if args.engine == "jax":
        return jax_sampler(args)
    if not args.model or args.config:
        raise ValueError("--engine=vllm takes --model=FOLDER, whose config.json says the architecture, and no --config")
    try:
        from tapojax.rollout import vllm_engine
    except ImportError as error:
        raise ValueError(f"no vLLM here ({error}): make its environment with launch/make_vllm_env.sh") from error

    return await vllm_engine.vllm_sampler(
        model=args.model,
        max_prompt_tokens=args.max_prompt_tokens,
        max_tokens=args.max_tokens,
        dtype=args.dtype or "auto",
        max_num_seqs=args.max_num_seqs,
        gpu_memory_utilization=args.gpu_memory_utilization,
        kv_cache_bytes=args.kv_cache_mib * 2**20 or None,
        tensor_parallel_size=args.tensor_parallel_size,
        enforce_eager=args.enforce_eager,
    )


def jax_sampler(args: argparse.Namespace) -> Sampler:
    """The embedded sampler, for the model of a folder or of a config."""
    if bool(args.model) == bool(args.config):
        raise ValueError(f"--engine=jax with --model={args.model!r} --config={args.config!r}: give one of them")
    import dataclasses

    from tapojax.models import config_json
    from tapojax.rollout import jax_sampler

    if args.config:
        from launch import build, cli

        config = cli.load_config(args.config)
        model = build.model(config.model, build.problems(config).tokenizer)
        dtype = args.dtype or config.sampling.dtype
        budgets = {key: config.sampling[key] for key in ("max_prompt_tokens", "max_tokens")}
    else:
        model, dtype = config_json.read_config(args.model), args.dtype or None
        budgets = {"max_prompt_tokens": args.max_prompt_tokens, "max_tokens": args.max_tokens}
    if args.dtype:
        model = dataclasses.replace(model, dtype=args.dtype)
    return jax_sampler.jax_sampler(model, dtype=dtype, **budgets)


def score_through(args: argparse.Namespace, secrets: security.Security):
    """A scorer that asks reward servers, and the channels they give; (None, ()) where none are named."""
    if not args.reward_addresses:
        return None, ()
    from tapojax.rewards import remote

    tokenizer = load_tokenizer(args.tokenizer or args.model)
    addresses = args.reward_addresses.split(",")
    if secrets.authority is None:  # without it there is nothing to show one's certificate for
        secrets = secrets._replace(certificate=None, key=None)
    score = remote.remote_score(
        addresses, security=secrets, deadline_s=args.reward_deadline_s, retries=args.reward_retries
    )
    channels = remote.describe(addresses, security=secrets).channels

    async def scorer(examples, completions):
        texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in completions]
        try:
            return await asyncio.to_thread(score, examples, texts)
        except ConnectionError as error:
            raise server.Refused(grpc.StatusCode.UNAVAILABLE, str(error)) from error

    return scorer, channels


def load_tokenizer(name: str):
    """The gym's, or that of a folder.

    Raises:
      ValueError: no name was given.
    """
    if name == "gym":
        from tapojax.tasks import gym_tokenizer

        return gym_tokenizer.TOKENIZER
    if not name:
        raise ValueError("--reward_addresses takes a tokenizer to read completions: pass --tokenizer=FOLDER, or gym")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


if __name__ == "__main__":
    telemetry.log_json()
    try:
        asyncio.run(serve(parse(sys.argv[1:])))
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")

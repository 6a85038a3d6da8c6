"""vLLM behind a rollout server: the same coroutines as the JAX sampler's, around vLLM's AsyncLLM.

Only the vllm_*.py files know vLLM. They run in its own environment (launch/make_vllm_env.sh), which has no jax. Prompts
and completions are token ids; no tokenizer is loaded. Here vLLM is started, paused and given weights; `vllm_requests`
samples; `vllm_plugin` is what vLLM loads into its own processes.

vLLM is paused in its mode "keep" alone, which freezes requests and queues new ones in all versions; those that wait
or end are ours. A load is one call to the workers: vLLM's weight-transfer sessions of several calls would have no
weights in between, and no way back to the old ones.
"""

import asyncio
import functools
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Awaitable, Mapping
from pathlib import Path
from typing import Any

try:
    import safetensors.torch
    import torch
    import transformers
    import vllm
except ImportError as error:
    raise ImportError(f"{error}: run this with the python of an environment made by launch/make_vllm_env.sh") from error
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM

from tapojax.rollout import vllm_plugin, vllm_requests
from tapojax.rollout.sampler import Broken, Description, Sampler, Tensor

VERSIONS = ("0.32", "0.33")
FAMILIES = ("qwen2", "qwen3", "llama")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CALL_SECONDS = 300.0  # for what vLLM answers at once or, loading weights, in seconds; sampling ends with its caller
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",  # nothing is reported to anybody
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a forked gRPC server would hang
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # on CPU: does not take cores for its own
}


async def vllm_sampler(
    model: str,
    *,
    max_prompt_tokens: int,
    max_tokens: int,
    dtype: str = "auto",
    max_num_seqs: int = 256,
    gpu_memory_utilization: float = 0.9,
    kv_cache_bytes: int | None = None,
    tensor_parallel_size: int = 1,
    enforce_eager: bool = False,
    seed: int = 0,
) -> Sampler:
    """Starts vLLM and its worker processes; takes 20 seconds on CPU and minutes for a large model.

    The same request gives the same completions (same prompts, sampling and key) as far as vLLM's own arithmetic does:
    always on CPU in float32; on GPU a different batch may round differently.

    Log-probs of filtered or heated samples are those of the distribution really sampled from. Their base log-probs, at
    temperature 1, are a second pass over the finished rows, and NaN for tokens of weights that are no longer loaded.

    Args:
      model: a folder with config.json. Without safetensors in it the weights are random until `load`.
      dtype: of weights and activations; auto is the one in config.json.
      max_num_seqs: completions that are sampled at a time; more wait.
      gpu_memory_utilization: part of the GPU's memory for weights and cache. Log-probs of long rows come on top.
      kv_cache_bytes: size of the cache, instead of what gpu_memory_utilization leaves; on CPU 1 GiB if None.
      enforce_eager: no compilation and no CUDA graphs: starts sooner, samples slower. Always so on CPU.

    Raises:
      ValueError: another version of vLLM, no model or one of another family, or arguments that vLLM refuses.
    """
    if not vllm.__version__.startswith(tuple(f"{version}." for version in VERSIONS)):
        raise ValueError(
            f"vLLM {vllm.__version__} is installed, tapojax works with {' and '.join(VERSIONS)}: make the environment "
            "with launch/make_vllm_env.sh"
        )
    if not (Path(model) / "config.json").is_file():  # vLLM would look for it in the Hub
        raise ValueError(f"{model}/config.json is missing: name the folder of a model")
    config = transformers.AutoConfig.from_pretrained(model)
    description = Description(f"vllm {vllm.__version__}", max_prompt_tokens, max_tokens, _shapes(config))
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    on_cpu = current_platform.is_cpu()
    trained = any(Path(model).glob("*.safetensors"))
    arguments = AsyncEngineArgs(
        model=model,
        load_format="auto" if trained else "dummy",
        skip_tokenizer_init=True,
        generation_config="vllm",
        dtype=dtype,
        max_model_len=max_prompt_tokens + max_tokens + 1,  # a pass over a whole row samples one token more
        max_num_seqs=max_num_seqs,
        gpu_memory_utilization=gpu_memory_utilization,
        kv_cache_memory_bytes=1 << 30 if kv_cache_bytes is None and on_cpu else kv_cache_bytes,
        tensor_parallel_size=tensor_parallel_size,
        enforce_eager=enforce_eager or on_cpu,
        # a prompt cut over two steps makes vLLM turn back the request's generator, which ends it on CPU
        enable_chunked_prefill=False if on_cpu else None,
        seed=seed,
        logprobs_mode="processed_logprobs",
        logits_processors=[f"{vllm_plugin.__name__}:{vllm_plugin.AdaptiveTemperature.__name__}"],
        worker_extension_cls=f"{vllm_plugin.__name__}.{vllm_plugin.WeightsFile.__name__}",
        disable_log_stats=True,
    )
    llm = AsyncLLM.from_engine_args(arguments)
    await _answer("update_weight_version", llm.update_weight_version("-1"))
    engine = vllm_requests.Engine(llm, description, config.vocab_size)
    engine.unpaused.set()
    bind = functools.partial
    return Sampler(
        description,
        generate=bind(vllm_requests.generate, engine),
        logprobs=bind(vllm_requests.logprobs, engine),
        load=bind(_load, engine),
        pause=bind(_pause, engine),
        resume=bind(_resume, engine),
        close=bind(_close, engine),
    )


def _shapes(config: transformers.PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a checkpoint of this config."""
    if config.model_type not in FAMILIES:
        raise ValueError(f"model_type={config.model_type!r} is not supported: choose one of {', '.join(FAMILIES)}")
    with torch.device("meta"):
        tensors = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if name not in tied}


async def _load(engine: vllm_requests.Engine, tensors: Mapping[str, Tensor], version: int):
    _check_tensors(engine.description.tensors, tensors)
    # whoever waits for it may give up, a swap that has begun is finished
    await asyncio.shield(asyncio.ensure_future(_swap(engine, tensors, version)))


async def _swap(engine: vllm_requests.Engine, tensors: Mapping[str, Tensor], version: int):
    """Frozen requests lose their part of the cache and compute it again under the new weights."""
    llm, rpc = engine.llm, engine.llm.collective_rpc
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    async with engine.swapping:
        vllm_requests.check_whole(engine)
        with tempfile.TemporaryDirectory(prefix="tapojax-", dir=_roomy(tensors)) as folder:
            path = os.path.join(folder, "weights.safetensors")
            await asyncio.to_thread(_write, path, tensors)
            await _answer("check_weights_file", rpc("check_weights_file", args=(path, shapes)))
            try:
                await _answer("pause_generation", llm.pause_generation(mode="keep", clear_cache=True))
                await _answer("load_weights_file", rpc("load_weights_file", args=(path,)))
                await _answer("update_weight_version", llm.update_weight_version(str(version)))
                if engine.unpaused.is_set():
                    await _answer("resume_generation", llm.resume_generation())
            except Exception as error:
                engine.broken = f"loading version {version} failed half way, restart the server: {error}"
                engine.unpaused.set()
                for task in engine.running:
                    task.cancel()
                raise Broken(engine.broken) from error


def _check_tensors(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]):
    """Raises ValueError unless these are exactly the model's tensors."""
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    for name, (dtype, shape, data) in tensors.items():
        if tuple(shape) != expected.get(name):
            problems.append(f"{name} {tuple(shape)} (the model's: {expected.get(name)})")
        elif dtype not in DTYPES or memoryview(data).nbytes != math.prod(shape) * DTYPES[dtype].itemsize:
            problems.append(f"{name} of {memoryview(data).nbytes} bytes in {dtype} (allowed: {', '.join(DTYPES)})")
    if problems:
        raise ValueError(f"{len(problems)} tensors do not fit the model: {'; '.join(sorted(problems)[:4])}")


def _roomy(tensors: Mapping[str, Tensor]) -> str:
    """Memory if it has room (containers often give little), else the disk."""
    size = sum(memoryview(tensor.data).nbytes for tensor in tensors.values())
    memory = "/dev/shm"
    return memory if os.path.isdir(memory) and shutil.disk_usage(memory).free > 1.1 * size else tempfile.gettempdir()


def _write(path: str, tensors: Mapping[str, Tensor]):
    warnings.filterwarnings("ignore", message="The given buffer is not writable")  # it is only read
    views = {
        name: torch.frombuffer(data, dtype=DTYPES[dtype]).view(shape) for name, (dtype, shape, data) in tensors.items()
    }
    safetensors.torch.save_file(views, path)


async def _pause(engine: vllm_requests.Engine, mode: str):
    if mode not in ("keep", "wait", "abort"):
        raise ValueError(f"pause mode {mode!r}: say keep, wait or abort")
    engine.unpaused.clear()
    if mode == "abort":
        await vllm_requests.end(list(engine.running))
    elif mode == "wait" and engine.running:
        await asyncio.wait(engine.running)
    async with engine.swapping:
        if not engine.unpaused.is_set():  # resumed while it waited
            await _answer("pause_generation", engine.llm.pause_generation(mode="keep", clear_cache=False))


async def _resume(engine: vllm_requests.Engine):
    async with engine.swapping:
        await _answer("resume_generation", engine.llm.resume_generation())
        engine.unpaused.set()


async def _close(engine: vllm_requests.Engine):
    await vllm_requests.end(list(engine.running))
    engine.llm.shutdown()  # not in a thread: its own listener would see the engine go and call that an error


async def _answer(what: str, call: Awaitable[Any]) -> Any:
    """What vLLM answers, but not for ever."""
    try:
        return await asyncio.wait_for(call, CALL_SECONDS)
    except TimeoutError:
        raise TimeoutError(f"vLLM did not answer {what} in {CALL_SECONDS:.0f} s: restart the server") from None

"""Runs inside vLLM's environment: scenarios around one real engine, called by the tests of the main environment.

    python worker.py MODEL_FOLDER OPTIONS_AS_JSON

One line of JSON comes in, {"scenario": ..., **arguments}, and one goes out, {"result": ...} or {"error": traceback}.
"""

import asyncio
import contextlib
import json
import os
import sys
import traceback
from types import SimpleNamespace

import psutil
import safetensors
import torch
import transformers
import vllm

from tapojax.rollout import vllm_engine, vllm_plugin
from tapojax.rollout.sampler import Sampler, Tensor
from tapojax.rpc import tapojax_pb2 as pb

LIMIT_S = 500


def request(*, prompts, **options) -> pb.GenerateRequest:
    """`prompts` is {index: tokens}; the other options are fields of GenerateRequest and Sampling."""
    sampling = dict(max_tokens=16, temperature=1.0, top_p=1.0) | options.pop("sampling", {})
    sampling["adaptive"] = (
        adaptive and pb.AdaptiveTemperature(**adaptive) if (adaptive := sampling.get("adaptive")) else None
    )
    return pb.GenerateRequest(
        prompts=[pb.Prompt(index=int(index), tokens=tokens) for index, tokens in prompts.items()],
        sampling=pb.Sampling(**sampling),
        **{"group_size": 2, "key": [7, 11]} | options,
    )


async def sampled(sampler: Sampler, given: pb.GenerateRequest) -> dict:
    """{index of the prompt: [sample as a dictionary, ...]}"""
    groups = {}
    async with asyncio.timeout(LIMIT_S), contextlib.aclosing(sampler.generate(given)) as stream:
        async for index, samples in stream:
            assert index not in groups
            groups[index] = [sample._asdict() for sample in samples]
    return groups


def read(path: str) -> dict[str, Tensor]:
    """A safetensors file as the wire gives it."""
    with safetensors.safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    return {
        name: Tensor(
            str(x.dtype).removeprefix("torch."), tuple(x.shape), x.view(-1).view(torch.uint8).numpy().tobytes()
        )
        for name, x in tensors.items()
    }


async def refusal(call) -> str:
    """What the ValueError says."""
    try:
        await call
    except ValueError as error:
        return str(error)
    raise AssertionError("not refused")


# ---- scenarios


async def describe(sampler):
    return sampler.description._asdict()


async def load(sampler, path, version):
    await asyncio.wait_for(sampler.load(read(path), version), LIMIT_S)


async def generate(sampler, **options):
    return await sampled(sampler, request(**options))


async def generate_together(sampler, requests):
    """All in one batch of vLLM."""
    return await asyncio.gather(*(sampled(sampler, request(**options)) for options in requests))


async def logprobs(sampler, rows):
    return await asyncio.wait_for(sampler.logprobs(rows), LIMIT_S)


async def refuse_requests(sampler, requests):
    return [await refusal(sampled(sampler, request(**options))) for options in requests]


async def refuse_rows(sampler, rows):
    return [await refusal(sampler.logprobs([row])) for row in rows]


async def refuse_tensors(sampler, path, change):
    """A load whose tensors were changed."""
    tensors = read(path)
    name = sorted(tensors)[0]
    dtype, shape, data = tensors[name]
    if change == "missing":
        del tensors[name]
    elif change == "unexpected":
        tensors["extra"] = tensors[name]
    elif change == "shape":
        tensors[name] = Tensor(dtype, shape[::-1], data)
    elif change == "bytes":
        tensors[name] = Tensor(dtype, shape, data[:-1])
    return await refusal(sampler.load(tensors, 99))


async def refuse_partial_file(sampler, path):
    """The file that the workers read lacks a tensor: a disk that lost it, say."""
    whole = vllm_engine._write
    try:
        vllm_engine._write = lambda path, tensors: whole(path, dict(list(tensors.items())[1:]))
        await sampler.load(read(path), 99)
    except Exception as error:
        return str(error)
    finally:
        vllm_engine._write = whole
    raise AssertionError("not refused")


async def load_in_flight(sampler, before, after, paused=False, **options):
    """Weights change under running requests; again until at least one completion has tokens of both versions.

    With `paused`, requests are frozen by a pause first, and carry on after it.
    """
    for attempt in range(8):
        await load(sampler, before, 1)
        running = asyncio.ensure_future(sampled(sampler, request(**options)))
        await asyncio.sleep(0.2 * (attempt + 1))
        if paused:
            await sampler.pause("keep")
        await load(sampler, after, 2)
        if paused:
            await asyncio.sleep(0.2)
            await sampler.resume()
        groups = await running
        if any(len(sample["versions"]) == 2 for group in groups.values() for sample in group):
            return groups
    raise AssertionError("no completion was running when the weights changed")


async def load_while_paused(sampler, path, **options):
    await sampler.pause("keep")
    running = asyncio.ensure_future(sampled(sampler, request(**options)))
    await asyncio.sleep(0.3)
    await load(sampler, path, 5)
    await asyncio.sleep(0.3)
    waiting = not running.done()
    await sampler.resume()
    return {"waiting": waiting, "groups": await running}


async def pause_wait(sampler, **options):
    running = asyncio.ensure_future(sampled(sampler, request(**options)))
    await asyncio.sleep(0.2)
    await asyncio.wait_for(sampler.pause("wait"), LIMIT_S)
    drained = all(task.done() for task in sampler.close.args[0].running)
    late = asyncio.ensure_future(sampled(sampler, request(**options)))
    await asyncio.sleep(0.3)
    waiting = not late.done()
    await sampler.resume()
    return {"drained": drained, "waiting": waiting, "same": await running == await late}


async def pause_abort(sampler, **options):
    running = asyncio.ensure_future(sampled(sampler, request(**options)))
    await asyncio.sleep(0.3)
    await asyncio.wait_for(sampler.pause("abort"), LIMIT_S)
    await asyncio.wait([running], timeout=LIMIT_S)
    await sampler.resume()
    return {"cancelled": running.cancelled(), "unfinished": await unfinished(sampler)}


async def unfinished(sampler) -> int:
    """Requests in vLLM's engine process, after it had time to hear of their end."""
    await asyncio.sleep(0.3)
    return sampler.close.args[0].llm.get_num_unfinished_requests()


async def close_early(sampler, **options):
    """The iterator is closed after the first group."""
    stream = sampler.generate(request(**options))
    index, _ = await anext(stream)
    before = sampler.close.args[0].llm.get_num_unfinished_requests()
    await asyncio.wait_for(stream.aclose(), LIMIT_S)
    return {"first": index, "before": before, "unfinished": await unfinished(sampler)}


async def cancel(sampler, **options):
    """The task that iterates is cancelled: a client that is gone."""
    running = asyncio.ensure_future(sampled(sampler, request(**options)))
    await asyncio.sleep(0.3)
    before = sampler.close.args[0].llm.get_num_unfinished_requests()
    running.cancel()
    await asyncio.wait([running], timeout=LIMIT_S)
    return {"cancelled": running.cancelled(), "before": before, "unfinished": await unfinished(sampler)}


async def swap_outlives_its_caller(sampler, path):
    engine = sampler.close.args[0]
    loading = asyncio.ensure_future(sampler.load(read(path), 8))
    while not engine.swapping.locked():
        await asyncio.sleep(0)
    loading.cancel()
    async with engine.swapping:
        return {"cancelled": loading.cancelled() or loading.cancelling() > 0, "paused": await engine.llm.is_paused()}


async def fail_half_way(sampler, path, **options):
    """Loading breaks after the old weights are gone: nothing may be sampled from what is left."""
    engine = sampler.close.args[0]
    rpc = engine.llm.collective_rpc

    async def breaking(method, *args, **kwargs):
        if method == "load_weights_file":
            raise RuntimeError("the worker's own words")
        return await rpc(method, *args, **kwargs)

    engine.llm.collective_rpc = breaking
    running = asyncio.ensure_future(sampled(sampler, request(**options)))
    await asyncio.sleep(0.3)
    calls = {"load": sampler.load(read(path), 9), "running": running}
    calls |= {"generate": sampled(sampler, request(**options)), "logprobs": sampler.logprobs([[1, 2]])}
    said = {}
    for name, call in calls.items():
        try:
            await asyncio.wait_for(call, LIMIT_S)
        except RuntimeError as error:
            said[name] = str(error)
    del engine.llm.collective_rpc
    engine.broken = ""
    await sampler.resume()
    return said


async def outlive_the_core(sampler, **options):
    """vLLM's own process dies under a request."""
    running = asyncio.ensure_future(sampled(sampler, request(**options)))
    await asyncio.sleep(0.5)
    for process in psutil.Process().children(recursive=True):
        if "EngineCore" in process.name() or "EngineCore" in " ".join(process.cmdline()):
            process.kill()
    said = []
    for call in (running, sampled(sampler, request(**options))):
        try:
            await asyncio.wait_for(call, LIMIT_S)
        except Exception as error:
            said.append(type(error).__name__)
    return said


async def wrong_version(sampler, model):
    vllm.__version__, version = "0.31.2", vllm.__version__
    try:
        return await refusal(vllm_engine.vllm_sampler(model, max_prompt_tokens=8, max_tokens=8))
    finally:
        vllm.__version__ = version


async def checkpoint_shapes(sampler, folder):
    return vllm_engine._shapes(transformers.AutoConfig.from_pretrained(folder))


async def temperature_factors(sampler, logits, settings):
    """`settings` once for all rows."""
    logits = torch.tensor(logits)
    return vllm_plugin.temperature_factor(logits, torch.tensor(settings).expand(len(logits), -1)).tolist()


def _processor():
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=8))
    return vllm_plugin.AdaptiveTemperature(config, SimpleNamespace())


def _params(settings):
    extra = settings and {vllm_plugin.ARGUMENT: vllm_plugin.Settings(*settings)._asdict()}
    return vllm.SamplingParams(temperature=settings[0] if settings else 1.0, extra_args=extra)


async def second_runner(sampler, logits, settings, slots):
    """The interface of vLLM's second model runner: rows of `logits` are the requests in `slots`, settings by slot."""
    processor = _processor()
    used = {slot: processor.add_request(int(slot), _params(given)) for slot, given in settings.items()}
    context = SimpleNamespace(expanded_idx_mapping=torch.tensor(slots))
    return {"used": used, "logits": processor.apply(torch.tensor(logits), context).tolist()}


async def first_runner(sampler, logits, updates):
    """The interface of the first: batches change, then all rows of `logits` are scaled. Settings by row."""
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    processor = _processor()
    for update in updates:
        moved = [(a, b, MoveDirectionality[direction]) for a, b, direction in update.get("moved", [])]
        added = [(row, _params(given), None, []) for row, given in update.get("added", [])]
        processor.update_state(BatchUpdate(8, removed=update.get("removed", []), added=added, moved=moved))
        processor.update_state(None)
    return {
        "logits": processor.apply(torch.tensor(logits)).tolist(),
        "changes_greedy": not processor.is_argmax_invariant(),
    }


async def refuse_settings(sampler, temperature, settings):
    params = vllm.SamplingParams(temperature=temperature, extra_args={vllm_plugin.ARGUMENT: settings})

    async def validate():
        vllm_plugin.AdaptiveTemperature.validate_params(params)

    return await refusal(validate())


async def main():
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever vLLM prints goes to stderr
    folder, options = sys.argv[1], json.loads(sys.argv[2])
    sampler = await vllm_engine.vllm_sampler(folder, **options)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        arguments = json.loads(line)
        try:
            reply = {"result": await globals()[arguments.pop("scenario")](sampler, **arguments)}
        except BaseException:
            reply = {"error": traceback.format_exc()}
        print(json.dumps(reply), file=replies, flush=True)
    await sampler.close()


if __name__ == "__main__":
    asyncio.run(main())

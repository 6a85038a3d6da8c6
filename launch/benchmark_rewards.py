"""What scoring rows while others are sampled saves: the wall time of a step's collect, streaming against batch-after.

    python -m launch.benchmark_rewards
    python -m launch.benchmark_rewards --row_s=0.2 --at_a_time=8 --rounds=9

The judge is a score function that sleeps --row_s seconds for each row, --at_a_time rows at a time, as an endpoint with
so many slots does. 128 completions in groups of 8 end at random, half of them within 31 tokens, one in ten after 83 and
some at the budget of 128. Engines: the embedded sampler, which says each 32 tokens which rows have ended, and a JAX
rollout server in a process of its own. It hands out whole groups, most of which wait for a long row, so it is asked for
4 of the 16 prompts at a time, one request after the other.

Seconds are medians over the rounds, batch-after and streaming in turn, without the first round. `judge` is what the
judge takes for all rows at best; `waited` is the time from the last completion to the last score, a part of `step`.
"""

import itertools
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from absl import app, flags

from launch import benchmark_remote, cli
from tapojax.algorithms.grpo import grpo
from tapojax.models import decoder, presets
from tapojax.rewards import loop
from tapojax.rollout import collect, local
from tapojax.tasks import gym_tokenizer
from tapojax.types import Sampling, Task

ROW_S = flags.DEFINE_float("row_s", 0.1, "of the judge, for one row", lower_bound=0.0)
AT_A_TIME = flags.DEFINE_integer("at_a_time", 16, "rows that the judge takes", lower_bound=1)
flags.set_default(benchmark_remote.ROUNDS, 5)

PROMPTS, GROUP_SIZE, PROMPT_TOKENS, MAX_TOKENS = 16, 8, 32, 128
STOP = (0, 1)  # of about 50 tokens that random parameters draw


def slow_task(judge: ThreadPoolExecutor) -> Task:
    """A task whose rows are scored by the judge's slots, and all right."""

    def score(examples, completions):
        list(judge.map(lambda _: time.sleep(ROW_S.value), completions))
        return {"correct": np.ones(len(completions), np.float32)}, [None] * len(completions)

    def prompt(example):
        return [2 + (example["id"] + j) % 40 for j in range(PROMPT_TOKENS)]

    return Task(gym_tokenizer.TOKENIZER, [], [], prompt, score, lambda text: text)


def measure(name: str, engine, weights, task: Task):
    """Prints one line of the table."""
    batch = [{"id": place, "problem": "", "answer": ""} for place in range(PROMPTS)]
    waited: dict[bool, list[float]] = {False: [], True: []}

    def step(overlap: bool):
        part = collect.collect(
            engine,
            weights,
            itertools.repeat(batch),
            task,
            grpo(group_size=GROUP_SIZE),
            Sampling(MAX_TOKENS, stop_token_ids=STOP),
            step=0,
            key=jax.random.key(1),
            reward=loop.Options(overlap=overlap),
        )
        waited[overlap].append(part.seconds["reward"])

    jobs = {"after": lambda: step(False), "streaming": lambda: step(True)}
    seconds = benchmark_remote.in_turn(jobs)
    judge = PROMPTS * GROUP_SIZE * ROW_S.value / AT_A_TIME.value
    after, streaming = seconds["after"], seconds["streaming"]
    waits = [float(np.median(waited[overlap][1:])) for overlap in (False, True)]
    numbers = (judge, after, waits[0], streaming, waits[1])
    print(f"{name:<20}" + "".join(f"{x:>10.2f}" for x in numbers) + f"{after / streaming:>9.2f}x", flush=True)


def main(argv):
    del argv
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is ended
    cli.cache_compilations()
    model = presets.PRESETS["gym-small"]
    params = jax.jit(lambda: decoder.init(model, jax.random.key(0)))()
    print(f"{'seconds':<20}{'':>10}{'batch-after':>20}{'streaming':>20}")
    print(f"{'engine':<20}{'judge':>10}" + f"{'step':>10}{'waited':>10}" * 2 + f"{'faster':>10}")
    with ThreadPoolExecutor(AT_A_TIME.value) as judge:
        here, task = local.local_engine(model, max_prompt_tokens=PROMPT_TOKENS), slow_task(judge)
        measure("embedded", here, here.load(params, 0), task)
        with benchmark_remote.served(model, max_prompt_tokens=PROMPT_TOKENS, max_tokens=MAX_TOKENS) as address:
            there = benchmark_remote.connected(address, model, prompts_per_request=4)
            measure("JAX rollout server", there, there.load(params, 0), task)
            there.close()


if __name__ == "__main__":
    app.run(main)

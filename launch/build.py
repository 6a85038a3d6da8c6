"""From a config to the values a run is made of. Each function takes one section, so that every key has one reader."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import base
from launch import sections
from tapojax import asynchrony, checkpoint, correction, metrics, policy, recording, sharding, train_step
from tapojax.algorithms import ALGORITHMS
from tapojax.judges import EMBEDDED, JUDGES, PLACES, answer, critic, judged
from tapojax.models import config_json, decoder, huggingface, presets
from tapojax.models.config import DecoderConfig
from tapojax.rewards import loop
from tapojax.rewards import remote as rewards
from tapojax.rollout import delivery, local, remote
from tapojax.rollout.collect import Collected
from tapojax.rpc import security
from tapojax.tasks import TASKS, order
from tapojax.types import Algorithm, Engine, Sampling, Task


class Setup(NamedTuple):
    """What a run is made of, all of it fixed by the config."""

    mesh: Mesh
    task: Task
    algorithm: Algorithm
    model: DecoderConfig
    optimizer: optax.GradientTransformation
    engine: Engine
    sampling: Sampling
    eval_sampling: Sampling
    score: policy.Score
    correct: Callable[..., Any] | None


def setup(config) -> Setup:
    """Builds it, and finds the config's mistakes before anything is compiled."""
    check_rows(config)
    mesh, problems = sharding.make_mesh(**config.mesh), task(config)
    decoder_config, algo = model(config.model, problems.tokenizer), algorithm(config, problems)
    sampler = engine(config, decoder_config)
    check_rewards(config, algo, sampler)
    return Setup(
        mesh=mesh,
        task=problems,
        algorithm=algo,
        model=decoder_config,
        optimizer=optimizer(
            config.optimizer, total_updates=config.steps * config.train.minibatches * config.train.epochs
        ),
        engine=sampler,
        sampling=sampling(config, problems.tokenizer),
        eval_sampling=sampling(
            config,
            problems.tokenizer,
            temperature=config.evaluation.temperature,
            top_k=0,
            top_p=config.evaluation.top_p,
        ),
        score=policy.make_score(
            decoder_config,
            max_scored=config.sampling.max_tokens,
            temperature=config.sampling.temperature,
            max_logit_bytes=config.train.max_logit_bytes,
        ),
        correct=mismatch_correction(config.train, config.mismatch),
    )


def problems(config) -> Task:
    """The task alone, scored by its own verifier: no judge is loaded and no server asked."""
    return sections.build(
        TASKS, config.task, "task", seed=config.seed, max_prompt_tokens=config.sampling.max_prompt_tokens
    )


def task(config) -> Task:
    """The problems with the judges that the config names; reward servers score them whole, judges included."""
    made = problems(config)
    if config.reward.addresses:
        section = config.reward
        score = rewards.remote_score(
            section.addresses,
            security=reward_security(section),
            deadline_s=section.deadline_s,
            retries=section.retries,
        )
        return made._replace(score=score)
    if config.answer_judge.name:
        second = sections.build(sections.ANSWER_JUDGES, config.answer_judge.to_dict(), "answer_judge")
        made = answer.second_look(made, second)
    if config.judge.name:
        made = judged.judged(made, judge(config), **_place(config.judge))
    return made


def batches(config, problems: Task) -> tuple[order.Batches, dict[str, float], Callable | None]:
    """The order of the run's problems, the pass rates by id that decide it too, and what notes those of a batch."""
    section, rates = config.curriculum, dict[str, float]()
    stream = order.batches(problems.train, batch_size=config.prompts_per_step, seed=config.seed, rates=rates, **section)
    plain = tuple(section.pass_rates) == (0, 1)
    return stream, rates, None if plain else functools.partial(order.observe, rates)


def reward_security(section) -> security.Security:
    """What the reward servers are shown, and know themselves by."""
    return security.load_security(**{name: section[name] for name in section if name.endswith("_file")})


def alone(config) -> ConfigDict:
    """The same config without servers and judges: a policy and its checkpoints need neither."""
    config = config.copy_and_resolve_references()
    config.rollout.addresses = config.reward.addresses = ()
    config.judge = config.answer_judge = ConfigDict({"name": ""})
    return config


def check_rewards(config, algo: Algorithm, sampler: Engine):
    """Servers that score must do so for this task, in the channels that algorithm and judges need, and have the time.

    Raises:
      ConnectionError: none of the reward servers answers.
      ValueError: they score something else; a judge may think longer than they are waited for.
    """
    judges = [_place(config.judge)["channel"]] if config.judge.name else []
    judges += [answer.SECTION] if config.answer_judge.name else []
    needs = algo.needs | {f"{channel}_asked" for channel in judges}
    if sampler.generate_scored and (missing := needs - set(sampler.score_channels)):
        raise ValueError(
            f"rollout.score_on_server: algorithm and judge need the score channels {sorted(missing)}, the rollout "
            f"servers give {sorted(sampler.score_channels)}: start their --reward_addresses with the same --config"
        )
    if not config.reward.addresses:
        return
    said = rewards.describe(config.reward.addresses, security=reward_security(config.reward))
    if said.task != config.task.name:
        raise ValueError(
            f"the reward servers score the task {said.task!r}, this config has {config.task.name!r}: start them with "
            "the same --config"
        )
    if missing := needs - set(said.channels):
        raise ValueError(
            f"algorithm and judge need the score channels {sorted(missing)}, the reward servers give "
            f"{sorted(said.channels)}: start them with the same --config"
        )
    for name in ("judge", "answer_judge"):
        timeout_s, deadline_s = config[name].get("endpoint", {}).get("timeout_s", 0.0), config.reward.deadline_s
        if timeout_s > deadline_s:
            raise ValueError(
                f"{name}.endpoint.timeout_s={timeout_s} is longer than reward.deadline_s={deadline_s}: rows that the "
                "judge still thinks about would be asked again elsewhere; raise reward.deadline_s to what a chunk takes"
            )


def judge(config) -> judged.Judge:
    """The judge of the section, without where its verdicts go."""
    section = {key: value for key, value in config.judge.to_dict().items() if key not in _place(config.judge)}
    return sections.build(JUDGES, section, "judge", trained=functools.partial(trained, config))


def _place(section) -> dict[str, Any]:
    """Where the verdicts of the judge go: what `judged` takes beside it."""
    default = sections.choose(PLACES, section.name, "judge")
    return {key: section.get(key, value) for key, value in default.items()}


def trained(config, folder: str) -> critic.Trained:
    """The critic that the run in a folder has trained, on the devices of this one.

    Raises:
      ValueError: there is no such run, it is of another task, or it has no checkpoint.
    """
    workdir = Path(folder)
    if not (workdir / "config.json").is_file():
        raise ValueError(
            f"judge.workdir={str(workdir)!r} has no config.json: train a judge with "
            f"python -m launch.train --config=configs/genrm_gym.py --workdir={workdir}"
        )
    written = json.loads((workdir / "config.json").read_text())
    if written["task"]["name"] not in critic.READERS:
        raise ValueError(
            f"judge.workdir={folder!r} is a run of the task {written['task']['name']!r}, not of one of "
            f"{[*critic.READERS]}"
        )
    its = base.get_config(**{name: written[name]["name"] for name in ("algorithm", "task")})
    its.update(written)  # what it does not say is younger than the run
    its.mesh, its.mismatch = config.mesh, config.mismatch  # it is not trained here
    its = alone(its)  # it was sampled and scored there, once
    for key in [key for key in its.task if key.endswith("_path") and key != "tokenizer_path"]:
        its.task[key] = ""  # nor are its problems needed
    run = setup(its)
    with jax.set_mesh(run.mesh):
        _, params = saved_params(run, workdir)
        weights = run.engine.load(params, 0)
    budget = its.sampling.max_prompt_tokens
    return critic.Trained(run.engine, weights, run.sampling, budget, run.task, its.task.name, run.mesh)


def saved_params(run: Setup, workdir: Path, *, initial: bool = False) -> tuple[int, Any]:
    """Steps done and parameters of the newest checkpoint of the run in `workdir`, or of the policy it started from.

    Raises:
      ValueError: there is none.
    """
    folder, like = workdir / ("initial" if initial else "checkpoints"), abstract_state(run)
    if not folder.is_dir():
        raise ValueError(f"no {folder.name}/ in {workdir}: is it the folder of a run?")
    restored = checkpoint.restore_newest(checkpoint.open_manager(folder), like.params if initial else like)
    if restored is None:
        raise ValueError(f"{folder} holds no checkpoint yet: let the run reach checkpoint.every steps")
    step, state, _ = restored
    return step, state if initial else state.params


def algorithm(config, problems: Task) -> Algorithm:
    """The algorithm with its knobs; what else it asks for is given by name."""
    return sections.build(
        ALGORITHMS,
        config.algorithm,
        "algorithm",
        group_size=config.group_size,
        max_tokens=config.sampling.max_tokens,
        temperature=config.sampling.temperature,
        steps=config.steps,
        task=problems,
    )


def engine(config, model: DecoderConfig) -> Engine:
    """The embedded sampler, or the rollout servers that the config names."""
    options = dict(config.rollout)
    addresses, budget = tuple(options.pop("addresses")), config.sampling.max_prompt_tokens
    if not addresses:
        section = config.sampling
        return local.local_engine(
            model, max_prompt_tokens=budget, dtype=section.dtype, stream_tokens=section.stream_tokens
        )
    score = policy.make_score(model, max_scored=delivery.PROBE_TOKENS, max_logit_bytes=config.train.max_logit_bytes)
    return remote.remote_engine(
        addresses,
        model,
        max_prompt_tokens=budget,
        probe=lambda params, tokens, mask: score(params, tokens, mask).logprobs,
        options=remote.Options(**options),
        in_flight=config.asynchrony.in_flight,
    )


def sampling(config, tokenizer, **overrides) -> Sampling:
    """How the policy samples in training; evaluation overrides temperature and filters."""
    section = config.sampling
    filters = dict(temperature=section.temperature, top_k=section.top_k, top_p=section.top_p)
    return Sampling(
        max_tokens=section.max_tokens,
        stop_token_ids=(tokenizer.eos_token_id, *section.stop_token_ids),
        pad_token_id=tokenizer.pad_token_id,
        **(filters | overrides),
    )


def model(section, tokenizer) -> DecoderConfig:
    """The decoder's shape: that of the checkpoint at `path`, else the preset's with the tokenizer's vocabulary.

    Raises:
      ValueError: the checkpoint's vocabulary is smaller than the tokenizer's.
    """
    if section.path:
        config = config_json.read_config(section.path)
        if config.vocab_size < len(tokenizer):
            raise ValueError(
                f"the model at {section.path} has {config.vocab_size} tokens, the tokenizer {len(tokenizer)}: they do "
                "not belong together; set task.tokenizer_path to the model's own folder"
            )
    else:
        preset = sections.choose(presets.PRESETS, section.preset, "model preset")
        config = dataclasses.replace(preset, vocab_size=len(tokenizer))
    return dataclasses.replace(
        config, dtype=section.dtype, param_dtype=section.param_dtype, remat=section.remat, unroll=section.unroll
    )


def optimizer(section, *, total_updates: int) -> optax.GradientTransformation:
    """AdamW with warm-up, a schedule and global-norm clipping. Norms and biases are not decayed.

    Raises:
      ValueError: an unknown schedule.
    """
    peak, end = section.learning_rate, section.learning_rate * section.end_fraction
    after = max(total_updates - section.warmup_updates, 1)
    schedules = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, end, after),
        "cosine": optax.cosine_decay_schedule(peak, after, alpha=section.end_fraction),
    }
    schedule = sections.choose(schedules, section.schedule, "optimizer.schedule")
    if section.warmup_updates:
        warmup = optax.linear_schedule(0.0, peak, section.warmup_updates)
        schedule = optax.join_schedules([warmup, schedule], [section.warmup_updates])
    return optax.chain(
        optax.clip_by_global_norm(section.clip_norm),
        optax.adamw(
            schedule, b1=section.b1, b2=section.b2, eps=section.eps, weight_decay=section.weight_decay, mask=_is_matrix
        ),
    )


def _is_matrix(params):
    def matrix(path, leaf):
        return jax.tree_util.keystr(path, simple=True, separator="/").rsplit("/", 1)[-1] in (
            "kernel",
            "embedding",
            "head",
        )

    return jax.tree_util.tree_map_with_path(matrix, params)


def initial_params(section, config: DecoderConfig, mesh, key) -> Any:
    """The checkpoint's parameters, or random ones, sharded over the mesh."""
    shapes = jax.eval_shape(lambda: decoder.init(config, key))
    shardings = sharding.tree_shardings(shapes, mesh)
    if section.path:
        return jax.device_put(huggingface.load_params(section.path, config), shardings)
    return jax.jit(lambda: decoder.init(config, key), out_shardings=shardings)()


def fresh_state(algo: Algorithm, tx: optax.GradientTransformation, params, mesh):
    """A TrainState around params, built in one jit so that the optimizer's moments are sharded like them."""

    def init(params):
        return train_step.init_state(algo, tx, params)

    shardings = sharding.tree_shardings(jax.eval_shape(init, params), mesh)
    return jax.jit(init, out_shardings=shardings)(params)


def abstract_state(run: Setup):
    """Shapes and shardings of a TrainState, without allocating it: what a checkpoint is restored into."""

    def init():
        return train_step.init_state(run.algorithm, run.optimizer, decoder.init(run.model, jax.random.key(0)))

    shapes = jax.eval_shape(init)
    shardings = sharding.tree_shardings(shapes, run.mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def mismatch_correction(train, mismatch) -> Callable[..., Any] | None:
    """Importance weights [B, T] of the train/rollout mismatch: truncated ratios, 0 where rejected; None: all off.

    Raises:
      ValueError: an unknown level or estimator, a limit below 0.
    """
    if train.correction not in ("none", "token", "sequence"):
        raise ValueError(f"train.correction={train.correction!r}: choose none, token or sequence")
    for name in ("warn", "stop", "mask"):
        if mismatch[name] < 0:
            raise ValueError(f"mismatch.{name}={mismatch[name]} is below 0: give a limit in nats, 0 for none")
    ratio = functools.partial(correction.truncated_ratio, level=train.correction, cap=train.correction_cap)
    kept = functools.partial(
        correction.rejection_mask,
        estimator=mismatch.mask_estimator,
        level=mismatch.mask_level,
        low=-mismatch.mask,  # reached by k1 only, the others have a sign
        high=mismatch.mask,
    )
    one = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    jax.eval_shape(kept, one, one, jax.ShapeDtypeStruct((1, 1), bool))  # a mistake shows before anything is compiled
    if not mismatch.mask:
        return None if train.correction == "none" else ratio
    if train.correction == "none":
        return lambda *rows: kept(*rows).astype(jnp.float32)
    return lambda *rows: ratio(*rows) * kept(*rows)


def check_asynchrony(config, run: Setup):
    """What is trained must be able to lag, and what samples ahead must not start programs on the trainer's devices.

    Lagging rows are corrected as those of another implementation are, so a correction must be chosen (our choice).

    Raises:
      ValueError: naming the key.
    """
    section, devices = config.asynchrony, run.mesh.size
    if section.replay:
        recording.read_schedule(Path(section.replay), config.steps)
        return
    if section.staleness < section.in_flight:
        raise ValueError(
            f"asynchrony.staleness={section.staleness}, asynchrony.in_flight={section.in_flight}: staleness is 0 or "
            "more, and in flight at least 1"
        )
    if section.in_flight and run.engine.update is None:
        raise ValueError(
            "asynchrony.in_flight: the embedded sampler keeps its weights until a batch is done; name servers in "
            "rollout.addresses, or leave it off"
        )
    if section.staleness and run.correct is None:
        raise ValueError(
            f"asynchrony.staleness={section.staleness} would train on rows of older weights as if they were new: "
            "choose train.correction=token or sequence, or a mismatch.mask"
        )
    own_programs = {
        "the embedded sampler (name rollout.addresses)": not config.rollout.addresses,
        f"{config.algorithm.name} scores the rows it injects and": run.algorithm.inject is not None,
        f"the judge {config.judge.name}": config.judge.name in EMBEDDED and not config.reward.addresses,
    }
    for what in [name for name, here in own_programs.items() if here and section.staleness and devices > 1]:
        raise ValueError(
            f"asynchrony.staleness={section.staleness} on {devices} devices: {what} would start programs while the "
            "trainer does, and their collectives wait for one another; take one device, or staleness 0"
        )


def scoring(config, run: Setup) -> loop.Options:
    """How the rows of a step are scored; a judge of this process must be able to do so while others are sampled.

    Raises:
      ValueError: naming the key.
    """
    section = config.reward
    options = loop.Options(section.overlap, section.chunk_rows, section.threads, wait_s=section.wait_s)
    if not options.overlap or section.addresses or config.judge.name not in EMBEDDED:
        return options
    if run.mesh.size > 1 and not config.rollout.addresses:
        raise ValueError(
            f"reward.overlap on {run.mesh.size} devices: the judge {config.judge.name} would start programs while the "
            "embedded sampler does, and their collectives wait for one another; set reward.overlap=False, or give the "
            "judge to reward servers (reward.addresses)"
        )
    if config.judge.get("temperature", 0.0) > 0:
        raise ValueError(
            f"reward.overlap with judge.temperature={config.judge.temperature}: what the judge {config.judge.name} "
            "draws depends on which rows it gets together, which the clock would decide; set reward.overlap=False, or "
            "judge.temperature=0"
        )
    return options


@contextlib.contextmanager
def source(
    config, collect: asynchrony.Collect, log: metrics.Log, *, start: int, ready: Sequence[Collected]
) -> Iterator[asynchrony.Source]:
    """Where the loop gets its batches: from `collect`, when it is time or ahead of it, or from a recording."""
    section, steps, rows = config.asynchrony, config.steps, config.prompts_per_step * config.group_size
    with contextlib.ExitStack() as stack:
        if section.replay:
            batches = recording.replay(Path(section.replay), steps=steps, rows=rows)
        elif section.staleness:
            lag = dict(staleness=section.staleness, in_flight=section.in_flight)
            batches = stack.enter_context(asynchrony.ahead(collect, start=start, steps=steps, ready=ready, **lag))
        else:
            batches = asynchrony.on_policy(collect)
        yield recording.record(batches, log) if section.record else batches


def check_rows(config):
    """Rows must divide into minibatches, micro-batches and devices.

    Raises:
      ValueError: naming the numbers.
    """
    rows, ways = config.prompts_per_step * config.group_size, config.mesh.data * config.mesh.fsdp
    parts = config.train.minibatches * config.train.microbatches * ways
    if rows % parts:
        raise ValueError(
            f"prompts_per_step * group_size = {rows} rows do not divide into "
            f"train.minibatches={config.train.minibatches} x train.microbatches={config.train.microbatches} x {ways} "
            "devices (mesh.data * mesh.fsdp)"
        )
    for name, prompts in (
        ("prompts_per_step", config.prompts_per_step),
        ("evaluation.batch_prompts", config.evaluation.batch_prompts),
        ("judge.batch_rows", config.judge.get("batch_rows", ways)),
        ("sft.batch_size", config.sft.batch_size),
    ):
        if prompts % ways:
            raise ValueError(f"{name}={prompts} is not a multiple of {ways} devices (mesh.data * mesh.fsdp)")


def warm_start_optimizer(section) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay to a tenth.

    Raises:
      ValueError: no update is left for the decay.
    """
    if section.warmup_updates >= section.updates:
        raise ValueError(
            f"sft.warmup_updates={section.warmup_updates} must be less than sft.updates={section.updates}: lower it"
        )
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, section.learning_rate, section.warmup_updates, section.updates, section.learning_rate / 10
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.01, mask=_is_matrix)
    )

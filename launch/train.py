"""Reinforcement learning of a reasoning policy, from a config to a table and a picture.

    python -m launch.train --config=configs/quickstart.py
    python -m launch.train --config=configs/quickstart.py --config.algorithm.clip_high=0.3 --workdir=runs/mine

The same command with the same --workdir resumes a run that was stopped, at the exact row and bit.
"""

import contextlib
import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from launch import build, cli, sft
from tapojax import asynchrony, checkpoint, evaluation, metrics, policy, recording, report, sharding, train_step
from tapojax.rollout import collect


def train(config, workdir: Path) -> dict:
    """Runs a config to its end in `workdir` and returns the summary."""
    started, totals = time.perf_counter(), dict[str, float]()
    run = build.setup(config)
    build.check_asynchrony(config, run)
    reward = build.scoring(config, run)
    cli.write_config(config, workdir)
    batches, rates, observe = build.batches(config, run.task)
    with jax.set_mesh(run.mesh), contextlib.ExitStack() as stack:
        # ---- state: around the initial policy, or as the newest checkpoint has it
        with metrics.timed(totals, "warm_start"):
            initial = sft.initial_policy(config, run.model, run.task, run.mesh, workdir)
        reference = jax.tree.map(jnp.copy, initial) if run.algorithm.needs_reference else None
        state = build.fresh_state(run.algorithm, run.optimizer, initial, run.mesh)
        manager = checkpoint.open_manager(workdir / "checkpoints", keep=config.checkpoint.keep)
        start, ready, memory = 0, [], run.algorithm.memory
        if restored := checkpoint.restore_newest(manager, checkpoint.abstract(state)):
            start, state, record = restored
            batches.set_state(record["data"])
            rates.update(record["pass_rates"])
            totals, memory = record["seconds"], record["memory"]
            ready = [recording.from_text(text) for text in record["ready"]]
            print(f"resumed {workdir} at step {start}", flush=True)
        log = metrics.open_log(workdir, start=start, tensorboard=config.log.tensorboard)

        score_rows, make_batch, mismatch, update = compiled(run, config.train)
        score = score_rows if run.algorithm.inject else None
        # with a single update the train step's own log-probs are the old ones: no pass of their own is needed
        single = config.train.minibatches * config.train.epochs == 1
        needs_old = not single or run.correct or run.algorithm.signals or run.algorithm.update_carry

        # ---- where batches come from: with staleness, a thread calls this ahead of the loop
        def sample(step: int, policy: asynchrony.Policy) -> collect.Collected:
            nonlocal memory
            with jax.set_mesh(run.mesh):
                part = collect.collect(
                    run.engine,
                    policy.weights,
                    batches,
                    run.task,
                    run.algorithm,
                    run.sampling,
                    step=step,
                    key=jax.random.fold_in(jax.random.key(config.seed), step),
                    carry=policy.carry,
                    memory=memory,
                    score=policy.score,
                    observe=observe,
                    reward=reward,
                    **config.collect,
                )
            memory = part.memory
            return part

        source = stack.enter_context(build.source(config, sample, log, start=start, ready=ready))
        stack.callback(run.engine.close)

        # ---- the loop
        skipped = 0
        evaluate(0, config, run, state.params, log, totals, source)
        for step in range(start, config.steps):
            spent: dict[str, float] = {}
            profile = jax.profiler.trace(str(workdir / "profile"))  # for TensorBoard or Perfetto
            with profile if config.log.profile_step == step + 1 else contextlib.nullcontext():
                part = source.next(step, functools.partial(asynchrony.snapshot, run.engine, state, step, score=score))
                with metrics.timed(spent, "score"):
                    rollout, scores = sharding.shard_batch((part.rollout, dict(part.scores)), run.mesh)
                    old_stats = score_rows(state.params, rollout.tokens, rollout.mask) if needs_old else None
                    ref = score_rows(reference, rollout.tokens, rollout.mask).logprobs if reference else None
                    batch = jax.block_until_ready(
                        make_batch(rollout, scores, step, old_stats=old_stats, ref_logprobs=ref)
                    )
                    told = mismatch(batch) if needs_old else {}
                with metrics.timed(spent, "train"):
                    history = []
                    for rows in train_step.minibatches(
                        batch, count=config.train.minibatches, epochs=config.train.epochs, seed=(config.seed, step)
                    ):
                        state, values = update(state, sharding.shard_batch(rows, run.mesh))
                        history.append(values)
                    history = [{**values, **told} for values in jax.device_get(history)]
                if run.algorithm.update_carry is not None:
                    state = state._replace(carry=run.algorithm.update_carry(state.carry, old_stats, rollout))

            write(log, config, run, step, part, batch, history, {**spent, **part.seconds}, totals)
            skipped = stop_if_diverged(skipped, history, step, config.train.max_nonfinite)
            stop_if_mismatched(history[0], step, config.mismatch)
            evaluate(step + 1, config, run, state.params, log, totals, source)
            if (step + 1) % config.checkpoint.every == 0 or step + 1 == config.steps:
                coming = source.idle()
                with metrics.timed(totals, "checkpoint"):
                    record = {"data": batches.get_state(), "seconds": totals, "memory": memory, "pass_rates": rates}
                    record["ready"] = [recording.to_text(part) for part in coming]
                    checkpoint.save(manager, step + 1, state, record)
    totals["this_process"] = time.perf_counter() - started
    title = f"{config.algorithm.name} · {config.task.name} · seed {config.seed}"
    return report.finish(workdir, steps=config.steps, title=title, seconds=totals)


def compiled(run: build.Setup, section):
    """The jitted functions of a step: score rows, make a batch of them, its mismatch, update on a minibatch of it."""
    score_rows = policy.in_microbatches(run.score, section.minibatches * section.microbatches)
    make_batch = functools.partial(train_step.make_batch, run.algorithm, correct=run.correct)
    update = train_step.make_train_step(run.score, run.algorithm, run.optimizer, microbatches=section.microbatches)
    return jax.jit(score_rows), jax.jit(make_batch), jax.jit(train_step.mismatch), jax.jit(update, donate_argnums=0)


def evaluate(step: int, config, run: build.Setup, params, log: metrics.Log, totals: dict, source: asynchrony.Source):
    """Evaluates on the held-out problems where step asks for it and it was not done before a restart."""
    every = config.evaluation.every
    due = step in (0, config.steps) or (every and step % every == 0)
    if not due or step in [e["step"] for e in report.read_jsonl(log.workdir / "evaluations.jsonl")]:
        return
    source.idle()  # the engine may have one version of the weights at a time
    with metrics.timed(totals, "evaluate"):
        results, _ = evaluation.evaluate(
            run.engine,
            run.engine.load(params, step),
            run.task,
            run.task.evaluation,
            run.eval_sampling,
            jax.random.fold_in(jax.random.key(config.seed + 1), step),
            samples=config.evaluation.samples,
            batch_prompts=config.evaluation.batch_prompts,
        )
    metrics.append(log, "evaluations", {"step": step, **results})
    print(f"evaluation after {step} steps: pass@1 {report.estimate_text(results['pass@1'])}", flush=True)


def write(log, config, run, step, part, batch, history, spent: dict, totals: dict):
    """One line of metrics, a few sampled rollouts, one line on the screen."""
    for stage, seconds in spent.items():
        totals[stage] = totals.get(stage, 0.0) + seconds
    means = {name: float(np.mean([values[name] for values in history])) for name in history[0]}
    own_time = sum(spent[stage] for stage in spent if "wait" not in spent or stage not in ("sample", "reward"))
    rewards, own = run.algorithm.rewards(part.scores, part.rollout, step), run.algorithm.diagnostics
    record = {
        "step": step,
        "reward": float(np.nanmean(rewards)),
        **metrics.rollout_metrics(part, run.algorithm.group_size),
        **metrics.batch_metrics(batch, part.scores["correct"]),
        **(own(rewards, part.scores, part.rollout, step) if own else {}),
        **means,
        **asynchrony.lag_metrics(part, step),
        "tokens_per_second": part.sampled_tokens / own_time,
        **{f"seconds_{stage}": seconds for stage, seconds in spent.items()},
        **metrics.call_metrics(part),
    }
    metrics.append(log, "metrics", record)
    for sample in metrics.sample_records(part, step, config.log.rollouts, run.algorithm.group_size):
        metrics.append(log, "rollouts", sample)
    for row in metrics.injection_records(part, step, run.algorithm.group_size):
        metrics.append(log, "injections", row)
    print(metrics.progress_line(record, config.steps), flush=True)


def stop_if_diverged(skipped: int, history, step: int, limit: int) -> int:
    """Updates in a row that were skipped for a gradient that is not finite.

    Raises:
      ValueError: more than `limit`.
    """
    for values in history:
        skipped = skipped + 1 if values["nonfinite"] else 0
    if skipped:
        print(f"warning: step {step + 1}: loss or gradient not finite, {skipped} updates in a row left out", flush=True)
    if skipped > limit:
        raise ValueError(
            f"step {step + 1}: loss or gradient was not finite in {skipped} updates in a row (train.max_nonfinite="
            f"{limit}); parameters were left as they were. Lower optimizer.learning_rate, or try model.dtype=float32"
        )
    return skipped


def stop_if_mismatched(values, step: int, section):
    """Compares what sampler and trainer say of the same tokens with the limits in the config.

    Raises:
      ValueError: above mismatch.stop, or not a number.
    """
    found, largest = float(values["mismatch_k3"]), float(values["mismatch_max"])
    said = (
        f"step {step + 1}: old and behaviour log-probs differ by a mean k3 of {found:.3g} nats (max |λ| {largest:.3g})"
    )
    if section.stop and not found <= section.stop:
        raise ValueError(
            f"{said}, mismatch.stop={section.stop}: give trainer and sampler the same precision (model.dtype, "
            "sampling.dtype, rollout.weights_dtype), lower asynchrony.staleness, or raise the limit"
        )
    if section.warn and not found <= section.warn:
        print(f"warning: {said}, mismatch.warn={section.warn}", flush=True)


if __name__ == "__main__":

    def main():
        train(cli.checked_config(), cli.workdir())

    cli.run(main)

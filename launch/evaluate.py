"""How good is a policy on held-out problems: pass@k, avg@k, maj@k with 95 % intervals, as JSON and as a table.

    python -m launch.evaluate --config=configs/quickstart.py --workdir=runs/mine
    python -m launch.evaluate --config=configs/gsm8k.py --config.model.path=Qwen2.5-Math-1.5B

With --workdir the run's newest checkpoint is evaluated (--policy=initial: what it started from), without it the
model at model.path. Any key may be overridden: another evaluation_path, more samples, another temperature.
"""

import json
import sys
import time
from pathlib import Path

import jax
from absl import flags

from launch import build, cli
from tapojax import evaluation, report

POLICY = flags.DEFINE_enum("policy", "newest", ["newest", "initial"], "which parameters of the run in --workdir")
RESULTS = flags.DEFINE_string("results", "results", "folder for the JSON, the table and the samples")


def main():
    config = cli.checked_config()
    run = build.setup(config)
    with jax.set_mesh(run.mesh):
        name, params = chosen_params(config, run)
        started = time.perf_counter()
        results, samples = evaluation.evaluate(
            run.engine,
            run.engine.load(params, 0),
            run.task,
            run.task.evaluation,
            run.eval_sampling,
            jax.random.key(config.seed + 1),
            samples=config.evaluation.samples,
            batch_prompts=config.evaluation.batch_prompts,
        )
    results |= {
        "policy": name,
        "config": json.loads(config.to_json()),
        "seconds": round(time.perf_counter() - started, 2),
    }
    table = report.results_table(results)
    folder = Path(RESULTS.value)
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{config.task.name}-{Path(name).name}-{time.strftime('%Y%m%d-%H%M%S')}"
    stem.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
    stem.with_suffix(".md").write_text(table + "\n")
    stem.with_suffix(".jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    print(f"{table}\n\nwritten  {stem}.json, .md, .jsonl")


def chosen_params(config, run: build.Setup):
    """(name, parameters): of the run in --workdir, or of the model at model.path.

    Raises:
      ValueError: neither was given, or the run has no checkpoint yet.
    """
    if not cli.WORKDIR.value:
        if not config.model.path:
            sys.exit("error: nothing to evaluate: give --workdir of a run, or --config.model.path of a checkpoint")
        params = build.initial_params(config.model, run.model, run.mesh, jax.random.key(config.seed))
        return Path(config.model.path).name, params
    workdir, initial = Path(cli.WORKDIR.value), POLICY.value == "initial"
    step, params = build.saved_params(run, workdir, initial=initial)
    return f"{workdir.name}-{'initial' if initial else step}", params


if __name__ == "__main__":
    cli.run(main)

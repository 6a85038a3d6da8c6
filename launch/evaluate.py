"""How good is a policy on held-out problems: avg@k, pass@k, maj@k with 95 % intervals, set by set.

    python -m launch.evaluate --config=configs/quickstart.py --workdir=runs/mine
    python -m launch.evaluate --config=configs/hapo_math.py:7b --workdir=runs/hapo-7b --protocol=hapo --sets=data
    python -m launch.evaluate --config=configs/gsm8k.py --config.model.path=Qwen2.5-Math-1.5B --sets=own,math500.jsonl

With --workdir the run's newest checkpoint is evaluated (--policy=initial: what it started from), without it the model
at model.path. A protocol is a paper's own evaluation (tapojax/protocols.py); --config.x=y on the command line goes
before it, and the result says so. Killed, the same command goes on where it stopped. `launch.report` compares results.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import platform
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from launch import build, cli, evaluation_sets, sections
from launch.evaluation_sets import Problems
from tapojax import evaluation, protocols, report, results, resumable

POLICY = flags.DEFINE_enum("policy", "newest", ["newest", "initial"], "which parameters of the run in --workdir")
SETS = flags.DEFINE_list(
    "sets", ["own"], "what to evaluate on: own (the config's), a file of rows, name=file, or with --protocol a folder"
)
PROTOCOL = flags.DEFINE_string("protocol", "", f"a paper's own evaluation: {', '.join(protocols.PROTOCOLS)}")
KS = flags.DEFINE_list("k", [], "the k of pass@k [powers of two up to the samples]")
RESULTS = flags.DEFINE_string("results", "results", "folder that holds a folder for each result")
NAME = flags.DEFINE_string("name", "", "of the result's folder [the policy and the protocol]")
# sections of the config that do not decide what is sampled, and keys that say where it comes from
UNASKED = {*"steps prompts_per_step group_size algorithm optimizer train mismatch asynchrony collect".split()}
UNASKED |= {*"curriculum sft checkpoint log mesh".split()}
ROLLOUT_KEYS = ("weights_dtype", "prompts_per_request")  # of the section rollout, those that decide samples
UNASKED_KEYS = ("train_path", "evaluation_path", "teacher_path", *cli.PLACES)
BENCHMARK = ("subset", "final_answer_correct")  # of a problem, where it says so
SAMPLING = ("temperature", "top_p", "top_k", "max_tokens")
PACKAGES = ("tapojax", "jax", "jaxlib", "numpy", "transformers", "math-verify")


def main():
    config = cli.checked_config()
    protocol = sections.choose(protocols.PROTOCOLS, PROTOCOL.value, "protocol") if PROTOCOL.value else None
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    notes = evaluation_sets.follow(protocol, config, overrides)
    run = build.setup(config)
    sets = evaluation_sets.chosen(SETS.value, config, run.task, protocol, overrides)
    ks = passes(KS.value, sets)
    with jax.set_mesh(run.mesh), contextlib.closing(run.engine):
        name, params = chosen_params(config, run)
        policy = {"name": name, **identity(config, name)}
        folder = Path(RESULTS.value) / (NAME.value or "-".join(filter(None, [name, PROTOCOL.value])))
        refuse_to_lose(folder, sets)
        folder.mkdir(parents=True, exist_ok=True)
        weights = functools.cache(lambda: run.engine.load(params, 0))  # not loaded where nothing is left to sample
        found = {}
        for problems in sets:
            asked = {"policy": {k: v for k, v in policy.items() if k != "path"}, **asks(config, problems)}
            rows = folder / f"{problems.name}.jsonl"
            found[problems.name] = evaluate_set(run, weights, problems, rows, asked, ks[problems.name])
    save(
        folder,
        {
            "name": folder.name,
            "policy": policy,
            "protocol": protocol and {"name": PROTOCOL.value, "headline": protocol.headline, "source": protocol.source},
            "notes": [*notes, *evaluation_sets.notes(protocol, sets), *failures(found)],
            "sampling": {key: getattr(run.eval_sampling, key) for key in SAMPLING},
            "sets": found,
            "mean": results.mean_over_sets(found),
            "ks": sorted(map(int, KS.value)),
            "config": json.loads(config.to_json()),
            "versions": versions(),
        },
    )


def save(folder: Path, result: Mapping):
    """Writes result.json and result.md, and prints the latter."""
    result = resumable.plain(result)
    table = results.table(result)
    (folder / "result.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    (folder / "result.md").write_text(table + "\n")
    rows = ", ".join(f"{name}.jsonl" for name in result["sets"])
    print(f"\n{table}\n\nwritten  {folder}/result.json, result.md, {rows}")


def refuse_to_lose(folder: Path, sets: Sequence[Problems]):
    """A result of other sets stays; those that are asked for again keep their samples.

    Raises:
      ValueError: the folder's result has sets that are not among these.
    """
    file = folder / "result.json"
    try:
        held = json.loads(file.read_text())["sets"]
    except (OSError, ValueError, KeyError):  # there is none, or its writing was killed
        return
    names = [problems.name for problems in sets]
    if others := [name for name in held if name not in names]:
        entries = ",".join(
            f"{name}={held[name]['data']['path']}" if held[name]["data"]["path"] else "own" for name in others
        )
        raise ValueError(
            f"{file} holds also {', '.join(others)}: give --sets=...,{entries}, whose samples are kept, "
            "or another --name"
        )


def versions() -> dict[str, str | None]:
    """Of python and of what decides the numbers; None where a package runs from a folder that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def passes(asked: Sequence[str], sets: Sequence[Problems]) -> dict[str, list[int]]:
    """The k of pass@k for each set: those asked for, 1 and all samples, else powers of two and all samples.

    Raises:
      ValueError: a k that is no number from 1 to the samples of every set.
    """
    if wrong := [k for k in asked if not k.isdecimal() or k == "0"]:
        raise ValueError(f"--k={wrong[0]}: give whole numbers from 1 on, such as --k=1,8")
    chosen = {}
    for problems in sets:
        n = problems.samples
        if large := [k for k in asked if int(k) > n]:
            raise ValueError(
                f"--k={large[0]}: {problems.name} has {n} samples of a problem, and pass@k needs k of them: lower k "
                f"or say --config.evaluation.samples={large[0]}"
            )
        chosen[problems.name] = sorted({*map(int, asked)} | {1, n} | {2**i for i in range(n.bit_length()) if not asked})
    return chosen


def evaluate_set(run: build.Setup, weights, problems: Problems, path: Path, asked: Mapping, ks: Sequence[int]) -> dict:
    """Samples what is not in the file of an earlier start, and returns the numbers of the whole set."""
    key = jax.random.fold_in(jax.random.key(asked["config"]["seed"] + 1), int(problems.digest[:8], 16))
    how = dict(samples=problems.samples, batch_prompts=asked["batch_prompts"])
    total = -(-len(problems.examples) // asked["batch_prompts"])
    with resumable.opened(path, asked) as (done, add):
        if done:
            print(f"{problems.name}: {len(done)} of {total} batches are in {path}", flush=True)
        if len(done) < total:
            parts = evaluation.parts(
                run.engine,
                weights(),
                run.task,
                problems.examples,
                run.eval_sampling,
                key,
                start=len(done),
                **how,
            )
            compiling = True
            for part in parts:
                marker = {"channels": part.channels, "seconds": part.seconds, "compiling": compiling}
                add(resumable.Batch(part.records, marker))
                compiling = False
                print(progress(problems, done, total), flush=True)
    return summary(problems, done, ks)


def progress(problems: Problems, done: Sequence[resumable.Batch], total: int) -> str:
    rates = evaluation.per_problem([record for batch in done for record in batch.records], problems.samples)
    rate = report.estimate_text(evaluation.estimate(rates)._asdict())
    return f"{problems.name} {len(done)}/{total}  avg@{problems.samples} {rate}  {speed(done[-1:]):.0f} tokens/s"


def speed(batches: Sequence[resumable.Batch]) -> float:
    """Sampled tokens a second of sampling; batches that compiled are left out where there are others."""
    counted = [batch for batch in batches if not batch.marker["compiling"]] or batches
    tokens = sum(record["length"] for batch in counted for record in batch.records)
    return tokens / sum(batch.marker["seconds"]["sample"] for batch in counted)


def records_of(batches: Sequence[resumable.Batch]) -> list[dict]:
    """All records; a score that does not exist, null in the file, is NaN again."""
    return [
        {**record, **{name: np.nan for name in batch.marker["channels"] if record[name] is None}}
        for batch in batches
        for record in batch.records
    ]


def summary(problems: Problems, done: Sequence[resumable.Batch], ks: Sequence[int]) -> dict:
    """Every number of one set, the time of earlier starts included."""
    records, channels = records_of(done), done[-1].marker["channels"]
    seconds = {stage: sum(batch.marker["seconds"][stage] for batch in done) for stage in ("sample", "score")}
    return {
        "data": {"path": problems.path, "sha256": problems.sha256, "problems": problems.digest, "rows": problems.rows},
        **evaluation.summarise(records, problems.samples, channels, ks),
        **evaluation.completion_rates(records),
        "error_texts": dict(Counter(r["error"] for r in records if r["error"] is not None).most_common(3)),
        "per_problem": {
            "id": [example["id"] for example in problems.examples],
            "correct": evaluation.per_problem(records, problems.samples),
        },
        **(critics(problems, records) if {"predicted", "label"} <= set(channels) else {}),
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
        "tokens_per_second": round(speed(done), 1),
    }


def failures(found: Mapping[str, Mapping]) -> list[str]:
    """Why samples have no score, the most frequent reasons of each set."""
    return [
        f"{name}: {count} samples: {text}"
        for name, numbers in found.items()
        for text, count in numbers["error_texts"].items()
    ]


def critics(problems: Problems, records: Sequence[Mapping]) -> dict[str, Any]:
    """A critic's tables by subset: of all samples, and of the votes of those of a problem where there are several."""
    rows = []
    for record, example in zip(records, [e for e in problems.examples for _ in range(problems.samples)], strict=True):
        subset = {"subset": f"level {example['level']}"} if "level" in example else {}
        rows.append({**record, **subset, **{key: example[key] for key in BENCHMARK if key in example}})
    voted = {"critic_vote": evaluation.critic_table(evaluation.critic_vote(rows))} if problems.samples > 1 else {}
    return {"critic": evaluation.critic_table(rows), **voted}


def asks(config, problems: Problems) -> dict[str, Any]:
    """All that decides the samples of a set, beside the policy: what the file of a set begins with."""
    kept = {key: value for key, value in json.loads(config.to_json()).items() if key not in UNASKED}
    for section in kept.values():
        for key in [key for key in section if f".{key}".endswith(UNASKED_KEYS)] if isinstance(section, dict) else ():
            del section[key]
    kept["rollout"] = {key: kept["rollout"][key] for key in ROLLOUT_KEYS}
    del kept["model"]["path"], kept["evaluation"]["samples"], kept["evaluation"]["every"]
    return {
        "config": kept,
        "problems": problems.digest,
        "samples": problems.samples,
        "batch_prompts": evaluation_sets.batch_prompts(len(problems.examples), config),
    }


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


def identity(config, name: str) -> dict[str, Any]:
    """Which parameters these are: their folder, the step, and a digest of names, sizes and times of its files."""
    step = 0 if POLICY.value == "initial" else name.rpartition("-")[2]
    kind = "initial" if POLICY.value == "initial" else "checkpoints"
    folder = Path(cli.WORKDIR.value) / kind / str(step) if cli.WORKDIR.value else Path(config.model.path)
    files = sorted((str(f.relative_to(folder)), f.stat()) for f in folder.rglob("*") if f.is_file())
    stamps = [(file, stat.st_size, stat.st_mtime_ns) for file, stat in files]
    return {
        "path": str(folder.resolve()),
        "step": int(step) if cli.WORKDIR.value else None,
        "files": hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:16],
    }


if __name__ == "__main__":
    cli.run(main)

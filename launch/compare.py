"""Algorithms x seeds on one gym: trains them side by side, then one table and one picture.

    python -m launch.compare --config=configs/hapo_gym.py --workdir=runs/hapo_gym
    python -m launch.compare --config=configs/hapo_gym.py --variants=hapo,dapo --seeds=0,1,2 --processes=2
    python -m launch.compare --config=configs/hapo_gym.py --workdir=runs/hapo_gym --report_only

Variants are the modes of the config file that its VARIANTS names; --config.x=y holds for all of them. Every run is a
launch.train in <workdir>/<variant>/seed-<seed>, with what it says in log.txt. Runs of a seed whose warm starts are
equal share it, so they start from the same policy. The same command resumes: finished runs are left as they are.
"""

import hashlib
import json
import runpy
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from configs import base
from launch import cli, processes, sections
from launch.processes import Job
from tapojax import comparison, comparison_plot

VARIANTS = flags.DEFINE_list("variants", None, "which of the config's VARIANTS, in this order [all]")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "one run of each variant for each")
PROCESSES = flags.DEFINE_integer("processes", 1, "runs at a time; they share the cores", lower_bound=1)
BASELINE = flags.DEFINE_string("baseline", None, "the variant that others are compared with [the last]")
REPORT_ONLY = flags.DEFINE_bool("report_only", False, "train nothing: table and picture of the runs that are finished")

TAIL_LINES = 15  # of the log of a run that failed


# ---- what is to be run


def chosen() -> tuple[dict[str, str], list[int], str]:
    """(variant -> description, seeds, baseline) of the flags.

    Raises:
      ValueError: a name the config does not have, or a seed that is no number.
    """
    path, colon, mode = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    if colon:
        raise ValueError(f"--config={path}:{mode}: give the file alone, and --variants={mode} to run that one")
    known = runpy.run_path(path).get("VARIANTS")
    if known is None:
        raise ValueError(f"{path} has no VARIANTS: give it that dict, mode of get_config -> one line of description")
    variants = {name: sections.choose(known, name, "variant") for name in VARIANTS.value or known}
    if wrong := [seed for seed in SEEDS.value if not seed.isdecimal()]:
        raise ValueError(f"--seeds: {wrong[0]!r} is no number; say --seeds=0,1,2")
    baseline = BASELINE.value or list(variants)[-1]
    sections.choose(variants, baseline, "chosen variant")
    return variants, list(dict.fromkeys(map(int, SEEDS.value))), baseline


def arguments(variant: str, seed: int) -> list[str]:
    """The flags of a run, without its folder.

    Raises:
      ValueError: --config.seed was given.
    """
    flag = flags.FLAGS["config"]
    overrides = config_flags.get_override_values(flag)
    if "seed" in overrides:
        raise ValueError(f"--config.seed={overrides['seed']}: say --seeds={overrides['seed']}")
    given = {"seed": seed, **overrides}
    path = config_flags.get_config_filename(flag)
    return [f"--config={path}:{variant}", *(f"--config.{key}={value}" for key, value in given.items())]


def resolve(argv: Sequence[str]) -> Any:
    """The config that launch.train will have of these flags.

    Raises:
      ValueError: an override that this variant does not read.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values, sys_argv=["", *argv])
    try:
        values(["", *argv])
    except (AttributeError, KeyError, TypeError, flags.Error) as error:
        raise ValueError(f"{argv[0]}: {error}") from error
    config: Any = values["config"].value
    sections.check_keys(config, base.get_config(algorithm=config.algorithm.name, task=config.task.name))
    return config


def plan(workdir: Path, variants: Mapping, seeds: Sequence[int]) -> tuple[dict[Path, Job], list[tuple[Job, Path]]]:
    """(warm starts by folder, unfinished runs each with the folder of its warm start). Seeds first, then variants.

    Raises:
      ValueError: a folder holds a run of another config.
    """
    warm_starts, runs = dict[Path, Job](), []
    for seed in seeds:
        for variant in variants:
            argv, folder = arguments(variant, seed), comparison.run_folder(workdir, variant, seed)
            config = resolve(argv)
            cli.write_config(config, folder)
            if (folder / "summary.json").exists():
                print(f"{variant} seed {seed}: finished already", flush=True)
                continue
            warm = workdir / f"initial-{seed}" / warm_start_key(config)
            if not (folder / "initial" / "0").exists() and not (warm / "initial" / "0").exists():
                warm_starts.setdefault(warm, Job(f"warm start of seed {seed}", "launch.sft", argv, warm))
            runs.append((Job(f"{variant} seed {seed}", "launch.train", argv, folder), warm))
    return warm_starts, runs


def warm_start_key(config) -> str:
    """Equal for configs whose warm start is the same."""
    lengths = (config.sampling.max_prompt_tokens, config.sampling.max_tokens)
    parts = [json.loads(config[name].to_json()) for name in ("model", "task", "sft", "mesh")]
    return hashlib.sha256(json.dumps([lengths, parts], sort_keys=True).encode()).hexdigest()[:8]


def copy_initial(source: Path, folder: Path):
    """Gives a run the initial policy, all of it or nothing, unless it has one."""
    target, partial = folder / "initial", folder / "initial.partial"
    if (target / "0").exists():
        return
    for stale in (target, partial):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    shutil.copytree(source / "initial", partial)
    partial.rename(target)


def train(workdir: Path, variants: Mapping, seeds: Sequence[int], at_a_time: int) -> list[Job]:
    """Trains what is not finished and returns what failed; a run whose warm start failed is not begun."""
    warm_starts, runs = plan(workdir, variants, seeds)
    failed = processes.run_all(list(warm_starts.values()), at_a_time)
    lost, ready = {job.folder for job in failed}, []
    for job, warm in runs:
        if warm not in lost or (job.folder / "initial" / "0").exists():
            copy_initial(warm, job.folder)
            ready.append(job)
    return failed + processes.run_all(ready, at_a_time)


# ---- the result


def write_report(workdir: Path, variants: Mapping, seeds: Sequence[int], baseline: str):
    """Writes table.md, results.json and curves.png of what is finished, and prints the table."""
    runs, missing = comparison.read_runs(workdir, variants, seeds)
    results = comparison.compare(runs, baseline)
    text = comparison.table(results, missing, variants)
    (workdir / "table.md").write_text(text + "\n")
    (workdir / "results.json").write_text(json.dumps({**results, "missing": missing}, indent=2) + "\n")
    picture = comparison_plot.draw(runs, results, workdir / "curves.png", workdir.name)
    print(f"\n{text}\n\nwritten  {workdir / 'table.md'}, results.json, {picture.name}", flush=True)


def main():
    variants, seeds, baseline = chosen()
    if REPORT_ONLY.value and not cli.WORKDIR.value:
        raise ValueError("--report_only: of which comparison? Give its --workdir")
    workdir = cli.workdir()
    failed = [] if REPORT_ONLY.value else train(workdir, variants, seeds, PROCESSES.value)
    for job in failed:
        tail = (job.folder / "log.txt").read_text(errors="replace").splitlines()[-TAIL_LINES:]
        print(f"\n---- {job.name} failed; the end of {job.folder / 'log.txt'}:\n" + "\n".join(tail), flush=True)
    write_report(workdir, variants, seeds, baseline)
    if failed:
        sys.exit(f"error: {len(failed)} failed: {', '.join(job.name for job in failed)}; the same command resumes")


if __name__ == "__main__":
    cli.run(main)

"""Every config file loads, stays small and builds; a mistake on the command line is one line that says what to do."""

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import base
from launch import build, cli, sections

ROOT = Path(__file__).parents[2]
SHARED = ("__init__", "base", "large")  # no experiments
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in SHARED)


def modes(name):
    module = importlib.import_module(f"configs.{name}")
    offered = ["quicktest"] if ":quicktest" in (ROOT / "configs" / f"{name}.py").read_text() else []
    offered += [*getattr(module, "VARIANTS", ()), *getattr(module, "MODES", ())]
    return [(module.get_config, mode) for mode in ["", *offered]]


CONFIGS = [pytest.param(get, mode, id=f"{name}:{mode}") for name in NAMES for get, mode in modes(name)]


def load(get_config, mode) -> ConfigDict:
    return get_config(mode) if inspect.signature(get_config).parameters else get_config()


def leaves(config, prefix="") -> list[str]:
    found = []
    for key, value in config.items():
        found += leaves(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else [prefix + key]
    return found


# ---- the files


@pytest.mark.parametrize("name", NAMES)
def test_a_config_file_says_what_it_is_in_80_lines(name):
    text = (ROOT / "configs" / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 80
    assert f"--config=configs/{name}.py" in importlib.import_module(f"configs.{name}").__doc__, "the command to run it"


@pytest.mark.parametrize("get_config, mode", CONFIGS)
def test_a_config_loads_and_every_key_is_read(get_config, mode):
    config = load(get_config, mode)
    chosen = {name: config[name].name for name in ("algorithm", "task", "judge", "answer_judge")}
    sections.check_keys(config, base.get_config(**chosen))
    assert len(leaves(config)) <= 140, "nobody reads a config of that size"
    config.lock()
    assert ConfigDict(config).to_json(), "plain values only"


@pytest.mark.parametrize("get_config, mode", CONFIGS)
def test_a_config_builds(get_config, mode):
    config = load(get_config, mode)
    if "tokenizer_path" in config.task or config.model.path or "workdir" in config.judge:
        pytest.skip("needs files of the user")
    run = build.setup(config)
    assert run.algorithm.group_size == config.group_size
    assert run.sampling.max_tokens == config.sampling.max_tokens
    assert run.sampling.temperature == config.sampling.temperature
    assert run.eval_sampling.temperature == config.evaluation.temperature
    assert len(run.task.train) >= config.prompts_per_step and len(run.task.evaluation) > 0
    prompts = [len(run.task.prompt(run.task.train[i])) for i in range(50)]
    assert max(prompts) <= config.sampling.max_prompt_tokens, "a prompt of the task does not fit"


@pytest.mark.parametrize("get_config, mode", CONFIGS)
def test_rows_divide(get_config, mode):
    build.check_rows(load(get_config, mode))


def test_an_unknown_mode_is_refused():
    for name in NAMES:
        get_config = importlib.import_module(f"configs.{name}").get_config
        if inspect.signature(get_config).parameters:
            with pytest.raises(ValueError, match=f"configs/{name}.py:nonsense is unknown"):
                get_config("nonsense")


def test_rows_that_do_not_divide_are_refused():
    config = base.get_config()
    config.train.minibatches = 3
    with pytest.raises(
        ValueError, match="= 128 rows do not divide into train.minibatches=3 x train.microbatches=1 x 1"
    ):
        build.setup(config)
    config = base.get_config()
    config.mesh.data, config.prompts_per_step = 8, 4
    with pytest.raises(ValueError, match="prompts_per_step=4 is not a multiple of 8 devices"):
        build.setup(config)


# ---- config.json beside a run


def test_a_resumed_run_must_have_the_same_config(tmp_path):
    config, workdir = base.get_config(), tmp_path / "run"
    cli.write_config(config, workdir)
    (workdir / "initial" / "0").mkdir(parents=True)  # the run has begun
    written = (workdir / "config.json").read_text()
    cli.write_config(base.get_config(), workdir)
    assert (workdir / "config.json").read_text() == written
    other = base.get_config()
    other.optimizer.learning_rate = 2e-4
    with pytest.raises(ValueError, match="holds a run with optimizer.learning_rate=1e-06, this command says 0.0002"):
        cli.write_config(other, workdir)
    with pytest.raises(ValueError, match="algorithm.*=.*this command says"):
        cli.write_config(base.get_config(algorithm="dapo"), workdir)
    assert (workdir / "config.json").read_text() == written


def test_a_resumed_run_may_find_things_elsewhere_but_not_other_things(tmp_path):
    def config(**changed):
        found = base.get_config(judge="rubric", answer_judge="answer")
        found.update_from_flattened_dict(changed)
        return found

    (tmp_path / "initial" / "0").mkdir(parents=True)
    cli.write_config(config(), tmp_path)
    places = {f"reward.{name}_file": "elsewhere" for name in ("token", "authority", "certificate", "key")}
    for section in ("judge", "answer_judge"):
        places |= {f"{section}.endpoint.addresses": ("http://b/v1",), f"{section}.endpoint.cache_file": "elsewhere"}
    cli.write_config(config(**places), tmp_path)
    for key in ("judge.prompt_file", "answer_judge.prompt_file"):
        with pytest.raises(ValueError, match=f"{key}='', this command says 'other'"):
            cli.write_config(config(**{key: "other"}), tmp_path)


def test_a_start_that_failed_binds_nobody(tmp_path):
    """The first command named a broken checkpoint; the second, with a good one, may use the folder."""
    first, second = base.get_config(), base.get_config()
    first.model.path = "broken"
    cli.write_config(first, tmp_path)
    cli.write_config(second, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model"]["path"] == ""


def test_tuples_survive_the_file(tmp_path):
    """JSON has lists only: a run must still be the same as itself."""
    (tmp_path / "initial" / "0").mkdir(parents=True)
    config = base.get_config()
    config.task.levels = (2, 3)
    for _ in range(2):
        cli.write_config(config, tmp_path)
    config.task.levels = (2, 4)
    with pytest.raises(ValueError, match=r"task.levels=\[2, 3\], this command says \[2, 4\]"):
        cli.write_config(config, tmp_path)


# ---- the command line


def command(*arguments, cwd=ROOT):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "launch.train", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--config=configs/quickstart.py", "--config.algorithm.clip_hgh=0.3"], ["clip_hgh", '"clip_high"']),
        (["--config=configs/quickstart.py", "--config.algorithm.name=grop"], ["'grop'", "did you mean 'grpo'?"]),
        ([], ["which config?"]),
    ],
)
def test_a_mistake_ends_in_one_line(arguments, says, tmp_path):
    result = command(*arguments, f"--workdir={tmp_path / 'run'}")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr + result.stdout
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: "), result.stderr
    for text in says:
        assert text in result.stderr
    assert not (tmp_path / "run").exists(), "nothing is written for a run that cannot start"

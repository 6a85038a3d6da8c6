"""What all commands share: flags, the compilation cache, and errors a person can read."""

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from configs import base
from launch import sections
from tapojax import resumable

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "a file of configs/, such as configs/quickstart.py", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; an existing one is resumed [runs/<config>-<time>]")
# keys that say where something is and not what it is, which a resumed run may find elsewhere
PLACES = (".addresses", ".token_file", ".authority_file", ".certificate_file", ".key_file", ".cache_file")
TRACEBACK = flags.DEFINE_bool("traceback", False, "show where an error was raised, not only what it says")


def run(main: Callable[[], None]):
    """Parses the flags and runs main; a mistake in config, data or files ends in one message and exit status 1."""

    def guarded(argv):
        if len(argv) > 1:
            sys.exit(f"error: unexpected argument {argv[1]!r}: options are given as --name=value")
        if CONFIG.value is None:
            sys.exit("error: which config? Give --config=configs/quickstart.py or another file of configs/")
        try:
            main()
        except (ValueError, OSError) as error:
            if TRACEBACK.value:
                traceback.print_exc()
            sys.exit(f"error: {error}")

    logging.set_verbosity(logging.WARNING)
    cache_compilations()
    app.run(guarded, flags_parser=_parse_flags)


def _parse_flags(argv):
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError, TypeError, ValueError, OSError, flags.Error) as error:  # from --config.x=y
        sys.exit(f"error: {_said(error)}")


def _said(error: Exception) -> str:
    """The message; an unknown key comes as KeyError, whose text is a quotation, sometimes inside an AttributeError."""
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    if not isinstance(error, KeyError):
        message, _, trace = str(error).partition("Traceback (most recent call last)")  # of a mistake in a config file
        return trace.strip().splitlines()[-1] if trace else message
    return f"no such config key: {' '.join(str(error.args[0]).split())} (all keys are in configs/base.py)"


def cache_compilations():
    """Compiled programs are kept between runs, in JAX_COMPILATION_CACHE_DIR or ~/.cache/tapojax."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "tapojax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def load_config(file: str):
    """The config of a file of configs/, such as configs/quickstart.py or configs/quickstart.py:dapo."""
    path, _, mode = file.partition(":")
    name = Path(path).with_suffix("").as_posix().replace("/", ".")
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"--config={file} cannot be loaded ({error}): pass a file of configs/") from error
    return _checked(module.get_config(mode))


def checked_config():
    """The config of the flags, all of whose keys are read."""
    return _checked(CONFIG.value)


def _checked(config):
    known = base.get_config(**{name: config[name].name for name in ("algorithm", "task", "judge", "answer_judge")})
    sections.check_keys(config, known)
    return config


def write_config(config, workdir: Path):
    """Keeps the resolved config beside the run, or makes sure that a resumed run was started with the same.

    Raises:
      ValueError: a key differs; it is named with both values.
    """
    path, new = workdir / "config.json", json.loads(config.to_json())
    if path.exists() and (workdir / "initial" / "0").exists():  # a start that failed before binds nobody
        old = json.loads(path.read_text())
        differing = resumable.differences(old, new)
        for key in [key for key in differing if key.endswith(PLACES)]:
            del differing[key]
        for key, (was, now) in differing.items():
            raise ValueError(
                f"{workdir} holds a run with {key}={was!r}, this command says {now!r}: "
                "give the same config to resume, or another --workdir to start anew"
            )
        return
    workdir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(new, indent=2) + "\n")


def workdir() -> Path:
    """The folder of the run: --workdir, or a new one named after the config and the time."""
    if WORKDIR.value:
        return Path(WORKDIR.value)
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    name = Path(path.partition(":")[0]).stem  # without the :mode
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"

"""Config sections that mirror a constructor: its keyword arguments are the keys, so no key can be inert."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from tapojax.algorithms import ALGORITHMS
from tapojax.judges import JUDGES, PLACES
from tapojax.rollout import remote
from tapojax.tasks import TASKS

ANSWER_JUDGES = {"answer": JUDGES["answer"]}


def algorithm_defaults(name: str) -> ConfigDict:
    return _defaults(name, choose(ALGORITHMS, name, "algorithm"))


def task_defaults(name: str) -> ConfigDict:
    return _defaults(name, choose(TASKS, name, "task"))


def judge_defaults(name: str) -> ConfigDict:
    """Those of the judge, and where its verdicts go; "" is no judge."""
    if not name:
        return ConfigDict({"name": ""})
    return ConfigDict({**choose(PLACES, name, "judge"), **_defaults(name, JUDGES[name])})


def answer_judge_defaults(name: str) -> ConfigDict:
    return _defaults(name, choose(ANSWER_JUDGES, name, "answer_judge")) if name else ConfigDict({"name": ""})


def rollout_defaults() -> ConfigDict:
    return ConfigDict({"addresses": (), **remote.Options._field_defaults})


def choose(table: Mapping[str, Any], name: str, what: str):
    """The entry called `name`.

    Raises:
      ValueError: there is none; the nearest names are suggested.
    """
    if name not in table:
        raise ValueError(f"no {what} is called {name!r}{suggestion(name, table)}; there are {sorted(table)}")
    return table[name]


def suggestion(name: str, known) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _defaults(name: str, constructor: Callable) -> ConfigDict:
    parameters = inspect.signature(constructor).parameters.values()
    return ConfigDict({"name": name, **{p.name: _plain(p.default) for p in parameters if p.default is not p.empty}})


def _plain(default):
    """A NamedTuple of options is a section of its own."""
    return default._asdict() if hasattr(default, "_asdict") else default


def build(table: Mapping[str, Any], section: Mapping[str, Any], what: str, **given):
    """Calls the constructor that a section names with the section's keys, and with those of `given` that it takes.

    Raises:
      ValueError: a key that the constructor does not take.
    """
    kwargs = dict(section)
    constructor = choose(table, kwargs.pop("name"), what)
    accepted = inspect.signature(constructor).parameters
    for key in kwargs:
        if key not in accepted or key in given:
            raise ValueError(f"{what}.{key}: {section['name']} has no such option{suggestion(key, accepted)}")
        if hasattr(accepted[key].default, "_asdict"):
            kwargs[key] = type(accepted[key].default)(**kwargs[key])
    return constructor(**kwargs, **{key: value for key, value in given.items() if key in accepted})


def check_keys(config: Mapping[str, Any], known: Mapping[str, Any], prefix: str = ""):
    """Every key of `config` must be one that is read.

    Raises:
      ValueError: naming the first that is not, and the nearest that is.
    """
    for key, value in config.items():
        if key not in known:
            whose = f" by {known['name']}" if "name" in known else ""
            raise ValueError(
                f"config key {prefix}{key} is not read{whose}{suggestion(key, known)}; all keys are in "
                "configs/base.py; a config file chooses algorithm, task and judge by base.get_config(algorithm=...)"
            )
        sections = [isinstance(x, Mapping | ConfigDict) for x in (value, known[key])]
        if sections[0] != sections[1]:
            raise ValueError(
                f"config key {prefix}{key}={value!r}: expected {'a section' if sections[1] else 'a value'}"
            )
        if all(sections):
            check_keys(value, known[key], f"{prefix}{key}.")

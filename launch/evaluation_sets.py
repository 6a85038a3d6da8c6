"""What launch.evaluate evaluates on: the sets of the command line, and the protocol that says how."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launch import sections
from tapojax import protocols
from tapojax.datasets import sourcing
from tapojax.protocols import Protocol
from tapojax.tasks import TASKS, data
from tapojax.types import Example, Examples, Task


class Problems(NamedTuple):
    """One set."""

    name: str
    path: str  # empty: the task's own, which is in no file
    examples: Sequence[Example]
    samples: int  # of each problem
    rows: int  # of the file, of which some may be no examples
    digest: str  # of problems and answers in their order: equal digests can be compared problem by problem
    sha256: str  # of the file


def follow(protocol: Protocol | None, config, overrides: Mapping[str, Any]) -> list[str]:
    """Puts the protocol's numbers into the config, but not over those of the command line; tells what is left of it."""
    if protocol is None:
        return []
    notes = [] if protocol.silent == "nothing" else [f"the paper does not say: {protocol.silent}"]
    for key, value in (
        ("evaluation.temperature", protocol.temperature),
        ("evaluation.top_p", protocol.top_p),
        ("sampling.max_prompt_tokens", protocol.max_prompt_tokens),
        ("sampling.max_tokens", protocol.max_tokens),
    ):
        if value is None:
            continue
        if key not in overrides:
            section, name = key.split(".")
            config[section][name] = value
        elif overrides[key] != value:
            notes.append(f"{key}={overrides[key]} instead of the protocol's {value}")
    return notes


def chosen(
    entries: Sequence[str], config, task: Task, protocol: Protocol | None, overrides: Mapping[str, Any]
) -> list[Problems]:
    """The sets of --sets.

    Raises:
      ValueError: a missing file, an empty set, two of the same name, a folder without a set of the protocol.
    """
    named = [pair for entry in entries for pair in _named(entry, config, protocol)]
    sets = [_read(name, path, config, task, protocol, overrides) for name, path in named]
    for problems in sets:
        if sum(other.name == problems.name for other in sets) > 1:
            raise ValueError(f"--sets has two sets called {problems.name!r}: name one, --sets=other={problems.path}")
    return sets


def _named(entry: str, config, protocol: Protocol | None) -> list[tuple[str, str]]:
    """(name, path) of the sets of one entry; the path of a set that is in no file is empty."""
    name, equals, path = entry.partition("=")
    if equals and "/" not in name:
        return [(name, _rows(Path(path)) or path)]
    if entry == "own":
        path = config.task.get("evaluation_path", "")
        return [(_name(path, protocol) if path else config.task.name, path)]
    if not Path(entry).is_dir() or _is_set(Path(entry)):
        return [(_name(entry, protocol), entry)]
    found = _of_folder(Path(entry), protocol) if protocol else []
    if found:
        return found
    if rows := _rows(Path(entry)):
        return [(_name(rows, protocol), rows)]
    if protocol is None:
        raise ValueError(f"--sets={entry} is a folder: name its files, or a --protocol whose sets are in it")
    names = [wanted.name for wanted in protocol.sets]
    raise ValueError(f"{entry} has no file of the protocol's sets {names}: name them, --sets={names[0]}=file,...")


def _is_set(folder: Path) -> bool:
    """Whether a folder is one set, as datasets and TFDS write them."""
    return any((folder / name).exists() for name in ("features.json", "state.json"))


def _rows(path: Path) -> str:
    """Where the rows of one set are: a file, a folder that is a set, a prepared folder's test file or split; or ""."""
    if not path.is_dir() or _is_set(path):
        return str(path)
    files = [f for f in path.iterdir() if protocols.stem(f.name) == "test" and f.name.endswith(sourcing.FILES)]
    versions = [f.parent for f in (*path.glob("1.0.0/features.json"), *path.glob("*/1.0.0/features.json"))]
    files += [folder / "test" if any(folder.glob("*-test.*")) else folder for folder in versions]
    if len(files) > 1:
        raise ValueError(f"{path} has {len(files)} sets, {', '.join(map(str, sorted(files)))}: say --sets=NAME=FILE")
    return str(files[0]) if files else ""


def _name(path: str, protocol: Protocol | None) -> str:
    """A set's name by its path, the protocol's where it has one."""
    name = protocols.title(path)
    known = protocols.set_named(protocol, name) if protocol else None
    return known.name if known else name


def _of_folder(folder: Path, protocol: Protocol) -> list[tuple[str, str]]:
    """The protocol's sets in a folder: files, and folders that were prepared."""
    found = []
    for wanted in protocol.sets:
        named = sorted(f for f in folder.iterdir() if protocols.set_named(protocol, f.name) == wanted)
        files = [rows for f in named if (rows := _rows(f))]
        if len(files) > 1:
            raise ValueError(f"{folder} has {len(files)} files of {wanted.name}: {files}; say --sets={wanted.name}=...")
        found += [(wanted.name, file) for file in files]
    return found


def _read(name: str, path: str, config, task: Task, protocol, overrides: Mapping) -> Problems:
    found = _examples(path, config, task)
    examples = [found[i] for i in range(len(found))]
    rows = len(data.read_rows(path)) if path else len(examples)
    if not examples:
        raise ValueError(
            f"{path} has {rows} rows and no problem to evaluate on: "
            + ("their prompts are longer than sampling.max_prompt_tokens" if rows else "it is empty")
            if path
            else f"the task {name!r} has no problems to evaluate on: give --sets=file, or task.evaluation_path"
        )
    known = next((s for s in protocol.sets if s.name == name), None) if protocol else None
    samples = known.samples if known and "evaluation.samples" not in overrides else config.evaluation.samples
    pairs = [[str(example["problem"]), str(example["answer"])] for example in examples]
    digest = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
    return Problems(name, path, examples, samples, rows, digest, _file_digest(Path(path)) if path else "")


def _examples(path: str, config, task: Task) -> Examples:
    """The problems of a file, as the task reads it; a task that reads no files gets the rows as they are."""
    if not path:
        return task.evaluation
    if "evaluation_path" in config.task:
        others = {key: "" for key in ("train_path", "teacher_path") if key in config.task}
        section = {**config.task, **others, "evaluation_path": path}
        given = dict(seed=config.seed, max_prompt_tokens=config.sampling.max_prompt_tokens)
        return sections.build(TASKS, section, "task", **given).evaluation
    rows = data.read_rows(path)
    for number, row in enumerate(rows, 1):
        if missing := [key for key in ("id", "problem", "answer") if key not in row]:
            raise ValueError(
                f"{path}, row {number}: the task {config.task.name!r} takes rows with id, problem and answer, "
                f"{missing} is missing; for files of other kinds choose a config with task=files"
            )
    return rows


def _file_digest(path: Path) -> str:
    """Of a file's bytes; of a folder, or a split of it, the names and bytes of all its files."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    folder = path if path.is_dir() else path.parent
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    parts = [(str(file.relative_to(folder)), hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def batch_prompts(problems: int, config) -> int:
    """Prompts a batch, at most evaluation.batch_prompts: as equal as the devices allow, for the last is filled up."""
    ways = config.mesh.data * config.mesh.fsdp
    batches = -(-problems // config.evaluation.batch_prompts)
    return -(-problems // (batches * ways)) * ways


def notes(protocol: Protocol | None, sets: Sequence[Problems]) -> list[str]:
    """What a reader of the numbers must know of the sets."""
    said = []
    for problems in sets:
        if left_out := problems.rows - len(problems.examples):
            said.append(f"{problems.name}: {left_out} of {problems.rows} rows left out, their prompts are too long")
        keys = ("problem", "answer", "question")
        texts = [tuple(str(example.get(key)) for key in keys) for example in problems.examples]
        if repeats := len(texts) - len(set(texts)):
            said.append(
                f"{problems.name}: {repeats} of {len(texts)} problems repeat others; the intervals count them as new"
            )
    return said + (_departures(protocol, sets) if protocol else [])


def _departures(protocol: Protocol, sets: Sequence[Problems]) -> list[str]:
    """Where sets and samples are not the protocol's."""
    wanted, said, samples = {s.name: s for s in protocol.sets}, [], dict[str, list[str]]()
    for problems in sets:
        known = wanted.get(problems.name)
        if known is None:
            said.append(f"{problems.name} is no set of the protocol; its samples are the config's")
            continue
        if known.samples != problems.samples:
            numbers = f"samples of a problem are {problems.samples} instead of the protocol's {known.samples}"
            samples.setdefault(numbers, []).append(problems.name)
        if known.problems not in (None, problems.rows):
            said.append(f"{problems.name} has {problems.rows} problems, published are {known.problems}")
    said += [f"{numbers}: {', '.join(names)}" for numbers, names in samples.items()]
    if missing := wanted.keys() - {problems.name for problems in sets}:
        said.append(f"sets of the protocol that were not evaluated: {', '.join(sorted(missing))}")
    return said

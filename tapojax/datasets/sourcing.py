"""Where the files of a data set are: published, or where the user says they lie."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tapojax.datasets import fetching, table

FILES = (".parquet", ".jsonl", ".json", ".gz", ".arrow")


def parse(texts: Sequence[str]) -> dict[str, str]:
    """Places by "SPLIT" or "DATASET/SPLIT", from texts such as "train=a.jsonl"; under "" the one place for all.

    Raises:
      ValueError: several, and one of them without its split.
    """
    known = {
        label for name, one in table.DATASETS.items() for split in one.splits for label in (split, f"{name}/{split}")
    }
    found = {}
    for text in texts:
        name, equals, place = text.partition("=")
        found.update({name: place} if equals and name in known else {"": text})
    if "" in found and len(texts) > 1:
        raise ValueError(f"--source={','.join(texts)}: say which split each is, as in train=a.jsonl,test=b.jsonl")
    return found


def named(given: Mapping[str, str], name: str, split: str) -> str:
    """The place given for that very split, or ""."""
    return given.get(f"{name}/{split}") or given.get(split) or ""


def check_named(given: Mapping[str, str], parts: Sequence[tuple[str, str]]):
    """Raises ValueError where a place that is given for a split is that of several parts, (data set, split)."""
    for split in given:
        if len(several := [f"{name}/{one}" for name, one in parts if one == split]) > 1:
            raise ValueError(
                f"--source={split}={given[split]}: {' and '.join(several)} are both {split}, say "
                f"--source={several[0]}=PATH,{several[1]}=PATH"
            )


def files(name: str, split: str, given: Mapping[str, str], cache: Path) -> list[Path]:
    """The files of a split on this disk, downloaded if they have to be.

    Raises:
      ValueError: nobody says where they are; one cannot be had, or is another one than was published.
    """
    dataset, base = table.get(name), given.get("", "")
    own = named(given, name, split)
    if not own and base.endswith(FILES):
        if len(dataset.splits) > 1:
            raise ValueError(f"--source={base} is one file, {name} has the splits {list(dataset.splits)}: SPLIT={base}")
        own = base
    if own:
        return [fetching.local(own, cache)]
    published = dataset.splits[split].files
    if not published:
        raise ValueError(f"{name} has no address to download from: give --source={split}=PATH ({dataset.about})")
    wanted = {file.path: _place(base, file) for file in published}
    check_distinct(wanted)
    return [fetching.local(wanted[file.path], cache, sha256=file.sha256) for file in published]


def check_distinct(places: Mapping[str, str | Path]):
    """Raises ValueError where one place stands for two published files, parts or splits."""
    first: dict[str, str] = {}
    for wanted, place in places.items():
        other = first.setdefault(str(place), wanted)
        if other != wanted:
            raise ValueError(f"{place} would be both {other} and {wanted}: give --source the files that each is in")


def _place(base: str, file: table.File) -> str:
    if not base:
        return file.url
    if fetching.is_url(base):
        return f"{base.rstrip('/')}/{file.path}"
    whole = Path(base) / file.path
    return str(whole if whole.exists() else Path(base) / whole.name)

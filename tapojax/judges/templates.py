"""The texts that judges are asked with: readable files, whose places are filled in. No jax."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

FOLDER = Path(__file__).with_name("prompts")
PLACE = re.compile(r"(?<![A-Za-z}])\{([a-z_]+)\}")  # not the argument of a LaTeX command


def load(name: str, own_file: str, *, needs: Collection[str], may: Collection[str]) -> str:
    r"""The text of prompts/<name>.md, or of a file of the user in its place.

    Raises:
      ValueError: there is no such file, or it lacks a place that it needs; `\boxed{...}` is no place.
    """
    path = Path(own_file) if own_file else FOLDER / f"{name}.md"
    if not path.is_file():
        raise ValueError(f"no prompt at {path}: check prompt_file")
    text = path.read_text(encoding="utf-8")
    found = places(text)
    if missing := set(needs) - found:
        raise ValueError(f"the prompt {path} lacks {sorted(missing)}: put each in braces where it goes")
    if strange := found - set(needs) - set(may):
        raise ValueError(f"the prompt {path} has {sorted(strange)} in braces, there are {sorted({*needs, *may})}")
    return text


def places(text: str) -> set[str]:
    """The names in braces."""
    return set(PLACE.findall(text))


def fill(text: str, values: Mapping[str, str]) -> str:
    """The text with its places filled in, in one pass: what a value says in braces stays as it is."""
    return PLACE.sub(lambda place: values[place[1]], text)


def closing_tags(text: str) -> list[str]:
    """The tags that end a part of the prompt, which nothing filled in may contain."""
    return re.findall(r"</[a-z_]+>", text)

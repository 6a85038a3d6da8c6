"""How published systems prepared their data, as data."""

from collections.abc import Mapping
from typing import NamedTuple

from tapojax.datasets import sourcing, table

BOXED = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."


class Part(NamedTuple):
    """One split of a data set within a split of the prepared set."""

    dataset: str
    split: str
    repeat: int = 1  # copies, one pass after the other
    source: str = ""  # data_source of verl's rows, by which its scorers are chosen; the data set's name if empty


class Recipe(NamedTuple):
    splits: dict[str, tuple[Part, ...]]
    about: str
    template: str = ""  # with one, rows are verl's, the problem inside it
    ability: str = "Math"
    deduplicate: bool = False
    per_tier: int = 0  # problems of each of PAPO's tiers of pass rates; 0: all, whatever their rate


RECIPES = {
    "fapo": Recipe(
        {
            "train": (Part("dapo_processed", "train", 20, "math-dapo"),),
            "test": (Part("aime24", "test", 32, "aime24"), Part("aime25", "test", 32, "aime25")),
        },
        "FAPO's reasoning data, Ding et al., arXiv 2510.22543; of its test file without GPQA-diamond (x 4), whose "
        "options it shuffles unseeded and whose home asks for a login.",
        template=BOXED,
    ),
    "fapo_critic": Recipe(
        {"train": (Part("fapo_critic", "train"),), "test": (Part("fapo_critic", "test"),)},
        "FAPO's data for the generative reward model, each solution in steps; the critic's own prompt stays.",
    ),
    "papo": Recipe(
        {"train": (Part("numina_verifiable", "train"),)},
        "PAPO's 20,000 problems, Tan et al., arXiv 2603.26535: 4000 of each of five tiers of pass rates over 8 "
        "attempts of a reference model at temperature 1, unsolved ones left out. The rates come with --pass_rates.",
        deduplicate=True,
        per_tier=4000,
    ),
}


def of_dataset(name: str, given: Mapping[str, str], repeat: int) -> Recipe:
    """A data set alone: all its splits, or those that places are given for."""
    dataset = table.get(name)
    wanted = [split for split in dataset.splits if sourcing.named(given, name, split)] or list(dataset.splits)
    return Recipe({split: (Part(name, split, repeat),) for split in wanted}, dataset.about, ability="math")


def kind(recipe: Recipe) -> str:
    """problems or steps; all its parts are of one."""
    (found,) = {table.get(part.dataset).kind for parts in recipe.splits.values() for part in parts}
    return found


def get(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
      ValueError: there is none.
    """
    if name not in RECIPES:
        raise ValueError(f"no recipe {name!r}: choose one of {', '.join(RECIPES)}")
    return RECIPES[name]

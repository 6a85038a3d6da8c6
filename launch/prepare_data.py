"""A published data set, or a paper's recipe of several, as files to train and evaluate on, with a report.

    python -m launch.prepare_data --dataset=gsm8k --output=data/gsm8k
    python -m launch.prepare_data --dataset=gsm8k --output=data/gsm8k --source=train=mine.jsonl,test=other.parquet
    python -m launch.prepare_data --recipe=fapo --output=data/fapo --format=parquet

Files are downloaded to --cache, checked, and read in whatever layout they are published (docs/data.md). Written are
SPLIT.jsonl, SPLIT.parquet or a TFDS folder, and report.json and report.md beside them. Needs no accelerator.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from absl import app, flags, logging

from tapojax.datasets import building, preparing, recipes, report, schema, sourcing, table, writing

DATASET = flags.DEFINE_string("dataset", "", f"one of {', '.join(table.DATASETS)}")
RECIPE = flags.DEFINE_string("recipe", "", f"instead of --dataset, one of {', '.join(recipes.RECIPES)}")
SOURCE = flags.DEFINE_list(
    "source",
    [],
    "other places than the published ones: SPLIT=PATH,... (DATASET/SPLIT=PATH of a recipe), a path or URL for a set of "
    "one split, or the folder or base URL under which the published files lie",
)
OUTPUT = flags.DEFINE_string("output", None, "folder to write", required=True)
FORMAT = flags.DEFINE_enum("format", "jsonl", writing.FORMATS, "of the files to write")
TEMPLATE = flags.DEFINE_string("template", "", "a user message with {problem}; with it rows have verl's layout")
REPEAT = flags.DEFINE_integer("repeat", 1, "copies of each split, one after the other", lower_bound=1)
SKIP = flags.DEFINE_bool("skip_unreadable", False, "leave out and report rows without a problem or an answer")
DEDUPLICATE = flags.DEFINE_bool("deduplicate", False, "keep one row of each problem, none where answers differ")
PASS_RATES = flags.DEFINE_string(
    "pass_rates", "", 'of problems, by id: rows {"id", "pass_rate"}, or the result.json of a launch.evaluate'
)
PER_TIER = flags.DEFINE_integer("per_tier", 0, "problems of each of PAPO's five tiers of pass rates; 0: all problems")
SEED = flags.DEFINE_integer("seed", 0, "of the draw from the tiers")
TOKENIZER = flags.DEFINE_string("tokenizer", "", "folder or hub name; lengths are then in tokens, else in characters")
AGAINST = flags.DEFINE_list("against", [], "other prepared sets, in which to look for the same problems")
CACHE = flags.DEFINE_string("cache", "~/.cache/tapojax/data", "folder of downloads")


def main():
    recipe, name, output = chosen_recipe(), RECIPE.value or DATASET.value, Path(OUTPUT.value)
    parts: dict[str, list[tuple[list[dict], int]]] = {}  # of each split: examples, and their copies
    surveys = {}
    unreadable: dict[str, list[str]] = {split: [] for split in recipe.splits}
    check_files(recipe)
    for split, members in recipe.splits.items():
        found = [
            preparing.survey(read(member, unreadable[split]), deduplicate=recipe.deduplicate) for member in members
        ]
        parts[split] = [(examples, m.repeat) for (examples, _), m in zip(found, members, strict=True)]
        surveys[split] = preparing.merged(met for _, met in found)
    rates = preparing.pass_rates(PASS_RATES.value) if PASS_RATES.value else {}
    rated = preparing.count_rated(each_once(parts), rates, PASS_RATES.value) if PASS_RATES.value else {}
    parts = {split: [(chosen(one, recipe, rates), copies) for one, copies in some] for split, some in parts.items()}
    measure, unit = ruler()
    described = report.describe(
        each_once(parts),
        rows={split: sum(len(examples) * copies for examples, copies in some) for split, some in parts.items()},
        published={split: published(members) for split, members in recipe.splits.items()},
        surveys=surveys,
        unreadable=unreadable,
        rated=rated,
        against={path: list(preparing.anything(path)) for path in AGAINST.value},
        measure=measure,
        unit=unit,
    )
    write(name, recipe, parts, output)
    text = report.text(described, name)
    writing.text(output / "report.json", json.dumps(described, indent=1, ensure_ascii=False) + "\n")
    writing.text(output / "report.md", text)
    print(text)
    print(f"written  to {output.absolute()}")


def each_once(parts: Mapping[str, list[tuple[list[dict], int]]]) -> dict[str, list[dict]]:
    return {split: [one for examples, _ in some for one in examples] for split, some in parts.items()}


def chosen_recipe() -> recipes.Recipe:
    """That of --recipe, or the --dataset as one, as the other flags want it.

    Raises:
      ValueError: neither or both; flags that do not go together.
    """
    if bool(DATASET.value) == bool(RECIPE.value):
        raise ValueError("give --dataset or --recipe, one of the two")
    if RECIPE.value and REPEAT.value > 1:
        raise ValueError(f"--repeat is for --dataset: the recipe {RECIPE.value!r} has its own copies")
    recipe = recipes.get(RECIPE.value) if RECIPE.value else recipes.of_dataset(DATASET.value, places(), REPEAT.value)
    recipe = recipe._replace(
        template=TEMPLATE.value or recipe.template,
        deduplicate=DEDUPLICATE.value or recipe.deduplicate,
        per_tier=PER_TIER.value or recipe.per_tier,
    )
    if recipe.template:
        schema.check_template(recipe.template, "--template")
    if recipe.template and FORMAT.value == "tfds":
        raise ValueError("--format=tfds has no place for a template: choose jsonl or parquet")
    if recipe.template and recipes.kind(recipe) == "steps":
        raise ValueError("--template is for problems: solutions in steps go to a critic, who has a prompt of his own")
    if RECIPE.value:
        sourcing.check_named(places(), [(m.dataset, m.split) for members in recipe.splits.values() for m in members])
    return recipe


def check_files(recipe: recipes.Recipe):
    """Fetches the files of all parts; raises ValueError where one cannot be had, or one file would be two parts."""
    members = [member for some in recipe.splits.values() for member in some]
    sourcing.check_distinct({f"{m.dataset}/{m.split}, file {i}": f for m in members for i, f in enumerate(files_of(m))})


def files_of(part: recipes.Part) -> list[Path]:
    return sourcing.files(part.dataset, part.split, places(), Path(CACHE.value).expanduser())


def places() -> dict[str, str]:
    return sourcing.parse(SOURCE.value)


def read(part: recipes.Part, unreadable: list[str]) -> Iterator[dict]:
    """The examples of a part; messages of rows that are left out are added to `unreadable`.

    Raises:
      ValueError: its published files have another number of rows than was published.
    """
    files = files_of(part)
    count, before = 0, len(unreadable)
    skipped = unreadable if SKIP.value else None
    for example in preparing.convert(part.dataset, part.split, files, unreadable=skipped):
        count += 1
        yield example
    count += len(unreadable) - before
    expected = table.get(part.dataset).splits[part.split].rows
    if not SOURCE.value and expected not in (None, count):
        told = ", ".join(map(str, files))
        raise ValueError(f"{told}: {count} rows, {expected} are published; remove the file to fetch it again")


def published(parts: Sequence[recipes.Part]) -> int | None:
    """Rows of the published files, if all are known."""
    rows = [table.get(part.dataset).splits[part.split].rows for part in parts]
    return None if None in rows else sum(count for count in rows if count is not None)


def chosen(examples: list[dict], recipe: recipes.Recipe, rates: Mapping[str, float]) -> list[dict]:
    """With their pass rates, of which those of the tiers that are asked for."""
    examples = preparing.rated(examples, rates)
    return preparing.tiered(examples, per_tier=recipe.per_tier, seed=SEED.value) if recipe.per_tier else examples


def ruler() -> tuple[Callable[[str], int], str]:
    """What measures a text, and in what."""
    if not TOKENIZER.value:
        return len, "characters"
    from tapojax.tasks import files

    tokenizer = files.load_tokenizer(TOKENIZER.value)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False)), "tokens"


def write(name: str, recipe: recipes.Recipe, parts: Mapping[str, list[tuple[list[dict], int]]], output: Path):
    if FORMAT.value == "tfds":
        rows = {split: writing.repeated(some) for split, some in parts.items()}
        building.write(name, rows, output, kind=recipes.kind(recipe), about=recipe.about)
        return
    for split, some in parts.items():
        if recipe.template:
            some = [
                (verl(recipe, split, m, one), copies)
                for (one, copies), m in zip(some, recipe.splits[split], strict=True)
            ]
        path = output / f"{split}.{FORMAT.value}"
        if FORMAT.value == "jsonl":
            writing.jsonl(path, writing.repeated(some))
        else:
            writing.parquet(path, some)


def verl(recipe: recipes.Recipe, split: str, part: recipes.Part, examples: list[dict]) -> list[dict]:
    how = dict(template=recipe.template, source=part.source or part.dataset, ability=recipe.ability)
    return [preparing.verl_row(example, index, split, **how) for index, example in enumerate(examples)]


def guarded(argv):
    """A mistake in flags, data or files ends in one message and exit status 1."""
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}: options are given as --name=value")
    logging.set_verbosity(logging.WARNING)
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(guarded)

"""TFDS folders give back what was put in, without tensorflow; every data set that is at hand loads with its rows."""

import itertools
import json
import subprocess
import sys

import pytest

from tapojax.datasets import building, labelled, preparing, reading, schema, table
from tests.datasets.layouts import GSM8K, MATH, PROCESSBENCH, critic

PROBLEMS = [schema.example(row, "", str(i)) for i, row in enumerate([*GSM8K, {**MATH, "pass_rate": 0.25}])]
STEPS = [labelled.critique(row, "", str(i)) for i, row in enumerate([{**PROCESSBENCH, "label": 1}, critic(-1)])]
SHARED = {  # file: data set, split, rows as its README says
    "gsm8k_train": ("gsm8k", "train", 7473),
    "gsm8k_test": ("gsm8k", "test", 1319),
    "math_train": ("math", "train", 7500),
    "math_test": ("math", "test", 5000),
    "math500_test": ("math500", "test", 500),
    "aime24_test": ("aime24", "test", 30),
    "aime25_test": ("aime25", "test", 30),
    "amc23_test": ("amc23", "test", 40),
    "amc_aimo83_test": ("aimo_amc83", "test", 83),
    "aime_aimo90_val": ("aimo_aime90", "test", 90),
    "minerva_test": ("minerva", "test", 272),
    "olympiadbench_test": ("olympiadbench", "test", 675),
    "dapo_math_17k": ("dapo_math_17k", "train", 17176),
    "aime_1983_2023_train": ("aime_1983_2023", "train", 975),
    "processbench": ("processbench", "whole", 3400),
    "fapo_critic_100": ("fapo_critic", "train", 100),
    "prmbench": ("prmbench", "test", 6216),
    "prm800k_correct_solutions": ("prm800k", "test", 758),
}


def test_problems_come_back_as_they_were(tmp_path):
    folder = building.write("gsm8k", {"train": PROBLEMS}, tmp_path, kind="problems")
    assert list(schema.examples(reading.iterate(folder), "other", "")) == PROBLEMS


def test_solutions_in_steps_come_back_as_they_were(tmp_path):
    folder = building.write("processbench", {"gsm8k": STEPS}, tmp_path, kind="steps")
    assert [labelled.critique(row, "", "") for row in reading.iterate(folder)] == STEPS


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = building.write("gsm8k", {"train": PROBLEMS}, tmp_path, kind="problems")
    building.write("gsm8k", {"train": PROBLEMS[:1]}, tmp_path, kind="problems")
    assert len(reading.read_rows(folder)) == 1

    def broken():
        yield PROBLEMS[0]
        raise ValueError("row 2 is damaged")

    with pytest.raises(ValueError, match="row 2 is damaged"):
        building.write("gsm8k", {"train": broken()}, tmp_path, kind="problems")
    assert len(reading.read_rows(folder)) == 1
    building.write("gsm8k", {"train": PROBLEMS}, tmp_path, kind="problems")
    assert len(reading.read_rows(folder)) == 3 and [path.name for path in tmp_path.iterdir()] == ["gsm8k"]


def test_tfds_itself_reads_the_folder(tmp_path):
    """By its own random access, which grain reads too."""
    import tensorflow_datasets as tfds

    folder = building.write("gsm8k", {"train": PROBLEMS, "test": PROBLEMS[:1]}, tmp_path, kind="problems")
    source = tfds.builder_from_directory(folder).as_data_source("train")
    assert len(source) == 3 and source[1]["answer"] == b"1234"
    assert tfds.data_source("gsm8k", data_dir=tmp_path, split="test")[0]["problem"].decode() == GSM8K[0]["question"]


def test_tensorflow_is_never_loaded(tmp_path):
    """To build, to read, and to prepare."""
    code = (
        "import sys\nfrom tapojax.datasets import building, reading\nfrom launch import prepare_data\n"
        f"folder = building.write('gsm8k', {{'train': {PROBLEMS!r}}}, {str(tmp_path)!r}, kind='problems')\n"
        "assert len(reading.read_rows(folder)) == 3\n"
        "print([m for m in ('tensorflow', 'jax', 'torch') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_an_unknown_data_set_is_named():
    with pytest.raises(ValueError, match="no data set 'gsm9k': choose one of gsm8k, math, math500"):
        table.get("gsm9k")


def test_the_table_is_of_whole_addresses():
    for name, dataset in table.DATASETS.items():
        assert dataset.kind in ("problems", "steps") and dataset.about.endswith(".")
        urls = [file.url for split in dataset.splits.values() for file in split.files]
        assert len(set(urls)) == len(urls), name
        assert all(url.startswith("https://") and url.endswith((".jsonl", ".json", ".parquet")) for url in urls)


# ---- real files


@pytest.mark.parametrize("file", SHARED)
def test_a_set_at_hand_loads_through_its_builder_with_the_rows_it_is_known_to_have(shared, tmp_path, file):
    name, split, rows = SHARED[file]
    examples = list(preparing.convert(name, split, [shared / f"{file}.jsonl.gz"]))
    folder = building.write(name, {split: examples}, tmp_path, kind=table.get(name).kind)
    kept = reading.read_rows(folder / split)
    assert len(kept) == rows and len({row["id"] for row in kept}) == rows
    for field in ("id", "problem", "answer", *(["steps", "label"] if "steps" in examples[0] else ["solution"])):
        assert [row[field] for row in kept] == [example[field] for example in examples], field
    again = list(itertools.islice(preparing.convert(name, split, [folder / split]), 100))
    assert again == examples[:100]
    raw = reading.read_rows(shared / f"{file}.jsonl.gz")
    field = "label" if table.get(name).kind == "steps" else "answer"
    known = [labelled.UNKNOWN if row[field] is None else row[field] for row in raw]
    assert sum(mine != theirs for mine, theirs in zip((one[field] for one in examples), known, strict=True)) <= 4


def test_every_set_at_hand_is_tried(shared):
    assert {path.name.removesuffix(".jsonl.gz") for path in shared.glob("*.jsonl.gz")} == SHARED.keys()


def test_maths_two_empty_boxes_are_filled(shared, tmp_path):
    """Its published rows have no answer column; two solutions end in an empty box, which their words fill."""
    empty = [row for row in reading.iterate(shared / "math_train.jsonl.gz") if "answer_note" in row]
    published = [{"problem": row["problem"], "solution": row["solution"]} for row in empty]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in published))
    found = list(preparing.convert("math", "train", [tmp_path / "train.jsonl"]))
    assert [row["answer"] for row in found] == [row["answer"] for row in empty] == ["0", "0"]
    with pytest.raises(ValueError, match="train.jsonl, row 1: no value for .'answer'."):
        list(preparing.convert("math500", "test", [tmp_path / "train.jsonl"]))

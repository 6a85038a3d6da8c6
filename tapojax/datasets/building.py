"""TFDS folders (array_record) of our examples, written and read without tensorflow."""

import contextlib
import io
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Example = Mapping[str, Any]
TEXTS = ("id", "problem", "answer", "solution", "prompt", "subject", "level", "source", "subset")


def features(kind: str):
    """What a row of a data set of that kind holds, in TFDS's words."""
    import tensorflow_datasets as tfds

    fields: dict[str, Any] = {name: tfds.features.Text() for name in TEXTS}
    if kind == "steps":
        fields["steps"] = tfds.features.Sequence(tfds.features.Text())
        fields["label"] = tfds.features.Scalar(np.int64)
        fields["final_answer_correct"] = tfds.features.Scalar(np.int64)
    else:
        fields["pass_rate"] = tfds.features.Scalar(np.float64)
    return tfds.features.FeaturesDict(fields)


def builder(name: str, splits: Mapping[str, Iterable[Example]], data_dir: str | Path, *, kind: str, about: str = ""):
    """A TFDS builder of that name whose splits are these examples, of a kind of `table`; rows keep their order."""
    import tensorflow_datasets as tfds

    class Prepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]  # it has a gsm8k
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=features(kind), description=about, disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(examples) for split, examples in splits.items()}

        def _generate_examples(self, examples):
            return enumerate(record(kind, one) for one in examples)

    Prepared.name = name
    return Prepared(data_dir=str(data_dir), file_format="array_record")


def record(kind: str, example: Example) -> dict[str, Any]:
    """An example as a row of `features(kind)`; TFDS has no null: what is missing is "", -1 or NaN."""
    row: dict[str, Any] = {key: str(example.get(key, "")) for key in TEXTS}
    if kind == "steps":
        row |= {"steps": example["steps"], "label": example["label"]}
        row["final_answer_correct"] = int(example.get("final_answer_correct", -1))
    else:
        row["pass_rate"] = float(example.get("pass_rate", "nan"))
    return row


def write(
    name: str, splits: Mapping[str, Iterable[Example]], data_dir: str | Path, *, kind: str, about: str = ""
) -> Path:
    """Builds the folder `data_dir/name/1.0.0`, in place of one that was there once all of it is written."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    unfinished = Path(data_dir) / f".unfinished-{name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    made = builder(name, splits, unfinished, kind=kind, about=about)
    with contextlib.redirect_stdout(io.StringIO()):  # it talks of downloads
        made.download_and_prepare()
    final = Path(data_dir) / name / str(made.version)
    if final.exists():
        shutil.rmtree(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    Path(made.data_dir).rename(final)
    shutil.rmtree(unfinished)
    return final

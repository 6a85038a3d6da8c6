"""Rows come out of every kind of file alike, one after the other; damage names the file and how far it was read."""

import gzip
import itertools
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest

from tapojax.datasets import building, reading

ROWS = [{"id": str(i), "problem": f"π + {i}?", "answer": str(i)} for i in range(300)]
TABLE = pyarrow.Table.from_pylist(ROWS)


def save(path, rows=ROWS):
    """The rows in a file of the kind that its name says."""
    path.parent.mkdir(exist_ok=True, parents=True)
    name = path.name.removesuffix(".gz")
    table = pyarrow.Table.from_pylist(rows)
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(table, path, row_group_size=100, compression="none")
    elif name.endswith(".arrow"):
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        text = "[" + ",\n".join(lines) + "]\n" if "array" in name else "\n".join(lines) + "\n"
        (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8").write(text)
    return path


def save_to_disk(folder):
    """As Hugging Face's datasets do, in two files."""
    files = [save(folder / f"data-0000{i}-of-00002.arrow", rows) for i, rows in enumerate((ROWS[:200], ROWS[200:]))]
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": file.name} for file in files]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def save_tfds(folder, **splits):
    return building.write("numbers", splits or {"train": ROWS}, folder, kind="problems")


KINDS = ["a.jsonl", "a.jsonl.gz", "array.json", "array.json.gz", "lines.json", "lines.json.gz", "a.parquet", "a.arrow"]


@pytest.mark.parametrize("name", KINDS)
def test_rows_of_every_kind_of_file(tmp_path, name):
    assert reading.read_rows(save(tmp_path / name)) == ROWS
    assert reading.read_rows(str(tmp_path / name)) == ROWS
    assert list(itertools.islice(reading.iterate(tmp_path / name), 2)) == ROWS[:2]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "array.json", "lines.json.gz"])
def test_no_rows_are_no_rows(tmp_path, name):
    assert reading.read_rows(save(tmp_path / name, [])) == []


def test_an_arrow_file_that_is_no_stream(tmp_path):
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=100)
    assert reading.read_rows(tmp_path / "a.arrow") == ROWS


def test_a_folder_that_datasets_saved(tmp_path):
    assert reading.read_rows(save_to_disk(tmp_path / "saved")) == ROWS


def test_a_tfds_folder_gives_plain_values_in_their_order(tmp_path):
    folder = save_tfds(tmp_path)
    assert folder == tmp_path / "numbers" / "1.0.0"
    rows = reading.read_rows(folder)
    assert [{key: row[key] for key in ROWS[0]} for row in rows] == ROWS
    assert all(type(value) in (str, float) for value in rows[0].values())
    assert [row["id"] for row in reading.iterate(folder / "train")] == [row["id"] for row in ROWS]


def test_a_split_is_named_behind_its_folder(tmp_path):
    folder = save_tfds(tmp_path, train=ROWS[:200], test=ROWS[200:])
    assert [row["id"] for row in reading.iterate(folder / "test")] == [row["id"] for row in ROWS[200:]]
    for path in (folder, folder / "validation"):
        with pytest.raises(
            ValueError, match=r"1.0.0 has the splits \['test', 'train'\]: name one behind the folder, such"
        ):
            reading.read_rows(path)


def test_numbers_keep_their_digits(tmp_path):
    (tmp_path / "a.json").write_text('[{"answer": 105263157894736842}, {"answer": 27.0}]')
    assert reading.read_rows(tmp_path / "a.json") == [{"answer": 105263157894736842}, {"answer": 27.0}]


# ---- damage


@pytest.mark.parametrize("name", ["a.csv", "a.gz", "a", "a.parquet/x.csv"])
def test_another_kind_is_refused(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"{name.partition('/')[0]}: expected a .parquet, .jsonl, .json"):
        reading.read_rows(tmp_path / name.partition("/")[0] if "/" in name else tmp_path / name)
    with pytest.raises(ValueError, match="no data file at .*none.json: check the path"):
        reading.read_rows(tmp_path / "none.json")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "array.json.gz", "lines.json.gz"])
def test_a_truncated_archive_is_named(tmp_path, name):
    path = save(tmp_path / name)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(ValueError, match=f"{name} is damaged.*fetch the file again"):
        reading.read_rows(path)


def test_a_broken_place_in_an_array_is_named_with_its_line(tmp_path):
    path = save(tmp_path / "array.json")
    lines = path.read_text().splitlines()
    lines[6] = lines[6].replace('"answer"', "answer")
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="array.json, line 7: not JSON .*π . 6"):
        reading.read_rows(path)
    path.write_text('[{"id": 1},\n 7]')
    with pytest.raises(ValueError, match="array.json, row 2: expected an object with the problem's fields, got '7'"):
        reading.read_rows(path)
    path.write_text('{"id": 1}\n{"id": 2')
    with pytest.raises(ValueError, match="array.json, line 2: not JSON"):
        reading.read_rows(path)
    path.write_text('[{"id": 1}')
    with pytest.raises(ValueError, match="array.json, line 1: not JSON"):
        reading.read_rows(path)


@pytest.mark.parametrize("keep", [0, 10, 3000, -10])
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_truncated_table_is_named(tmp_path, name, keep):
    path = save(tmp_path / name)
    if name == "a.arrow" and keep == -10:
        keep = -200  # in the last batch: what ends a stream is not needed
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"{name} is damaged after row \d+: .*fetch the file again"):
        reading.read_rows(path)


def test_a_table_damaged_in_its_middle_says_how_far_it_was_read(tmp_path):
    path = save(tmp_path / "a.parquet", [{"problem": "x" * 50 + str(i)} for i in range(20_000)])
    content = bytearray(path.read_bytes())
    begin = content.index(b"x1" + b"5000")
    content[begin - 60 : begin + 60] = b"\xff" * 120
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a.parquet is damaged after row \d+"):
        reading.read_rows(path)


def test_a_missing_part_of_a_saved_folder_is_named(tmp_path):
    folder = save_to_disk(tmp_path / "saved")
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(
        ValueError, match="saved is damaged: its state.json names data-00001-of-00002.arrow, which is not"
    ):
        reading.read_rows(folder)


@pytest.mark.parametrize("damage", ["missing", "truncated", "features", "flipped", "format"])
def test_a_damaged_tfds_folder_is_named(tmp_path, damage):
    folder = save_tfds(tmp_path)
    (records,) = folder.glob("*.array_record*")
    if damage == "missing":
        records.unlink()
    elif damage == "truncated":
        records.write_bytes(records.read_bytes()[:40_000])
    elif damage == "format":  # which needs tensorflow
        info = json.loads((folder / "dataset_info.json").read_text())
        (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    elif damage == "features":
        (folder / "features.json").write_text("{")
    else:
        content = bytearray(records.read_bytes())
        content[70_000:70_400] = bytes(400)
        content[300:700] = bytes(400)
        records.write_bytes(content)
    with pytest.raises(ValueError, match="1.0.0.* is damaged.*build it again"):
        reading.read_rows(folder)


def test_a_tfds_folder_without_tfds_says_so(tmp_path, monkeypatch):
    folder = save_tfds(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ValueError, match="1.0.0 is a TFDS folder, for which TFDS is not installed"):
        reading.read_rows(folder)


# ---- real files


def test_arrow_files_of_another_trainer(shared):
    assert len(reading.read_rows(shared / "native" / "oat_aime.arrow")) == 30

"""A damaged file is named."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from tapojax.tasks import data

# ---- files

ROWS = [{"problem": "π + 1?", "answer": "4", "level": 2}, {"problem": "a\nb", "answer": "-1", "level": None}]


def write(path, text: str):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.with.dots.jsonl"])
def test_read_jsonl(tmp_path, name):
    assert data.read_rows(write(tmp_path / name, lines(ROWS))) == ROWS
    assert data.read_rows(str(write(tmp_path / name, "\n" + lines(ROWS).replace("\n", "\n\n")))) == ROWS, "blank lines"


def test_read_parquet(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert data.read_rows(tmp_path / "rows.parquet") == ROWS


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize(
    "line, message",
    [('{"problem": "2?", "ans', "not JSON"), ("[1, 2]", "expected an object"), ("nonsense", "not JSON")],
)
def test_a_broken_line_is_named_with_its_file(tmp_path, name, line, message):
    path = write(tmp_path / name, lines(ROWS) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=rf"{name}, line 4: {message}.*{line[:5].replace('[', '.')}"):
        data.read_rows(path)


def test_a_truncated_archive_is_an_error(tmp_path):
    path = write(tmp_path / "rows.jsonl.gz", lines([{"id": i} for i in range(5000)]))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"rows.jsonl.gz is damaged after row \d+: .*fetch the file again"):
        data.read_rows(path)


@pytest.mark.parametrize("place", [0, 2, 40, 3000, -6])
def test_a_damaged_archive_is_an_error(tmp_path, place):
    """In the header, in the compressed text, in the checksum."""
    path = write(tmp_path / "rows.jsonl.gz", lines([{"id": i} for i in range(5000)]))
    broken = bytearray(path.read_bytes())
    broken[place] ^= 0xFF
    path.write_bytes(broken)
    with pytest.raises(ValueError, match=r"rows.jsonl.gz"):
        data.read_rows(path)


def test_text_that_is_not_utf8_is_an_error(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"id": 1}\n{"id": "\xff\xfe"}\n')
    with pytest.raises(ValueError, match="rows.jsonl is damaged after row"):
        data.read_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("content", [b"", b"not parquet at all", None])
def test_a_damaged_parquet_file_is_an_error(tmp_path, content):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    path.write_bytes(path.read_bytes()[:-9] if content is None else content)
    with pytest.raises(ValueError, match="rows.parquet is damaged"):
        data.read_rows(path)


@pytest.mark.parametrize("name", ["rows.txt", "rows.csv", "rows.gz", "rows"])
def test_another_kind_of_file_is_refused(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"{name}: expected a .parquet, .jsonl, .json"):
        data.read_rows(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no data file at .*none.jsonl: check the path .task.train_path"):
        data.read_rows(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="expected a .parquet, .*, a folder of datasets.save_to_disk"):
        data.read_rows(tmp_path)


# ---- completions of a teacher


def taught(tmp_path, *rows):
    return write(tmp_path / "teacher.jsonl", lines(rows))


def test_completions_are_found_by_the_id_of_their_problem(tmp_path):
    rows = [{"id": id, "completion": text} for id, text in [("1", "a"), (2, "b"), ("elsewhere", "c"), ("1", "d")]]
    path = taught(tmp_path, *rows)
    assert data.read_completions(path, [{"id": "1"}, {"id": "3"}]) == {"1": ["a", "d"], "2": ["b"], "elsewhere": ["c"]}


def test_completions_of_other_problems_are_refused(tmp_path):
    path = taught(tmp_path, {"id": "x", "completion": "a"}, {"id": "y", "completion": "b"})
    message = "it has 2, the first 'x', and none of them is among the 1 of task.train_path, the first 'z'"
    with pytest.raises(ValueError, match=message):
        data.read_completions(path, [{"id": "z"}])
    with pytest.raises(ValueError, match="it has 0, the first None"):
        data.read_completions(taught(tmp_path), [])


@pytest.mark.parametrize("row", [{"id": "1"}, {"completion": "a"}, {"id": "1", "completion": ["a"]}])
def test_a_row_that_is_no_completion_is_named(tmp_path, row):
    path = taught(tmp_path, {"id": "1", "completion": "a"}, row)
    with pytest.raises(ValueError, match=r"teacher.jsonl, row 2: expected an id and a completion, it has \['"):
        data.read_completions(path, [{"id": "1"}])

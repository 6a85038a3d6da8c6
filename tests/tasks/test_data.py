"""Rows come in one order that can be taken up anywhere, and a damaged file is named."""

import gzip
import itertools
import json

import grain
import pyarrow
import pyarrow.parquet
import pytest

from tapojax.tasks import data

TEN = [{"id": i} for i in range(10)]


def start(seed=0, batch_size=4, examples=TEN):
    return data.batches(examples, batch_size=batch_size, seed=seed)


def ids(batches, count):
    return [[example["id"] for example in batch] for batch in itertools.islice(batches, count)]


# ---- order


def test_the_seed_decides_the_order():
    assert ids(start(), 8) == ids(start(), 8)
    assert ids(start(seed=0), 8) != ids(start(seed=1), 8)


def test_epochs_hold_each_row_once_and_differ():
    rows = sum(ids(start(), 10), [])
    epochs = [rows[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs), "an epoch is a permutation, also across batches"
    assert len({tuple(epoch) for epoch in epochs}) == 4, "each epoch is shuffled anew"
    assert list(range(10)) not in epochs


@pytest.mark.parametrize("taken", range(8))
def test_a_resumed_order_goes_on_at_the_exact_row(taken):
    """10 rows in batches of 4: batch 3 crosses the border of the first epoch, batch 5 ends the second."""
    whole = ids(start(), 12)
    first = start()
    assert ids(first, taken) == whole[:taken]
    state = json.loads(json.dumps(first.get_state()))  # as a checkpoint's record keeps it
    second = start()
    second.set_state(state)
    assert ids(second, 12 - taken) == whole[taken:]
    assert ids(first, 1) == whole[taken : taken + 1], "asking for the state does not move the order"


def test_a_batch_may_be_all_there_is():
    assert [sorted(batch) for batch in ids(start(batch_size=10), 3)] == [list(range(10))] * 3


def test_too_few_examples_are_an_error():
    with pytest.raises(ValueError, match="10 examples cannot fill a batch of 11: lower prompts_per_step or add data"):
        start(batch_size=11)


def test_any_sequence_will_do():
    class Squares:
        def __len__(self):
            return 10

        def __getitem__(self, index):
            return {"id": index * index}

    (batch,) = ids(start(examples=Squares(), batch_size=10), 1)
    assert sorted(batch) == [i * i for i in range(10)]
    assert isinstance(start(), grain.DatasetIterator)


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


@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "rows.gz", "rows"])
def test_another_kind_of_file_is_refused(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"{name}: expected a .jsonl, .jsonl.gz or .parquet file"):
        data.read_rows(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no data file at .*none.jsonl: check task.train_path"):
        data.read_rows(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="no data file"):
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

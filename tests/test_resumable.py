"""A file that is cut off anywhere goes on at a whole batch, and goes on only with what was asked before."""

import json

import numpy as np
import pytest

from tapojax import resumable
from tapojax.resumable import Batch

ASKED = {"config": {"seed": 0, "temperature": 0.5}, "samples": 8}
BATCHES = [Batch([{"id": f"p{i}{j}", "correct": float(j)} for j in range(2)], {"seconds": 1.5 + i}) for i in range(3)]


def write(path, batches=BATCHES, asked=ASKED):
    with resumable.opened(path, asked) as (done, add):
        for batch in batches:
            add(batch)
    return path.read_bytes()


def read(path, asked=ASKED):
    with resumable.opened(path, asked) as (done, _):
        return list(done)


def test_what_was_written_is_read(tmp_path):
    write(tmp_path / "a.jsonl")
    assert read(tmp_path / "a.jsonl") == BATCHES
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert lines[0] == {"asked": ASKED} and lines[3] == {"batch": 0, "seconds": 1.5} and lines[-1]["batch"] == 2


def test_batches_that_are_added_are_among_the_done_ones(tmp_path):
    with resumable.opened(tmp_path / "a.jsonl", ASKED) as (done, add):
        add(BATCHES[0])
        assert done == BATCHES[:1]


def test_a_file_cut_off_at_any_byte_goes_on_to_the_same_file(tmp_path):
    whole = write(tmp_path / "whole.jsonl")
    for cut in range(len(whole)):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(whole[:cut])
        with resumable.opened(path, ASKED) as (done, add):
            assert done == BATCHES[: len(done)], f"cut at byte {cut}"
            closed = [i for i in range(3) if whole[:cut].count(b'{"batch": ') > i]
            assert len(done) in (len(closed), len(closed) - 1), "a closed batch is not sampled again"
            for batch in BATCHES[len(done) :]:
                add(batch)
        assert path.read_bytes() == whole, f"cut at byte {cut}"


def test_another_question_is_refused(tmp_path):
    write(tmp_path / "a.jsonl")
    other = {"config": {"seed": 0, "temperature": 1.0}, "samples": 8}
    with pytest.raises(
        ValueError, match=r"a.jsonl holds samples of config.temperature=0.5, .* says 1.0: .* another --name"
    ):
        read(tmp_path / "a.jsonl", other)
    assert read(tmp_path / "a.jsonl") == BATCHES, "and left as it was"


def test_numbers_of_any_kind_are_asked_for_alike(tmp_path):
    write(tmp_path / "a.jsonl", [], {"x": np.float32(0.5), "y": (1, 2), "z": np.nan})
    assert read(tmp_path / "a.jsonl", {"x": 0.5, "y": [1, 2], "z": None}) == []


def test_damage_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = write(path).splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b'{"id": "p01", "corr\n', *lines[3:]]))
    with pytest.raises(ValueError, match=r"a.jsonl, line 3 is damaged .* delete the file to sample anew"):
        read(path)


def test_another_file_is_not_written_over(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": "mine"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl does not begin with what was asked"):
        read(tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_text() == '{"id": "mine"}\n'


def test_one_writer_at_a_time(tmp_path):
    with resumable.opened(tmp_path / "a.jsonl", ASKED):
        with pytest.raises(ValueError, match=r"another process is writing .*a.jsonl: wait for it"):
            read(tmp_path / "a.jsonl")
    assert read(tmp_path / "a.jsonl") == []


def test_what_is_no_number_is_null(tmp_path):
    write(tmp_path / "a.jsonl", [Batch([{"correct": float("nan"), "n": np.int64(3)}], {})])
    assert read(tmp_path / "a.jsonl") == [Batch([{"correct": None, "n": 3}], {})]


def test_plain():
    value = {"a": np.float32(0.5), "b": [np.inf, 1], "c": "x", "d": {"e": None, "f": True}}
    assert resumable.plain(value) == {"a": 0.5, "b": [None, 1], "c": "x", "d": {"e": None, "f": True}}


def test_differences_are_named_with_dots():
    old, new = {"a": {"b": 1, "c": 2}, "d": 0}, {"a": {"b": 1, "c": 3}, "e": 5}
    assert resumable.differences(old, new) == {"a.c": (2, 3), "d": (0, None), "e": (None, 5)}
    assert resumable.differences(old, old) == {}

"""The tables say what the evaluations say, and the picture is one."""

import json

import numpy as np
from matplotlib import image

from tapojax import report


def rate(mean, low, high):
    return {"mean": mean, "low": low, "high": high}


BEFORE = {
    "step": 0,
    "pass@1": rate(0.25, 0.2, 0.3),
    "avg@4": 0.25,
    "mean_process": 0.5,
    "problems": 256,
    "samples": 4,
    "errors": 0,
}
AFTER = BEFORE | {"step": 40, "pass@1": rate(0.8125, 0.79, 0.84), "avg@4": 0.8125}


def test_before_after_table():
    assert report.before_after_table(BEFORE, AFTER).splitlines() == [
        "| 256 held-out problems x 4 samples | before | after |",
        "|---|---|---|",
        "| pass@1 | 0.250 [0.200, 0.300] | 0.812 [0.790, 0.840] |",
        "| avg@4 | 0.250 | 0.812 |",
        "| mean_process | 0.500 | 0.500 |",
    ]


def test_a_rate_of_nothing_is_shown_as_none():
    """Where no sample could be scored the file says null."""
    nothing = AFTER | {"pass@1": rate(None, None, None), "avg@4": None}
    table = report.before_after_table(BEFORE, nothing)
    assert "| pass@1 | 0.250 [0.200, 0.300] | none [none, none] |" in table
    assert "| avg@4 | 0.250 | none |" in table


def test_read_jsonl(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    assert report.read_jsonl(tmp_path / "a.jsonl") == [{"step": 0}, {"step": 1}]
    assert report.read_jsonl(tmp_path / "none.jsonl") == []


def write_run(folder, evaluations):
    steps = [{"step": i, "accuracy": i / 20, "entropy": 1 / (i + 1), "length_mean": 10.0 + i} for i in range(20)]
    steps[3]["accuracy"] = None
    for name, records in {"metrics": steps, "evaluations": evaluations}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_the_curve_is_a_picture(tmp_path):
    write_run(tmp_path, [BEFORE, AFTER | {"step": 10, "pass@1": rate(None, None, None)}, AFTER | {"step": 20}])
    path = report.draw_curve(tmp_path, "GRPO · arithmetic · seed 0")
    assert path == tmp_path / "curve.png"
    height, width = image.imread(path).shape[:2]
    assert 1000 < width < 2000 and 400 < height < 900 and 10_000 < path.stat().st_size < 300_000


def test_the_curve_shows_the_evaluations(tmp_path):
    """Blue pixels, the colour of held-out pass@1, are there only when there are evaluations."""

    def blue(evaluations):
        write_run(tmp_path, evaluations)
        pixels = image.imread(report.draw_curve(tmp_path, "title"))[..., :3]
        return int(np.all(np.abs(pixels - np.array([31, 119, 180]) / 255) < 0.02, axis=-1).sum())

    assert blue([BEFORE, AFTER]) > blue([]) + 300


def test_injected_rows_are_counted_by_source(tmp_path, capsys):
    write_run(tmp_path, [BEFORE, AFTER])
    rows = [{"step": 0, "row": row, "source": source} for row, source in enumerate([1, 3, 1])]
    (tmp_path / "injections.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = report.finish(tmp_path, steps=40, title="a run", seconds={})
    assert summary["injected_rows_by_source"] == {"1": 2, "3": 1}
    assert "injected 2 of source 1, 1 of source 3; each is in injections.jsonl" in capsys.readouterr().out

"""`python -m launch.prepare_data`, from files and from a server: what it writes, reports, and says when it cannot."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tapojax.datasets import reading, schema
from tests.datasets.layouts import GSM8K, INSTRUCTION, critic
from tests.datasets.servers import Files, serving
from tests.tasks.test_files import save_tokenizer

ROOT = Path(__file__).parents[2]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(rows):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


TRAIN = [{"question": f"{n} plus {n} apples are how many?", "answer": f"So.\n#### {2 * n}"} for n in range(8)]
TEST = [TRAIN[3], *GSM8K]
DAPO = [{"prompt": f"What is {n}+1?", "solution": str(n + 1)} for n in range(3)]
AIME24 = [{"ID": f"2024-I-{n}", "Problem": f"AIME {n}?", "Solution": "It is.", "Answer": n} for n in range(2)]
AIME25 = [{"prompt": f"AIME25 {n}?\n{INSTRUCTION}", "answer": n} for n in range(2)]
PUBLISHED = {
    "/grade_school_math/data/train.jsonl": lines(TRAIN).encode(),
    "/grade_school_math/data/test.jsonl": lines(TEST).encode(),
    "/all/train-00000-of-00001.parquet": parquet(DAPO),
    "/aime_2024_problems.parquet": parquet(AIME24),
    "/train.parquet": parquet([critic(1), critic(-1)]),
    "/test.parquet": parquet([critic(0)]),
}


@pytest.fixture
def home(tmp_path):
    """The published files in a folder; those that have a checksum are given by name."""
    for path, content in PUBLISHED.items():
        file = tmp_path / "home" / path.removeprefix("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    (tmp_path / "home" / "aime25.jsonl").write_text(lines(AIME25))
    return tmp_path / "home"


def prepare(output, *flags):
    command = [sys.executable, "-m", "launch.prepare_data", f"--output={output}", f"--cache={output.parent / 'cache'}"]
    return subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)


def prepared(output, *flags):
    result = prepare(output, *flags)
    assert result.returncode == 0, result.stderr
    return json.loads((output / "report.json").read_text()), result.stdout


def refused(output, *flags):
    result = prepare(output, *flags)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert not (output / "report.json").exists()
    return result.stderr


def test_a_set_is_downloaded_converted_and_reported(tmp_path):
    files = Files(PUBLISHED)
    files.plan = ["break"]  # once: it goes on
    with serving(files) as address:
        report, said = prepared(tmp_path / "out", "--dataset=gsm8k", f"--source={address}")
        assert len(files.requests) == 3
        prepared(tmp_path / "out", "--dataset=gsm8k", f"--source={address}")
        assert len(files.requests) == 3, "what is in the cache is not asked for again"
    rows = reading.read_rows(tmp_path / "out" / "train.jsonl")
    assert [(row["id"], row["problem"], row["answer"]) for row in rows[:1]] == [
        ("gsm8k/train/0", TRAIN[0]["question"], "0")
    ]
    assert len(rows) == 8 and len(reading.read_rows(tmp_path / "out" / "test.jsonl")) == 3
    assert report["splits"]["train"]["read"] == 8 and report["splits"]["train"]["published"] == 7473
    (overlap,) = report["overlaps"]
    assert overlap["pairs"] == [["gsm8k/train/3", "gsm8k/test/0", "exact"]]
    assert said.startswith("# gsm8k\n") and f"written  to {tmp_path / 'out'}" in said
    assert (tmp_path / "out" / "report.md").read_text().strip() in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "report.json", "report.md", "test.jsonl", "train.jsonl",
    ]  # fmt: skip


@pytest.mark.parametrize("format", ["parquet", "tfds"])
def test_other_formats_hold_the_same(tmp_path, home, format):
    report, _ = prepared(tmp_path / "out", "--dataset=gsm8k", f"--source={home}", f"--format={format}", "--repeat=2")
    path = tmp_path / "out" / ("train.parquet" if format == "parquet" else "gsm8k/1.0.0/train")
    found = [row["answer"] for row in schema.examples(reading.iterate(path), "", "")]
    assert found == [str(2 * n) for n in range(8)] * 2
    assert report["splits"]["train"]["rows"] == 16 and report["splits"]["train"]["examples"] == 8


def test_flags_deduplicate_measure_in_tokens_and_compare(tmp_path, home):
    path, other = tmp_path / "mine.jsonl", tmp_path / "other.jsonl"
    path.write_text(lines([*TRAIN, *TRAIN, {**TRAIN[2], "answer": "#### 5"}]))
    other.write_text(lines([{"problem": TRAIN[5]["question"], "answer": "10"}]))
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    report, _ = prepared(
        tmp_path / "out", "--dataset=gsm8k", f"--source=train={path}", "--deduplicate", f"--tokenizer={tokenizer}",
        f"--against={other},{home}/grade_school_math/data/test.jsonl",
    )  # fmt: skip
    assert list(report["splits"]) == ["train"] and report["unit"] == "tokens"
    train = report["splits"]["train"]
    assert (train["read"], train["different"], train["repeated"], train["rows"]) == (17, 8, 8, 7)
    assert train["contradictory"] == {"gsm8k/train/2": ["4", "5"]}
    assert [(one["with"], one["exact"]) for one in report["overlaps"]][0] == (str(other), 1)
    assert report["overlaps"][1]["exact"] == 1
    assert train["lengths"]["answer"] == {"min": 1, "median": 1, "mean": 1.4, "p95": 2, "max": 2}


def test_fapos_recipe(tmp_path, home):
    """Training problems 20 times, AIME of 2024 and of 2025 32 times, the instruction behind a blank line, as verl's."""
    flags = [f"--source=aime25/test={home}/aime25.jsonl,aime24/test={home}/aime_2024_problems.parquet"]
    flags[0] += f",dapo_processed/train={home}/all/train-00000-of-00001.parquet"
    report, _ = prepared(tmp_path / "out", "--recipe=fapo", "--format=parquet", *flags)
    train, test = (reading.read_rows(tmp_path / "out" / f"{split}.parquet") for split in ("train", "test"))
    assert len(train) == 60 == report["splits"]["train"]["rows"] and len(test) == 128
    assert train[0] == train[3] and train[0] == {
        "data_source": "math-dapo",
        "prompt": [
            {
                "role": "user",
                "content": f"What is 0+1?\n\n{INSTRUCTION}",
            }
        ],
        "ability": "Math",
        "reward_model": {"style": "rule", "ground_truth": "1"},
        "extra_info": {"split": "train", "index": 0, "question": "What is 0+1?", "id": "dapo_processed/train/0"},
    }
    assert [row["data_source"] for row in test] == ["aime24"] * 64 + ["aime25"] * 64
    assert test[0]["extra_info"]["question"] == "AIME 0?" and test[-1]["extra_info"]["question"] == "AIME25 1?"
    assert test[-1]["reward_model"]["ground_truth"] == "1"


def test_fapos_recipe_for_its_critic(tmp_path, home):
    prepared(tmp_path / "out", "--recipe=fapo_critic", f"--source={home}")
    rows = reading.read_rows(tmp_path / "out" / "train.jsonl")
    assert [row["label"] for row in rows] == [1, -1] and rows[0]["steps"] == ["One and one.\nTogether.", "so 2"]
    assert rows[0]["prompt"].startswith("The following is a math problem")


def test_papos_recipe(tmp_path):
    """As many problems of each tier of pass rates; what is never solved is left out."""
    numina, rates = tmp_path / "numina.jsonl", tmp_path / "rates.jsonl"
    rows = [
        {"id": f"n/{i}", "problem": f"problem {i} of many?", "answer": str(i), "solution": "So."} for i in range(36)
    ]
    numina.write_text(lines(rows))
    rates.write_text(lines({"id": f"n/{i}", "pass_rate": (i % 9) / 8} for i in range(36)))
    flags = ["--recipe=papo", f"--source=numina_verifiable/train={numina}", f"--pass_rates={rates}"]
    report, _ = prepared(tmp_path / "out", *flags, "--per_tier=4")
    drawn = reading.read_rows(tmp_path / "out" / "train.jsonl")
    assert len(drawn) == 20 == report["splits"]["train"]["rows"] and all(row["pass_rate"] > 0 for row in drawn)
    assert sum(row["pass_rate"] == 1 for row in drawn) == 4 and report["splits"]["train"]["rated"] == 36
    assert "fewer than 4000 problems: (0.875, 1.0]: 4," in refused(tmp_path / "all", *flags)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "give --dataset or --recipe, one of the two"),
        (["--dataset=gsm8k", "--recipe=fapo"], "give --dataset or --recipe, one of the two"),
        (["--dataset=gsm9k"], "no data set 'gsm9k': choose one of gsm8k"),
        (["--recipe=hapo"], "no recipe 'hapo'"),
        (["--recipe=fapo", "--repeat=2"], "--repeat is for --dataset: the recipe 'fapo' has its own copies"),
        (["--dataset=rtpo_traces"], "rtpo_traces has no address to download from: give --source=train=PATH"),
        (["--dataset=gsm8k", "--source=train=none.jsonl"], "no data file at none.jsonl"),
        (["--dataset=gsm8k", "--template=hello"], "--template='hello' needs {problem}; write other braces twice"),
        (
            ["--dataset=gsm8k", "--template={problem} \\boxed{}"],
            "needs {problem}; write other braces twice, \\boxed{{}}",
        ),
        (
            ["--recipe=fapo", "--source=test=a.jsonl"],
            "--source=test=a.jsonl: aime24/test and aime25/test are both test, say --source=aime24/test=",
        ),
        (["--dataset=gsm8k", "--template={problem}", "--format=tfds"], "--format=tfds has no place for a template"),
        (["--dataset=processbench", "--template={problem}"], "--template is for problems"),
        (["gsm8k"], "unexpected argument 'gsm8k'"),
    ],
)
def test_mistakes_are_named(tmp_path, flags, said):
    assert said in refused(tmp_path / "out", *flags)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lines(GSM8K) + '{"question": "1?"}\n', "test.jsonl, row 3: no value for ['answer']"),
        (lines(GSM8K) + '{"question": ', "test.jsonl, line 3: not JSON"),
        (lines([{**GSM8K[0], "question": ["a"]}]), "test.jsonl, row 1: expected question to be a text or messages"),
    ],
)
def test_a_damaged_file_names_file_and_row_and_nothing_is_written(tmp_path, content, said):
    (tmp_path / "test.jsonl").write_text(content)
    assert said in refused(tmp_path / "out", "--dataset=gsm8k", f"--source=test={tmp_path / 'test.jsonl'}")
    assert not (tmp_path / "out").exists()


def test_unreadable_rows_can_be_left_out_and_are_reported(tmp_path):
    (tmp_path / "test.jsonl").write_text(lines([{"question": "1?", "answer": ""}, *GSM8K]))
    flags = ["--dataset=gsm8k", f"--source=test={tmp_path / 'test.jsonl'}"]
    report, said = prepared(tmp_path / "out", *flags, "--skip_unreadable")
    assert len(reading.read_rows(tmp_path / "out" / "test.jsonl")) == 2
    assert "- 1 more are left out as unreadable" in said
    assert "test.jsonl, row 1: no value for ['answer']" in report["splits"]["test"]["unreadable"][0]
    (tmp_path / "test.jsonl").write_text(lines(GSM8K) + "{")
    assert "line 3: not JSON" in refused(tmp_path / "again", *flags, "--skip_unreadable"), "that is damage"


def test_a_download_of_another_file_or_half_a_file_is_refused(tmp_path):
    with serving(Files({"/test.jsonl": lines(GSM8K).encode()})) as address:
        said = refused(tmp_path / "out", "--dataset=math500", f"--source={address}")
        sha256 = hashlib.sha256(lines(GSM8K).encode()).hexdigest()
        assert f"its sha256 is {sha256}, expected 35dc41080a36" in said
        assert list((tmp_path / "cache").iterdir()) == []


def test_published_files_have_the_rows_that_are_published(monkeypatch, tmp_path):
    """Without --source a set that has shrunk, or was cut off at the end of a line, is refused."""
    from absl import flags

    from launch import prepare_data
    from tapojax.datasets import sourcing

    path = tmp_path / "test.jsonl"
    path.write_text(lines(GSM8K))
    monkeypatch.setattr(sourcing, "files", lambda *_: [path])
    flags.FLAGS(["prepare_data", "--dataset=gsm8k", f"--output={tmp_path}"])
    with pytest.raises(ValueError, match="test.jsonl: 2 rows, 1319 are published; remove the file to fetch it again"):
        list(prepare_data.read(prepare_data.recipes.Part("gsm8k", "test"), []))


def test_one_file_is_no_two_splits(tmp_path, home):
    path = home / "aime25.jsonl"
    said = refused(tmp_path / "out", "--dataset=gsm8k", f"--source=train={path},test={path}")
    assert f"{path} would be both gsm8k/train, file 0 and gsm8k/test, file 0" in said


def test_pass_rates_of_other_problems_are_refused(tmp_path):
    (tmp_path / "test.jsonl").write_text(lines([{"id": f"n/{i}", **row} for i, row in enumerate(GSM8K)]))
    (tmp_path / "rates.jsonl").write_text(lines([{"id": "m/0", "pass_rate": 0.5}]))
    flags = ["--dataset=gsm8k", f"--source=test={tmp_path}/test.jsonl", f"--pass_rates={tmp_path}/rates.jsonl"]
    said = refused(tmp_path / "out", *flags)
    assert "rates.jsonl rates other problems: it has 1 ids, the first 'm/0', and none is of these problems" in said
    (tmp_path / "rates.jsonl").write_text(lines([{"id": "n/1", "pass_rate": 0.5}]))
    report, told = prepared(tmp_path / "out", *flags, "--template={problem} Think.")
    assert report["splits"]["test"]["rated"] == 1 and "- 1 are in the file of pass rates" in told
    rows = reading.read_rows(tmp_path / "out" / "test.jsonl")
    assert [row.get("pass_rate") for row in rows] == [None, 0.5] and rows[0]["solution"] == GSM8K[0]["answer"]


def test_a_config_trains_on_what_was_prepared(tmp_path, home):
    """Any format, without naming a column."""
    from tests.tasks.test_files import make

    prepared(tmp_path / "out", "--dataset=gsm8k", f"--source={home}", "--format=tfds")
    task = make(save_tokenizer(tmp_path / "tokenizer"), str(tmp_path / "out/gsm8k/1.0.0/train"))
    assert [example["answer"] for example in task.train] == [str(2 * n) for n in range(8)]

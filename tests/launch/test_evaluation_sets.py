"""--sets and --protocol: what is evaluated, with which numbers, and what a reader is told of it."""

import gzip
import json

import pytest

from configs import base, hapo_math, quickstart
from launch import build, evaluation_sets
from tapojax.protocols import PROTOCOLS
from tests.tasks.test_files import save_tokenizer

HAPO = PROTOCOLS["hapo"]


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def sums(count, first=0):
    return [{"id": f"s{i}", "problem": f"{i}+7?", "answer": str(i + 7)} for i in range(first, first + count)]


@pytest.fixture(scope="module")
def gym():
    config = quickstart.get_config("quicktest")
    return config, build.task(config)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    config = base.get_config(task="files")
    config.task.tokenizer_path = save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    config.sampling.max_prompt_tokens = 120
    return config, build.task(config)


def chosen(entries, setting, protocol=None, **overrides):
    config, task = setting
    return evaluation_sets.chosen(entries, config, task, protocol, overrides)


# ---- sets


def test_sets_are_files_and_the_configs_own(gym, tmp_path):
    path = write(tmp_path / "easy_test.jsonl.gz", sums(3))
    own, easy, named = chosen(["own", path, f"again={path}"], gym)
    assert (own.name, own.path, len(own.examples), own.samples) == ("arithmetic", "", 32, 4)
    assert (easy.name, easy.path, easy.examples, easy.rows) == ("easy", path, sums(3), 3)
    assert named.name == "again" and named.digest == easy.digest != own.digest
    assert len(easy.sha256) == 64 and own.sha256 == ""


def test_the_digest_is_of_problems_and_answers(gym, tmp_path):
    given = {
        "a": sums(3),
        "same": [{**row, "id": "x", "level": 1} for row in sums(3)],
        "order": sums(3)[::-1],
        "answers": [{**row, "answer": "1"} for row in sums(3)],
    }
    digests = {name: chosen([write(tmp_path / f"{name}.jsonl", rows)], gym)[0].digest for name, rows in given.items()}
    assert digests["a"] == digests["same"] and len(set(digests.values())) == 3


def test_a_task_that_reads_files_reads_the_sets(files, tmp_path):
    rows = [{"id": "long", "problem": "1 + " * 100 + "1?", "answer": "101"}, *sums(2)]
    config, task = files
    config = config.copy_and_resolve_references()
    config.task.overlong_prompts, config.task.train_path = "drop", "not_there.jsonl"
    (found,) = evaluation_sets.chosen([write(tmp_path / "a.jsonl", rows)], config, task, None, {})
    assert [example["id"] for example in found.examples] == ["s0", "s1"] and found.rows == 3
    said = evaluation_sets.notes(None, [found])
    assert said == ["a: 1 of 3 rows left out, their prompts are too long"]


def test_the_own_set_of_a_file_has_its_name(files, tmp_path):
    config, _ = files
    config = config.copy_and_resolve_references()
    config.task.evaluation_path = write(tmp_path / "amc_aimo83_test.jsonl", sums(2))
    task = build.task(config)
    assert chosen(["own"], (config, task))[0].name == "amc_aimo83"
    assert chosen(["own"], (config, task), HAPO)[0].name == "amc"


def test_a_folder_stands_for_the_protocols_sets_in_it(gym, tmp_path):
    for name in ("math500_test.jsonl", "aime24.jsonl", "other.jsonl"):
        write(tmp_path / name, sums(2))
    found = chosen([str(tmp_path)], gym, HAPO)
    assert [(p.name, p.samples) for p in found] == [("aime24", 8), ("math500", 8)], "in the protocol's order"
    write(tmp_path / "aime24_test.jsonl", sums(2))
    with pytest.raises(ValueError, match=r"has 2 files of aime24: .* say --sets=aime24=..."):
        chosen([str(tmp_path)], gym, HAPO)


def tfds(folder, *splits):
    folder.mkdir(parents=True)
    (folder / "features.json").write_text("{}")
    for split in splits:
        (folder / f"x-{split}.array_record-00000-of-00001").write_text("")
    return str(folder)


def test_a_protocol_finds_what_prepare_data_writes(gym, tmp_path):
    """`--output=data/aime24` holds test.jsonl, report.json and report.md."""
    for name in ("aime24", "aimo_amc83", "gsm8k", "minerva"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text("{}")
        write(tmp_path / name / ("train.jsonl" if name == "minerva" else "test.jsonl"), sums(2))
    (tmp_path / "aime24" / "test.jsonl.part").write_text("")
    found = chosen([str(tmp_path)], gym, HAPO)
    paths = [str(tmp_path / name / "test.jsonl") for name in ("aime24", "aimo_amc83")]
    assert [(p.name, p.path) for p in found] == list(zip(["aime24", "amc"], paths, strict=True))
    tfds(tmp_path / "math500" / "math500" / "1.0.0", "test")
    tfds(tmp_path / "olympiadbench" / "1.0.0")
    named = evaluation_sets._named(str(tmp_path), gym[0], HAPO)
    assert named[2:] == [
        ("math500", f"{tmp_path}/math500/math500/1.0.0/test"),
        ("olympiadbench", f"{tmp_path}/olympiadbench/1.0.0"),
    ]


def test_a_prepared_folder_is_one_set(gym, tmp_path):
    (tmp_path / "aimo_amc83").mkdir()
    path = write(tmp_path / "aimo_amc83" / "test.jsonl.gz", sums(2))
    for protocol, name in ((None, "aimo_amc83"), (HAPO, "amc")):
        (found,) = chosen([str(tmp_path / "aimo_amc83")], gym, protocol)
        assert (found.name, found.path) == (name, path) and chosen([path], gym, protocol)[0].name == name
    (again,) = chosen([f"again={tmp_path / 'aimo_amc83'}"], gym)
    assert (again.name, again.path) == ("again", path)
    write(tmp_path / "aimo_amc83" / "test.json", sums(2))
    with pytest.raises(ValueError, match=r"aimo_amc83 has 2 sets, .*test.json, .*test.jsonl.gz: say --sets=NAME=FILE"):
        chosen([str(tmp_path / "aimo_amc83")], gym)


@pytest.mark.parametrize(
    "path, name",
    [
        ("data/gsm8k/1.0.0", "gsm8k"),
        ("/data/gsm8k/1.0.0/test", "gsm8k"),
        ("some/aime25-test.parquet", "aime25"),
        ("aime24", "aime24"),
        ("data/aime24/test.jsonl", "aime24"),
    ],
)
def test_names_of_sets(path, name):
    assert evaluation_sets._name(path, None) == name


def test_a_written_data_set_is_a_folder_and_one_set(gym, tmp_path):
    folder = tmp_path / "gsm8k" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "features.json").write_text("{}")
    assert evaluation_sets._named(str(folder), gym[0], None) == [("gsm8k", str(folder))]
    one = evaluation_sets._file_digest(folder)
    (folder / "data").write_text("rows")
    assert evaluation_sets._file_digest(folder) != one
    assert evaluation_sets._file_digest(folder / "test") == evaluation_sets._file_digest(folder), "of a split"


# ---- mistakes


@pytest.mark.parametrize(
    "entries, said",
    [
        (["missing.jsonl"], r"no data file at missing.jsonl"),
        (["EMPTY"], r"empty.jsonl has 0 rows and no problem to evaluate on: it is empty"),
        (["a=ROWS", "a=ROWS"], r"--sets has two sets called 'a': name one, --sets=other=.*rows.jsonl"),
        (["FOLDER"], r"is a folder: name its files, or a --protocol whose sets are in it"),
        (["BAD"], r"bad.jsonl, row 1: the task 'arithmetic' takes rows with id, problem and answer, \['answer'\]"),
    ],
)
def test_mistakes_are_named(gym, tmp_path, entries, said):
    paths = {
        "EMPTY": write(tmp_path / "empty.jsonl", []),
        "ROWS": write(tmp_path / "rows.jsonl", sums(1)),
        "BAD": write(tmp_path / "bad.jsonl", [{"id": "a", "problem": "1+1?"}]),
        "FOLDER": str(tmp_path),
    }
    for name, path in paths.items():
        entries = [entry.replace(name, path) for entry in entries]
    with pytest.raises(ValueError, match=said):
        chosen(entries, gym)


def test_a_set_whose_prompts_are_all_too_long(files, tmp_path):
    config, task = files
    config = config.copy_and_resolve_references()
    config.task.overlong_prompts, config.sampling.max_prompt_tokens = "drop", 5
    path = write(tmp_path / "a.jsonl", sums(2))
    with pytest.raises(ValueError, match="a.jsonl has 2 rows and no problem .* longer than sampling.max_prompt_tokens"):
        evaluation_sets.chosen([path], config, task, None, {})


def test_a_config_without_problems(files):
    with pytest.raises(ValueError, match="the task 'files' has no problems to evaluate on: give --sets=file"):
        chosen(["own"], files)


def test_a_folder_without_the_protocols_sets(gym, tmp_path):
    with pytest.raises(ValueError, match=r"has no file of the protocol's sets \['aime24', .*: name them"):
        chosen([str(tmp_path)], gym, HAPO)


# ---- protocols


def test_a_protocol_puts_its_numbers_into_the_config():
    config = quickstart.get_config("quicktest")
    assert evaluation_sets.follow(HAPO, config, {}) == []
    assert (config.evaluation.temperature, config.evaluation.top_p) == (0.5, 0.7)
    assert (config.sampling.max_prompt_tokens, config.sampling.max_tokens) == (1024, 10240)


def test_the_command_line_goes_before_the_protocol_and_is_told():
    config = quickstart.get_config("quicktest")
    config.evaluation.temperature, config.sampling.max_tokens, config.evaluation.top_p = 0.9, 24, 0.7
    given = {"evaluation.temperature": 0.9, "sampling.max_tokens": 24, "evaluation.top_p": 0.7}
    assert evaluation_sets.follow(HAPO, config, given) == [
        "evaluation.temperature=0.9 instead of the protocol's 0.5",
        "sampling.max_tokens=24 instead of the protocol's 10240",
    ]
    assert (config.evaluation.temperature, config.sampling.max_tokens) == (0.9, 24)
    assert config.sampling.max_prompt_tokens == 1024


def test_what_the_paper_leaves_open_comes_from_the_config_and_is_told():
    config = hapo_math.get_config()
    (note,) = evaluation_sets.follow(PROTOCOLS["tapo"], config, {})
    assert "the paper does not say: samples, temperature and top_p are our choice" in note
    assert config.sampling.max_tokens == 10240 and config.evaluation.temperature == 0.6
    assert evaluation_sets.follow(None, config, {}) == []


def test_samples_are_the_protocols_set_by_set(gym, tmp_path):
    paths = [write(tmp_path / f"{name}.jsonl", sums(2)) for name in ("aime24", "gpqa", "mine")]
    assert [(p.name, p.samples) for p in chosen(paths, gym, PROTOCOLS["fapo"])] == [
        ("aime24", 32),
        ("gpqa_diamond", 4),
        ("mine", 4),
    ]
    config = quickstart.get_config("quicktest")
    config.evaluation.samples = 2
    found = evaluation_sets.chosen(paths, config, gym[1], PROTOCOLS["fapo"], {"evaluation.samples": 2})
    assert [p.samples for p in found] == [2, 2, 2]
    assert evaluation_sets.notes(PROTOCOLS["fapo"], found) == [
        "aime24 has 2 problems, published are 30",
        "gpqa_diamond has 2 problems, published are 198",
        "mine is no set of the protocol; its samples are the config's",
        "samples of a problem are 2 instead of the protocol's 32: aime24",
        "samples of a problem are 2 instead of the protocol's 4: gpqa_diamond",
        "sets of the protocol that were not evaluated: aime25",
    ]


def test_a_prepared_file_that_repeats_its_problems_is_told(gym, tmp_path):
    found = chosen([write(tmp_path / "a.jsonl", sums(3) * 4)], gym)
    assert evaluation_sets.notes(None, found) == ["a: 9 of 12 problems repeat others; the intervals count them as new"]
    assert evaluation_sets.notes(None, chosen([write(tmp_path / "b.jsonl", sums(3))], gym)) == []


@pytest.mark.parametrize(
    "problems, at_most, data, want", [(30, 64, 1, 30), (65, 64, 1, 33), (675, 64, 1, 62), (30, 64, 8, 32), (3, 8, 4, 4)]
)
def test_batches_are_as_equal_as_the_devices_allow(problems, at_most, data, want):
    config = quickstart.get_config()
    config.evaluation.batch_prompts, config.mesh.data = at_most, data
    got = evaluation_sets.batch_prompts(problems, config)
    assert got == want and got <= at_most and got % data == 0


def test_the_real_sets_are_read(files, shared):
    config, task = files
    config = config.copy_and_resolve_references()
    config.task.overlong_prompts, config.sampling.max_prompt_tokens = "drop", 1024
    found = evaluation_sets.chosen([str(shared)], config, task, PROTOCOLS["tapo"], {})
    assert [(p.name, len(p.examples), p.samples) for p in found] == [("aime24", 30, 8)]
    assert evaluation_sets.notes(PROTOCOLS["tapo"], found) == []

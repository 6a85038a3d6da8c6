"""Each paper's numbers, written down a second time, and the names that files of the sets have."""

import pytest

from configs import fapo_math, hapo_math, papo_math, tapo_math
from tapojax import protocols
from tapojax.protocols import PROTOCOLS


@pytest.mark.parametrize(
    "name, samples, temperature, top_p, prompt, tokens",
    [
        (
            "hapo",
            {"aime24": 8, "aime25": 8, "amc": 8, "math500": 8, "olympiadbench": 8, "minerva": 8},
            0.5,
            0.7,
            1024,
            10240,
        ),
        ("fapo", {"aime24": 32, "aime25": 32, "gpqa_diamond": 4}, 1.0, 0.7, 2048, None),
        (
            "papo",
            {"olympiadbench": 4, "aime24": 4, "aime25": 4, "math500": 4, "gpqa_diamond": 4},
            0.7,
            1.0,
            2048,
            8192,
        ),
        ("tapo", {"aime24": 8}, 0.6, 0.95, None, None),
    ],
)
def test_the_numbers_of_the_papers(name, samples, temperature, top_p, prompt, tokens):
    protocol = PROTOCOLS[name]
    assert {s.name: s.samples for s in protocol.sets} == samples
    assert (protocol.temperature, protocol.top_p) == (temperature, top_p)
    assert (protocol.max_prompt_tokens, protocol.max_tokens) == (prompt, tokens)


def test_problems_are_those_published():
    counts = {s.name: s.problems for s in PROTOCOLS["hapo"].sets}
    assert counts == {
        "aime24": 30,
        "aime25": 30,
        "amc": 83,
        "math500": 500,
        "olympiadbench": 675,
        "minerva": 272,
    }
    assert [s.problems for s in PROTOCOLS["fapo"].sets] == [30, 30, 198]


@pytest.mark.parametrize(
    "name, config", [("hapo", hapo_math), ("fapo", fapo_math), ("papo", papo_math), ("tapo", tapo_math)]
)
def test_the_papers_own_configs_evaluate_likewise(name, config):
    section, protocol = config.get_config().evaluation, PROTOCOLS[name]
    assert (section.temperature, section.top_p) == (protocol.temperature, protocol.top_p)
    assert section.samples == protocol.sets[0].samples


def test_what_a_paper_leaves_open_is_said():
    for protocol in PROTOCOLS.values():
        assert protocol.silent and protocol.source and protocol.headline
    assert "top_p is our choice" in PROTOCOLS["papo"].silent
    assert "samples, temperature and top_p are our choice" in PROTOCOLS["tapo"].silent


@pytest.mark.parametrize(
    "protocol, file, name",
    [
        ("hapo", "aime24.jsonl", "aime24"),
        ("hapo", "AIME24_test.jsonl.gz", "aime24"),
        ("hapo", "amc_aimo83_test.jsonl.gz", "amc"),
        ("hapo", "math-500.parquet", "math500"),
        ("hapo", "minerva_math-test.jsonl", "minerva"),
        ("papo", "olympiadbench_test.jsonl.gz", "olympiadbench"),
        ("fapo", "gpqa.jsonl", "gpqa_diamond"),
        ("hapo", "aimo_amc83", "amc"),
        ("hapo", "aime-2024.parquet", "aime24"),
        ("fapo", "aime_2024_problems.parquet", "aime24"),
        ("papo", "aime-2025.parquet", "aime25"),
        ("hapo", "aime_2025_problems.parquet", "aime25"),
        ("hapo", "MATH-500", "math500"),
        ("hapo", "amc23_test.jsonl.gz", None),
        ("hapo", "math_test.jsonl.gz", None),
        ("tapo", "math500.jsonl", None),
    ],
)
def test_files_are_known_by_their_names(protocol, file, name):
    found = protocols.set_named(PROTOCOLS[protocol], file)
    assert (found and found.name) == name


def test_no_file_name_is_of_two_sets():
    for protocol in PROTOCOLS.values():
        names = [name for s in protocol.sets for name in (s.name, *protocols.FILES.get(s.name, ()))]
        assert len(names) == len(set(names))
    assert protocols.FILES.keys() <= {s.name for protocol in PROTOCOLS.values() for s in protocol.sets}


def test_the_protocols_find_their_sets_in_a_folder_of_real_files(shared):
    files = [file.name for file in shared.glob("*.jsonl.gz")]
    wanted = {s.name for s in PROTOCOLS["hapo"].sets}
    found = [s.name for s in (protocols.set_named(PROTOCOLS["hapo"], file) for file in files) if s]
    assert sorted(found) == sorted(wanted), "each once"


@pytest.mark.parametrize(
    "path, name",
    [
        ("data/aime24/test.jsonl", "aime24"),
        ("data/numina/train.jsonl", "numina"),
        ("MATH-500/validation.parquet", "MATH-500"),
        ("x/1.5/val.json", "1.5"),
        ("data/math500/math500/1.0.0", "math500"),
        ("data/math/math/1.0.0/test", "math"),
        ("python/3.11.2/aime24.jsonl", "aime24"),
        ("gone/../data/test.jsonl", "data"),
        ("/test.jsonl", "test"),
        ("a/latest.jsonl", "latest"),
    ],
)
def test_a_set_is_called_as_its_file_or_the_folder_of_a_split(path, name):
    assert protocols.title(path) == name


def test_stem():
    assert protocols.stem("math500_test.jsonl.gz") == "math500"
    assert protocols.stem("a.parquet") == "a" and protocols.stem("latest.jsonl") == "latest"

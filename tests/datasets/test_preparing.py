"""Duplicates, tiers and copies are counted exactly; files come from where the user says."""

import collections
import json

import pytest

from tapojax.datasets import preparing, reading, recipes, report, schema, sourcing, table, writing
from tests.datasets.layouts import PROCESSBENCH, critic, verl
from tests.datasets.servers import Files, serving


def one(id, problem, answer, **more):
    return {"id": id, "problem": problem, "answer": answer, "solution": "", **more}


def save(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- duplicates

COPIES = [
    one("a", "Find $x$.", "1"),
    one("b", "Find  x", "$1$"),  # the same, set differently
    one("c", "Find $y$.", "2"),
    one("d", "Find $z$.", "3"),
    one("e", "Find $z$.", "4"),  # somebody is wrong
]


def test_the_first_of_a_problem_is_kept_and_none_whose_answers_differ():
    kept, met = preparing.survey(COPIES, deduplicate=True)
    assert [row["id"] for row in kept] == ["a", "c"]
    assert met == preparing.Survey(rows=5, different=3, repeated=2, contradictory={"d": ["3", "4"]})


@pytest.mark.parametrize(
    ("one_way", "other", "same"),
    [
        ("1/2", r"\frac{1}{2}", True),
        ("-1/2", r"-\dfrac12", True),
        ("5", "5.0", True),
        ("0.5", r"$\frac{2}{4}$", True),
        ("(1,2)", "(1, 2)", True),
        ("1/0", "1/0", True),
        (r"2\frac{1}{2}", "21/2", False),
        ("1/2", "1/3", False),
        (r"\sqrt2", r"\sqrt3", False),
        ("$", "%", False),
    ],
)
def test_answers_differ_in_value_and_not_in_spelling(one_way, other, same):
    kept, met = preparing.survey([one("a", "1?", one_way), one("b", "1?", other)], deduplicate=True)
    assert len(kept) == same and bool(met.contradictory) != same


def test_without_being_asked_nothing_is_left_out():
    kept, met = preparing.survey(COPIES, deduplicate=False)
    assert kept == COPIES and met.different == 3


def test_steps_are_the_same_if_problem_and_steps_are():
    rows = [{"id": str(i), "problem": "1?", "steps": steps, "label": label} for i, (steps, label) in enumerate(
        [(["a"], -1), (["b"], 0), (["a"], -1), (["b"], -1)])]  # fmt: skip
    kept, met = preparing.survey(rows, deduplicate=True)
    assert [row["id"] for row in kept] == ["0"] and met.contradictory == {"1": ["-1", "0"]}


def test_surveys_of_parts_add_up():
    (_, some), (_, more) = (preparing.survey(rows, deduplicate=True) for rows in (COPIES, COPIES[:3]))
    assert preparing.merged([some, more]) == preparing.Survey(8, 5, 3, {"d": ["3", "4"]})


def test_copies_of_a_published_file(shared):
    """The benchmark file with 32 copies of 30 problems."""
    path = shared / "native" / "BytedTsinghua-SIA_aime-2024.parquet"
    kept, met = preparing.survey(preparing.convert("aime24", "test", [path]), deduplicate=True)
    assert len(kept) == 30 and met == preparing.Survey(960, 30, 30, {})


def test_the_contradictions_that_are_known_are_found(shared):
    """DAPO-Math-17k: eight groups of near duplicates with different answers are marked."""
    path = shared / "dapo_math_17k.jsonl.gz"
    kept, met = preparing.survey(preparing.convert("dapo_math_17k", "train", [path]), deduplicate=True)
    marked = {row["id"] for row in reading.iterate(path) if row.get("conflict")}
    assert met.rows == 17176 and met.contradictory.keys() <= marked and len(met.contradictory) == 8
    assert len(kept) == met.different - 8


# ---- pass rates

RATED = [one(f"{i}", f"problem {i}", "1", pass_rate=i / 8) for i in range(9)]


def test_tiers_are_papos():
    """(.875, 1], (.625, .875], (.375, .625], (.125, .375], (0, .125]; what is never solved is left out."""
    rows = [one(f"{i}-{n}", f"{i} {n}", "1", pass_rate=i / 8) for i in range(9) for n in range(10)]
    drawn = preparing.tiered([*rows, one("unrated", "?", "1")], per_tier=7, seed=0)
    counts = collections.Counter(row["pass_rate"] for row in drawn)
    assert len(drawn) == 35 == len({row["id"] for row in drawn}) and counts[0.0] == 0
    assert counts[1.0] == 7 == counts[0.125]
    assert [counts[a] + counts[b] for a, b in ((0.875, 0.75), (0.625, 0.5), (0.375, 0.25))] == [7, 7, 7]
    assert drawn == preparing.tiered([*rows, one("unrated", "?", "1")], per_tier=7, seed=0)
    assert drawn != preparing.tiered(rows, per_tier=7, seed=1)


def test_a_tier_with_too_few_is_named_with_all_others():
    with pytest.raises(
        ValueError, match=r"fewer than 2 problems: \(0.875, 1.0\]: 1, \(0.625, 0.875\]: 2, .*--per_tier"
    ):
        preparing.tiered(RATED, per_tier=2, seed=0)
    with pytest.raises(
        ValueError, match="no problem has a pass rate, by which tiers are drawn: give them with --pass_r"
    ):
        preparing.tiered(COPIES, per_tier=1, seed=0)


def test_pass_rates_of_another_file_are_joined_by_id(tmp_path):
    path = save(tmp_path / "rates.jsonl", [{"id": "a", "pass_rate": 1}, {"id": 7, "pass_rate": 0.5}])
    rates = preparing.pass_rates(path)
    assert rates == {"a": 1.0, "7": 0.5}
    joined = preparing.rated([*COPIES[:2], one("7", "?", "1", pass_rate=0.1)], rates)
    assert [row.get("pass_rate") for row in joined] == [1.0, None, 0.5]


def test_pass_rates_of_no_problem_here_are_refused():
    splits = {"train": COPIES, "test": [one("t", "?", "1")]}
    assert preparing.count_rated(splits, {"a": 1.0, "x": 0.5}, "f.jsonl") == {"train": 1, "test": 0}
    said = "f.jsonl rates other problems: it has 1 ids, the first 'x', and none is of these problems, the first 'a'"
    with pytest.raises(ValueError, match=said):
        preparing.count_rated(splits, {"x": 0.5}, "f.jsonl")
    with pytest.raises(ValueError, match="it has 0 ids, the first None"):
        preparing.count_rated({"train": []}, {}, "f.jsonl")


@pytest.mark.parametrize(
    "row", [{"id": "a"}, {"pass_rate": 1}, {"id": "a", "pass_rate": 2}, {"id": "a", "pass_rate": "1"}]
)
def test_a_row_that_is_no_pass_rate_is_named(tmp_path, row):
    path = save(tmp_path / "rates.jsonl", [{"id": "b", "pass_rate": 1}, row])
    with pytest.raises(ValueError, match="rates.jsonl, row 2: expected an id and a pass_rate in"):
        preparing.pass_rates(path)


# ---- rows


def test_pass_rates_of_an_evaluation(tmp_path):
    """Samples without a verdict make no rate."""
    sets = {
        "numina": {"per_problem": {"id": ["a", "b"], "correct": [0.5, None]}},
        "more": {"per_problem": {"id": ["c"], "correct": [1.0]}},
    }
    (tmp_path / "result.json").write_text(json.dumps({"name": "x", "sets": sets}, indent=1))
    assert preparing.pass_rates(tmp_path / "result.json") == {"a": 0.5, "c": 1.0}


def test_rows_of_verl_hold_the_template_and_are_read_back_bare():
    row = preparing.verl_row(COPIES[0], 3, "train", template=recipes.BOXED, source="math-dapo", ability="Math")
    assert row == {
        "data_source": "math-dapo",
        "prompt": [{"role": "user", "content": f"Find $x$.\n\n{recipes.BOXED.format(problem='').strip()}"}],
        "ability": "Math",
        "reward_model": {"style": "rule", "ground_truth": "1"},
        "extra_info": {"split": "train", "index": 3, "question": "Find $x$.", "id": "a"},
    }
    assert schema.example(row, "", "") == {**COPIES[0], "source": "math-dapo"}
    rich = one("a", "Find $x$.", "1", solution="So 1.", pass_rate=0.0)
    row = preparing.verl_row(rich, 3, "train", template=recipes.BOXED, source="math-dapo", ability="Math")
    assert (row["solution"], row["pass_rate"]) == ("So 1.", 0.0)
    assert schema.example(row, "", "") == {**rich, "source": "math-dapo"}


def test_ids_of_rows_without_one_are_their_set_and_place(tmp_path):
    rows = [{"problem": "1?", "answer": "1"}, {"problem": "2?", "answer": "2"}]
    paths = [save(tmp_path / name / "train.jsonl", rows) for name in ("algebra", "geometry")]
    found = [row["id"] for row in preparing.convert("math", "train", paths)]
    assert found == [f"math/train/{i}" for i in range(4)], "wherever the files lie"


def test_a_bad_row_is_named_with_its_file(tmp_path):
    path = save(tmp_path / "a.jsonl", [{"problem": "1?", "answer": "1"}, {"problem": "2?", "answer": ""}])
    with pytest.raises(ValueError, match=r"a.jsonl, row 2: no value for \['answer'\]"):
        list(preparing.convert("gsm8k", "train", [path]))
    unreadable: list = []
    assert len(list(preparing.convert("gsm8k", "train", [path], unreadable=unreadable))) == 1
    assert len(unreadable) == 1 and "a.jsonl, row 2: no value" in unreadable[0]
    with pytest.raises(ValueError, match=r"a.jsonl, row 1: expected steps"):
        list(preparing.convert("processbench", "gsm8k", [path]))


def test_anything_is_problems_or_steps(tmp_path):
    path = save(tmp_path / "a.jsonl", [{**PROCESSBENCH, "label": 1}, critic(), verl("1?", "1")])
    assert [sorted({"label", "solution"} & row.keys()) for row in preparing.anything(path)] == [["label"]] * 2 + [
        ["solution"]
    ]


@pytest.mark.parametrize(
    ("rows", "want"),
    [
        ({"problem": "1?", "answer": "B", "explanation": "Because."}, "Because."),
        ({"problem": "1?", "answer": "B", "gold_analysis": "Because.\n"}, "Because."),
        (
            {"prompt": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "So."}], "answer": "B"},
            "So.",
        ),
    ],
)
def test_traces_of_rtpo(tmp_path, rows, want):
    (found,) = preparing.convert("rtpo_traces", "train", [save(tmp_path / "a.jsonl", [rows])])
    assert found["solution"] == want and found["problem"] == "1?" and found["answer"] == "B"


# ---- files


def test_the_same_rows_in_every_format(tmp_path):
    parts = [([one("a", "1?", "1"), one("b", "2?", "2", level="5")], 2), ([one("c", "3?", "3")], 1)]
    rows = list(writing.repeated(parts))
    assert [row["id"] for row in rows] == list("ababc")
    writing.jsonl(tmp_path / "new" / "a.jsonl", rows)
    writing.parquet(tmp_path / "new" / "a.parquet", parts)
    assert reading.read_rows(tmp_path / "new" / "a.jsonl") == rows
    assert [
        {k: v for k, v in row.items() if v is not None} for row in reading.iterate(tmp_path / "new" / "a.parquet")
    ] == rows


def test_a_file_that_could_not_be_written_whole_is_not_there(tmp_path):
    def rows():
        yield {"id": 1}
        raise ValueError("no more")

    writing.jsonl(tmp_path / "a.jsonl", [{"id": 0}])
    with pytest.raises(ValueError, match="no more"):
        writing.jsonl(tmp_path / "a.jsonl", rows())
    assert reading.read_rows(tmp_path / "a.jsonl") == [{"id": 0}]


# ---- sources


def test_places_are_told_by_split():
    assert sourcing.parse([]) == {}
    assert sourcing.parse(["train=a.jsonl", "test=b.jsonl"]) == {"train": "a.jsonl", "test": "b.jsonl"}
    assert sourcing.parse(["aime24/test=a.jsonl"]) == {"aime24/test": "a.jsonl"}
    assert sourcing.parse(["https://a.b/c?d=e"]) == {"": "https://a.b/c?d=e"}
    with pytest.raises(ValueError, match="--source=a.jsonl,b.jsonl: say which split each is, as in train=a.jsonl"):
        sourcing.parse(["a.jsonl", "b.jsonl"])


def test_a_split_of_two_parts_is_named_with_its_data_set():
    parts = [("dapo_processed", "train"), ("aime24", "test"), ("aime25", "test")]
    sourcing.check_named({"train": "a", "aime24/test": "b", "aime25/test": "c", "": "d"}, parts)
    with pytest.raises(
        ValueError, match="--source=test=a: aime24/test and aime25/test are both test, say --source=aime24"
    ):
        sourcing.check_named({"test": "a"}, parts)


def test_files_are_found_where_the_user_says(tmp_path):
    one, two = save(tmp_path / "test.jsonl", []), save(tmp_path / "data" / "grade_school_math/data/test.jsonl", [])
    find = lambda name, split, **given: sourcing.files(name, split, given, tmp_path / "cache")  # noqa: E731
    assert find("gsm8k", "test", test=str(one)) == [one]
    assert find("gsm8k", "test", **{"gsm8k/test": str(two), "test": str(one)}) == [two]
    assert find("gsm8k", "test", **{"": str(tmp_path / "data")}) == [two], "where its home has it"
    assert find("gsm8k", "test", **{"": str(tmp_path)}) == [one], "or side by side"
    assert find("amc23", "test", **{"": str(one)}) == [one], "a set of one split"
    with serving(Files({"/base/grade_school_math/data/test.jsonl": b"{}"})) as address:
        (path,) = find("gsm8k", "test", **{"": f"{address}/base/"})
        assert path.read_bytes() == b"{}" and path.parent == tmp_path / "cache"
    with pytest.raises(ValueError, match=r"is one file, gsm8k has the splits \['train', 'test'\]: SPLIT="):
        find("gsm8k", "test", **{"": str(one)})
    save(tmp_path / "train-00000-of-00001.parquet", [])
    with pytest.raises(
        ValueError, match="00001.parquet would be both algebra/train-.* and counting_and_probability/tr"
    ):
        find("math", "train", **{"": str(tmp_path)})
    with pytest.raises(ValueError, match="prmbench has no address to download from: give --source=test=PATH"):
        find("prmbench", "test")
    with pytest.raises(ValueError, match="test.jsonl is another file than was published: its sha256 is"):
        find("math500", "test", **{"": str(tmp_path)})


# ---- recipes


def test_recipes_are_of_known_sets_and_one_kind():
    for recipe in recipes.RECIPES.values():
        assert recipes.kind(recipe) in ("problems", "steps")
        for part in (part for parts in recipe.splits.values() for part in parts):
            assert part.split in table.get(part.dataset).splits
    with pytest.raises(ValueError, match="no recipe 'hapo': choose one of fapo, fapo_critic, papo"):
        recipes.get("hapo")


def test_faposs_copies_are_its_own():
    parts = {split: [(p.dataset, p.repeat) for p in parts] for split, parts in recipes.get("fapo").splits.items()}
    assert parts == {"train": [("dapo_processed", 20)], "test": [("aime24", 32), ("aime25", 32)]}


def test_a_set_alone_has_the_splits_that_places_are_given_for():
    assert list(recipes.of_dataset("gsm8k", {}, 1).splits) == ["train", "test"]
    assert list(recipes.of_dataset("gsm8k", {"": "folder"}, 1).splits) == ["train", "test"]
    assert list(recipes.of_dataset("gsm8k", {"gsm8k/test": "a"}, 1).splits) == ["test"]


# ---- report


def described(**changes):
    splits = {"train": COPIES, "test": [one("t", "Find $x$", "1", solution="So it is.")]}
    surveys = {name: preparing.survey(rows, deduplicate=False)[1] for name, rows in splits.items()}
    given = dict(
        rows={"train": 10, "test": 1},
        published={"train": 7, "test": 1},
        surveys=surveys,
        unreadable={"train": [], "test": []},
        rated={},
        against={"o": COPIES[2:3]},
    )
    return report.describe(splits, **given | changes, measure=len, unit="characters")


def test_a_report_counts_rows_lengths_duplicates_and_overlap():
    found = described()
    train = found["splits"]["train"]
    assert (train["rows"], train["examples"], train["read"], train["published"]) == (10, 5, 5, 7)
    assert (train["different"], train["repeated"], train["contradictory"]) == (3, 2, {"d": ["3", "4"]})
    assert train["lengths"]["problem"] == {"min": 7, "median": 9, "mean": 8.6, "p95": 9, "max": 9}
    assert train["lengths"]["solution"] is None and found["splits"]["test"]["lengths"]["solution"]["max"] == 9
    overlaps = {(pair["of"], pair["with"]): (pair["exact"], pair["loose"]) for pair in found["overlaps"]}
    assert overlaps == {("train", "test"): (2, 0), ("train", "o"): (1, 0), ("test", "o"): (0, 0)}
    assert json.loads(json.dumps(found)) == found


def test_a_report_reads_well():
    text = report.text(described(), "mine")
    for line in (
        "# mine",
        "## train: 10 rows",
        "- read 5 rows, not the 7 that are published: 3 different ones, 5 kept",
        "- 2 come more than once",
        "- 1 come with different answers (d: 3 or 4)",
        "| characters | min | median | mean | p95 | max |",
        "| problem | 7 | 9 | 8.6 | 9 | 9 |",
        "- 2 of train are in test word for word, 0 more in other spelling (a = t; b = t)",
    ):
        assert line in text.splitlines(), line
    assert "pass rates" not in text
    assert "- 3 are in the file of pass rates" in report.text(described(rated={"train": 3, "test": 0}), "")
    left_out = {"train": ["a.jsonl, row 7: no value"], "test": []}
    assert "- 1 more are left out as unreadable (a.jsonl, row 7: no value)" in report.text(
        described(unreadable=left_out), ""
    )
    many = {str(i): ["1", "2"] for i in range(8)}
    surveys = {name: preparing.Survey(9, 9, 8, many) for name in ("train", "test")}
    assert "4: 1 or 2, and 3 more)" in report.text(described(surveys=surveys), "mine")

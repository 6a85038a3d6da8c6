"""The tables say what the results say; only equal problems are compared, and what is not is named."""

import numpy as np
import pytest

from tapojax import evaluation, results


def one_set(correct, *, digest="d", samples=4, ids=None, **more):
    ids = ids or [f"p{i}" for i in range(len(correct))]
    rate = evaluation.estimate(correct)._asdict()
    return {
        "data": {"path": "a.jsonl", "problems": digest},
        "pass@1": rate,
        f"pass@{samples}": {"mean": 0.75, "low": 0.5, "high": 1.0},
        f"maj@{samples}": {"mean": 0.5, "low": 0.25, "high": 0.75},
        "mean_length": 12.25,
        "problems": len(correct),
        "samples": samples,
        "truncated": 0.125,
        "errors": 2,
        "median_length": 11.0,
        "p95_length": 20.0,
        "answered": 0.875,
        "per_problem": {"id": ids, "correct": correct},
        "seconds": {"sample": 2.0, "score": 0.5},
        "tokens_per_second": 1234.5,
        **more,
    }


def result(name, sets, **more):
    return {
        "name": name,
        "policy": {"name": name},
        "protocol": None,
        "notes": [],
        "sampling": {"temperature": 0.5, "top_p": 0.7, "top_k": 0, "max_tokens": 32},
        "sets": sets,
        "mean": results.mean_over_sets(sets),
        "ks": [],
        **more,
    }


# ---- one


def test_the_table_of_one_set():
    text = results.table(result("mine-40", {"aime24": one_set([0.0, 0.5, 1.0])}))
    assert text.split("\n\n") == [
        "**mine-40**, temperature 0.5, top_p 0.7, top_k 0, max_tokens 32",
        "| set    | problems | k | avg@k                | pass@k               | maj@k                |\n"
        "|--------|----------|---|----------------------|----------------------|----------------------|\n"
        "| aime24 | 3        | 4 | 0.500 [0.150, 0.850] | 0.750 [0.500, 1.000] | 0.500 [0.250, 0.750] |",
        "| set    | length mean | median | 95th % | truncated | answered | not scored | seconds | tokens/s |\n"
        "|--------|-------------|--------|--------|-----------|----------|------------|---------|----------|\n"
        "| aime24 | 12.2        | 11.0   | 20.0   | 0.125     | 0.875    | 2          | 2.5     | 1234     |",
    ]


def test_the_mean_over_sets_has_its_row():
    sets = {"a": one_set([0.25] * 4 + [0.75] * 4), "b": one_set([0.0, 0.5])}
    row = next(line for line in results.table(result("x", sets)).splitlines() if line.startswith("| mean of 2 sets"))
    both = [evaluation.estimate([0.25] * 4 + [0.75] * 4), evaluation.estimate([0.0, 0.5])]
    mean = evaluation.mean_of_sets(both)
    assert f"{mean.mean:.3f} [{mean.low:.3f}, {mean.high:.3f}]" in row and "0.375" in row
    assert "mean of" not in results.table(result("x", {"a": sets["a"]})), "of one set there is none"


def test_protocol_notes_channels_and_critics_are_in_the_table():
    records = [
        {"id": f"{subset}-{i}", "predicted": p, "label": y, "final_answer_correct": subset == "math"}
        for subset in ("math", "gsm8k")
        for i, (p, y) in enumerate([(1.0, 1.0), (-1.0, -1.0), (0.0, 1.0), (-2.0, -1.0)])
    ]
    critic = {"critic": evaluation.critic_table(records), "mean_process": 0.4321}
    protocol = {"name": "hapo", "headline": "mean of avg@8", "source": "arXiv 1"}
    text = results.table(
        result(
            "mine-hapo",
            {"a": one_set([0.5], **critic), "b": one_set([1.0])},
            protocol=protocol,
            notes=["a has 1 problem"],
            policy={"name": "mine-40"},
        )
    )
    assert text.startswith("**mine-hapo**: mine-40, ") and "protocol hapo: mean of avg@8 (arXiv 1)" in text
    assert "| mean of | process |\n|---------|---------|\n| a       | 0.432   |\n| b       |         |" in text
    lines = text[text.index("| a, all samples") :].splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:7]] == [
        "gsm8k",
        "math",
        "average of subsets",
        "all rows",
        "right final answers",
    ]
    assert lines[0].split("|")[2:6] == [" rows ", " erroneous ", " correct ", " process_f1 "]
    assert lines[3].split("|")[2:6] == [" 4    ", " 0.500     ", " 0.500   ", " 0.500      "]
    assert "votes" not in text, "of one sample there are none"
    assert text.endswith("\n\n- a has 1 problem")


def test_asked_ks_have_columns():
    found = one_set([0.5, 1.0], samples=8, **{"pass@2": {"mean": 0.6, "low": 0.4, "high": 0.8}})
    title, _, row = results.rates(result("x", {"a": found}, ks=[1, 2, 8])).splitlines()
    assert title.split() == "| set | problems | k | avg@k | pass@2 | pass@k | maj@k |".split() and "0.600 [" in row


def test_one_sample_has_no_pass_at_more():
    row = results.rates(result("x", {"a": one_set([1.0, 0.0], samples=1)})).splitlines()[-1]
    assert row.split("|")[-3].strip() == row.split("|")[-2].strip() == ""


def test_what_could_not_be_scored_is_none():
    nothing = {"mean": None, "low": None, "high": None}
    found = one_set([0.5]) | {"pass@1": nothing}
    assert "none [none, none]" in results.rates(result("x", {"a": found}))
    assert np.isnan(results.mean_over_sets({"a": found})["mean"])


# ---- several


def test_differences_are_paired_by_problem():
    base, ours = [0.1, 0.5, 0.9, 0.3], [0.2, 0.6, 1.0, 0.4]
    compared = results.compare([result("base", {"a": one_set(base)}), result("ours", {"a": one_set(ours)})])
    difference = compared["sets"]["a"]["differences"]
    assert difference[0] is None and compared["results"] == ["base", "ours"] and compared["notes"] == []
    assert difference[1] == pytest.approx(evaluation.paired_difference(ours, base)._asdict())
    assert compared["mean"] is None, "one set is its own mean"


def test_null_rates_pair_with_nothing():
    pair = [result("a", {"s": one_set([0.5, 0.5, None])}), result("b", {"s": one_set([0.5, None, 1.0])})]
    assert results.compare(pair)["sets"]["s"]["differences"][1]["mean"] == 0.0


def one_set_of(n, value, **more):
    return one_set([value] * n, **more)


def test_means_are_over_the_sets_that_can_be_compared():
    a = result("a", {"s": one_set_of(4, 0.5), "t": one_set_of(4, 0.25), "u": one_set_of(4, 0.0, digest="1")})
    b = result("b", {"s": one_set_of(4, 1.0), "t": one_set_of(4, 0.5), "u": one_set_of(4, 1.0, digest="2")})
    compared = results.compare([a, b])
    assert compared["mean"]["sets"] == ["s", "t"]
    assert [value["mean"] for value in compared["mean"]["values"]] == [0.375, 0.75]
    assert compared["mean"]["differences"][1]["mean"] == pytest.approx(0.375)
    assert compared["sets"]["u"]["differences"][1] is None


def test_other_problems_under_the_same_name_are_not_compared_and_named():
    a = result("a", {"s": one_set([0.5]), "math": one_set([0.5, 0.5], digest="1", ids=["x", "y"])})
    b = result("b", {"s": one_set([0.5]), "math": one_set([0.5, 0.5, 0.5], digest="2", ids=["y", "z", "w"])})
    compared = results.compare([a, b])
    assert compared["notes"] == ["math: b has other problems than a, 3 against 2, 1 ids in both: not compared"]
    row = next(line for line in results.comparison_table([a, b], compared).splitlines() if line.startswith("| math"))
    assert "2/3" in row and row.split("|")[-2].strip() == "", "values, but no difference"


@pytest.mark.parametrize(
    "other, said",
    [
        ({"t": one_set([0.5])}, "s is not in b; t is not in a"),
        ({"s": one_set([0.5], digest="other")}, "s: b has other problems than a"),
    ],
)
def test_nothing_in_common_is_an_error(other, said):
    with pytest.raises(ValueError, match=f"no set can be compared: {said}"):
        results.compare([result("a", {"s": one_set([0.5])}), result("b", other)])


def test_a_run_has_values_and_no_differences():
    """A run keeps no numbers by problem."""
    own = {name: {k: v for k, v in one_set([0.5]).items() if k != "per_problem"} for name in "st"}
    a, b = result("a", {name: one_set([0.5, 1.0]) for name in "st"}), result("b", own)
    for pair in ([a, b], [b, a], [b, b]):
        compared = results.compare(pair)
        assert compared["sets"]["s"]["differences"] == [None, None] and compared["mean"] is None
        assert [value["mean"] for value in compared["sets"]["s"]["values"]] == [
            r["sets"]["s"]["pass@1"]["mean"] for r in pair
        ]
        assert "s: b has no numbers by problem; use launch.evaluate" in compared["notes"]
        row = results.comparison_table(pair, compared).splitlines()[2]
        assert "0.500 [" in row and row.split("|")[-2].strip() == ""
    with pytest.raises(ValueError, match="no set can be compared: s is not in c"):
        results.compare([b, result("c", {"u": own["s"]})])


def test_one_result_is_no_comparison():
    with pytest.raises(ValueError, match="one result alone cannot be compared"):
        results.compare([result("a", {"s": one_set([0.5])})])


def test_settings_that_differ_are_told():
    other = {"temperature": 1.0, "top_p": 0.7, "top_k": 0, "max_tokens": 32}
    a = result("a", {"s": one_set([0.5])}, protocol={"name": "hapo", "headline": "h", "source": "s"})
    b = result("b", {"s": one_set([0.5], samples=8)}, sampling=other)
    compared = results.compare([a, b])
    assert compared["notes"] == ["temperature differs: 0.5, 1.0", "protocol differs: hapo, none"]
    assert "| 4/8 |" in results.comparison_table([a, b], compared)


def test_the_table_of_a_comparison():
    base, ours = [0.0, 0.25, 0.5, 0.25] * 4, [0.5, 0.75, 1.0, 0.5] * 4
    a = result("base", {"s": one_set(base)}, notes=["s: shared note", "own note"])
    b = result("ours", {"s": one_set(ours)}, notes=["s: shared note"])
    rates, each, notes = results.comparison_table([a, b], results.compare([a, b])).split("\n\n")
    title, _, row = rates.splitlines()
    assert [cell.strip() for cell in title.split("|")[1:-1]] == [
        "avg@k",
        "problems",
        "k",
        "base",
        "ours",
        "ours - base",
    ]
    assert [cell.strip() for cell in row.split("|")[1:4]] == ["s", "16", "4"]
    assert row.split("|")[6].strip().startswith("+0.438 [+0.") and row.split("|")[6].strip().endswith("]*")
    assert [line.split("|")[2].strip() for line in each.splitlines()[2:]] == ["base", "ours"]
    assert notes.splitlines() == [
        "- sampled with temperature 0.5, top_p 0.7, top_k 0, max_tokens 32",
        "- differences are paired by problem, their 95 % intervals are over problems; * where 0 is outside",
        "- s: shared note",
        "- base: own note",
    ]

"""The same problem is found however it is set, and only the same."""

import pytest

from tapojax.datasets import overlap, reading


def one(id, problem, answer=None):
    return {"id": id, "problem": problem} | ({"answer": answer} if answer is not None else {})


@pytest.mark.parametrize(
    "other",
    [
        "Find $\\frac{1}{2}$ of $x$",
        "Find \\(\\frac{1}{2}\\) of  $x$.",
        "Find \\[\\dfrac{1}{2}\\]\nof\\; $x.$",
        "Find$\\tfrac{1}{2}$of~$x$",
    ],
)
def test_the_same_text_set_differently_is_exact(other):
    (pair,) = overlap.pairs([one("a", "Find $\\frac{1}{2}$ of $x$.", "1")], [one("b", other, "another")])
    assert pair == ("a", "b", "exact")


def test_the_same_letters_are_the_same_problem_if_the_answers_are():
    text = "Let $a_{1}, a_{2}$ be roots of $x^{2} - 3$; find their sum of squares."
    loose = "let a_1 and a_2 be..."
    again = "Let $a_1, a_2$ be roots of $x^2-3$. Find their sum of squares"
    assert overlap.pairs([one("a", text, "6")], [one("b", again, "$6$"), one("c", loose, "6")]) == [("a", "b", "loose")]
    assert overlap.pairs([one("a", text, "6")], [one("b", again, "7")]) == []
    assert overlap.pairs([one("a", text, "6")], [one("b", again)]) == [("a", "b", "loose")], "steps may have no answer"
    assert overlap.pairs([one("a", "What is 2+2?", "4")], [one("b", "What is 22?", "4")]) == [], "short by accident"


def test_words_of_latex_are_not_spaces():
    assert overlap.fold("\\quad x") == "x" and overlap.fold("\\quadratic") == "\\quadratic"
    assert overlap.fold("\\dfracture") == "\\dfracture"


def test_all_overlaps_that_are_known_are_found(shared):
    """The reference: exact after folding of spaces, dollars, fractions; loose by letters and digits, answers equal."""
    known: dict = {}
    for row in reading.iterate(shared / "overlaps.jsonl"):
        known.setdefault(row["train_file"], {})[row["train_id"], row["test_id"]] = row["match"], row["test_file"]
    for train, pairs in known.items():
        names = {test for _, test in pairs.values()}
        tests = [row for name in names for row in reading.iterate(shared / f"{name}.jsonl.gz")]
        found = {(a, b): how for a, b, how in overlap.pairs(reading.iterate(shared / f"{train}.jsonl.gz"), tests)}
        assert not [ids for ids, (how, _) in pairs.items() if how == "exact" and found.get(ids) != "exact"]
        assert not pairs.keys() - found.keys(), "loose ones may be found exact"
        ours = sum(not test.startswith(IN_STEPS) for _, test in found)
        assert ours <= sum(not test.startswith(IN_STEPS) for _, test in pairs) + 2


IN_STEPS = ("prmbench", "processbench", "fapo_critic")  # several solutions of a problem, the reference has one of each

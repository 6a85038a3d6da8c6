r"""Reference solutions are cut before their final answer, and put together again they are right."""

import gzip
import json
import random

import pytest

from tapojax.rewards import answers, solutions

CASES = {
    "GSM8K as published": (
        "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 altogether.\n#### 72",
        "72",
        "Natalia sold 48/2 = 24 clips in May.\nShe sold 48+24 = 72 altogether.",
        "\n\\boxed{72}",
    ),
    "GSM8K with a thousands separator": ("It costs $3*450.\n#### 1,350", "1350", "It costs $3*450.", "\n\\boxed{1350}"),
    "GSM8K without its last line": ("So 12/4 is 3 m.", "3", "So 12/4 is 3 m.", "\n\\boxed{3}"),
    "bare mathematics": ("3+4 = 7.", "7", "3+4 = 7.", "\n\\boxed{7}"),
    "MATH": (
        "The slope is $2$. Since it passes through $(0,1)$, we have $b=1$. Therefore $m+b=\\boxed{3}$.",
        "3",
        "The slope is $2$. Since it passes through $(0,1)$, we have $b=1$.",
        " Therefore $m+b=\\boxed{3}$.",
    ),
    "MATH, the answer on a line of a display": (
        "We add:\n\\begin{align*}\nx &= \\frac{1}{2} + 1 \\\\\n&= \\boxed{\\frac{3}{2}}.\n\\end{align*}",
        "\\frac{3}{2}",
        "We add:\n\\begin{align*}\nx &= \\frac{1}{2} + 1 \\\\",
        "\n&= \\boxed{\\frac{3}{2}}.\n\\end{align*}",
    ),
    "MATH in a single sentence": (
        "Adding, we have $(2+4)+(1+3)i=\\boxed{6+4i}$.",
        "6+4i",
        "Adding, we have $(2+4)+(1+3)i=",
        "\\boxed{6+4i}$.",
    ),
    "two boxes": (
        "The roots come in pairs. One is $\\boxed{1}$. The other is $\\boxed{2}$.",
        "2",
        "The roots come in pairs.",
        "\n\\boxed{2}",
    ),
    "solved twice": (
        "Count them. There are $\\boxed{9}$.\nSolution 2. Again $\\boxed{9}$.",
        "9",
        "Count them.",
        "\n\\boxed{9}",
    ),
    "the gold answer spelt otherwise": ("Halve it. It is $\\boxed{015}$.", "15", "Halve it.", "\n\\boxed{15}"),
    "answer in words": ("Two and two. The answer is 4.", "4", "Two and two.", "\n\\boxed{4}"),
    "another answer in words": ("The answer is 5. No.", "4", "The answer is 5. No.", "\n\\boxed{4}"),
    "hashes on the only line": ("2+2 = 4 #### 4", "4", "2+2 = 4", "\n\\boxed{4}"),
    "nothing but the box": ("$\\boxed{4}$", "4", "", "$\\boxed{4}$"),
    "nothing at all": ("", "4", "", "\\boxed{4}"),
}


@pytest.mark.parametrize("name", CASES)
def test_split(name):
    solution, answer, reasoning, closing = CASES[name]
    assert solutions.split(solution, answer) == (reasoning, closing)


def test_together_they_are_accepted_by_the_verifier():
    completions = ["".join(solutions.split(solution, answer)) for solution, answer, _, _ in CASES.values()]
    grades = answers.grade(completions, [answer for _, answer, _, _ in CASES.values()])
    assert [grade.correct for grade in grades] == [True] * len(CASES)


def rows(path) -> list[dict]:
    with gzip.open(path, "rt") as file:
        return [row for row in map(json.loads, file) if row.get("solution")]


@pytest.mark.parametrize("name", ["gsm8k_train", "math_train", "aime_1983_2023_train", "minerva_test"])
def test_real_solutions(shared, name):
    """No reasoning shows a final answer's marker; hardly any is empty; 50 of them with their closing are right."""
    problems = rows(shared / f"{name}.jsonl.gz")
    parts = [solutions.split(row["solution"], row["answer"]) for row in problems]
    assert not any(mark in reasoning for reasoning, _ in parts for mark in ("\\boxed", "\\fbox", "####", "<<"))
    assert sum(not reasoning for reasoning, _ in parts) <= 0.1 * len(parts)
    sample = random.Random(0).sample(range(len(parts)), 50)
    grades = answers.grade(["".join(parts[i]) for i in sample], [problems[i]["answer"] for i in sample])
    assert [grade for grade in grades if grade.correct is not True] == []


def test_published_gsm8k_rows(shared):
    """The original file, calculator notes and #### lines included."""
    lines = (shared / "native" / "gsm8k_train.20lines.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        gold = answers.extract(row["answer"])
        reasoning, closing = solutions.split(row["answer"], gold)
        assert solutions.split(row["answer"], row["answer"]) == (reasoning, closing), "the column holds both"
        assert closing == f"\n\\boxed{{{gold}}}" and reasoning.count("\n") == row["answer"].count("\n") - 1
        assert "<<" not in reasoning and "####" not in reasoning

r"""The verifier's promises: the right answer is found, equal mathematics is equal, and no failure becomes a verdict."""

import collections
import gzip
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tapojax.rewards import answers, pool, spans, spelling

CASES = Path(__file__).parents[3] / "shared" / "data" / "grader_cases"
SEMANTIC_GRADERS = ("prm800k", "verl_prime", "qwen", "verl_math_verify")
TOWER = "9^{9^{9^{9}}}+x"


@pytest.fixture(scope="module")
def workers():
    with pool.Pool(answers.CHECKER, workers=2, memory_mb=512) as made:
        yield made


def box(answer):
    return rf"so it is \boxed{{{answer}}}."


EXTRACTIONS = [
    # the last balanced box
    (r"first \boxed{1}, then \boxed{2} done", "2"),
    (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
    (r"\boxed  { x^2 }", "x^2"),
    (r"\fbox{7}", "7"),
    (r"\boxed{\boxed{5}}", "5"),
    (r"\boxed 5", "5"),
    (r"\boxed{12} and then \boxed{never closed", "12"),
    (r"\boxed{never closed", None),
    (r"\boxed{42", None),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\left\{ x \mid x > 2 \right.}", r"\left\{ x \mid x > 2 \right."),
    (r"an open { brace, then \boxed{3}", "3"),
    (r"a closed } brace, then \boxed{3}", "3"),
    (r"\boxed{}", None),
    (r"5 \boxed{ }", None),
    (r"\boxed{$$}", None),
    (r"put it in \boxed and stop", None),
    (r"\\boxed{42}", "42"),
    (r"\boxed{255} in half a year. The final answer is $10,455$. I hope it is correct.", "10,455"),
    (r"\boxed{255}. Final Answer: The final answer is \(10455\).", "10455"),
    (r"\boxed{255}. The final answer is in the box.", "255"),
    (r"The final answer is $1$, so \boxed{2}", "2"),
    ("Answer: 41, no, \\boxed{42}\n#### 43", "42"),
    # reasoning is not an answer
    (r"<think>\boxed{1}</think>\boxed{2}", "2"),
    (r"\boxed{1}</think>So it is \boxed{2}", "2"),
    (r"<think>\boxed{1}</think> I do not know.", None),
    (r"<think>it is \boxed{1}", None),
    (r"<think>a</think>\boxed{1}<think>\boxed{2}", None),
    # tags
    ("<answer>1</answer> no <answer> 5 </answer>", "5"),
    (r"<answer>\boxed{4}</answer>", "4"),
    ("</answer> 5 <answer>", None),
    ("<answer> </answer>", None),
    # GSM8K
    ("He has 3 * 4 = <<3*4=12>>12.\n#### 1,234", "1234"),
    ("#### $18", "18"),
    ("#### -3.5", "-3.5"),
    ("#### 3/4", "3/4"),
    ("#### 42.", "42"),
    ("#### 42<|endoftext|>", "42"),
    ("#### 1\n#### 2", "2"),
    ("#### 3. Conclusion\nIt holds.", None),
    ("#### $x$\nHere it is 5.", None),
    ("#### $1,234$", "1234"),
    (r"#### $\frac{1}{2}$", r"$\frac{1}{2}$"),
    ("#### (1,2)", "(1,2)"),
    ("#### A\n", "A"),
    ("#### A. The first case", None),
    ("#### A\n#### 5", "5"),
    ("#### 5\n#### $6$", "6"),
    # sentences
    ("Answer: 41 was wrong.\nAnswer: 42", "42"),
    ("Therefore, the answer is $\\frac{1}{2}$. I hope it is correct.", r"$\frac{1}{2}$"),
    ("Final Answer: The largest $n$ is 34.", "34"),
    ("**Answer:** 3.5", "3.5"),
    ("**Answer**: 42", "42"),
    ("**Final Answer: 42**", "42"),
    ("answer:\n\n 7", "7"),
    ("The answer is: 5", "5"),
    ("the ANSWER IS 3.14. Next, pi.", "3.14"),
    ("Answer: 48/2 = <<48/2=24>>24", "48/2 = 24"),
    ("The result is $3$", "$3$"),
    ("Answer:", None),
    ("The answer is", None),
    ("The answer is 5. Then\nAnswer: $$", None),
    # on the next line, or displayed
    ("The final answer is:\n\n42", "42"),
    ("The final answer is\n\n$42$\nDone.", "$42$"),
    ("The answer is:\n$$42$$ It was easy.", "$$42$$"),
    ("Answer:\n$$\nx = 4.\n$$\nDone.", "$$\nx = 4.\n$$"),
    ("**Answer:**\n\\[\n42\n\\]", "\\[\n42\n\\]"),
    ("The answer is \\(\n42\n\\).", "\\(\n42\n\\)"),
    ("The answer is $$5$$ or $$6$$", "$$5$$ or $$6$$"),
    ("The answer is $$5$$ Or is it $$6$$?", "$$5$$ Or is it $$6$$"),
    ("The answer is $$5\nand never closed", "$$5"),
    # without the words around it
    ("The answer is approximately 42.", "42"),
    ("The answer is exactly $42$.", "$42$"),
    ("The answer is 42, since 6*7=42.", "42"),
    ("The answer is $42$, as required.", "$42$"),
    ("The answer is 42 (since x>0).", "42"),
    ("The answer is **42**, which is even.", "42"),
    ("The answer is C because 2 is even.", "C"),
    ("Answer: C, because", "C"),
    ("The correct answer is option C — because 2 is even.", "C"),
    ("Answer: The largest n is 34, since 35 is odd.", "34"),
    ("The answer is 5, which is wrong.", "5, which is wrong"),
    ("The answer is $6<y<7$, which is $(6,7)$.", "$6<y<7$, which is $(6,7)$"),
    ("The answer is 5 because of this, or 6", "5 because of this, or 6"),
    ("The answer is 5 since it fits, 6 since it fits too", "5 since it fits, 6 since it fits too"),
    ("The answer is x as well as y", "x as well as y"),
    # JSON and bare answers
    ('{"thought": "hm", "answer": "12"}', "12"),
    ('```json\n{"answer": -1.5}\n```', "-1.5"),
    ("-15", "-15"),
    (" x = 3\n", "x = 3"),
    (r"$\frac{1}{3} \text{ metres}$", r"$\frac{1}{3} \text{ metres}$"),
    ("28 percent", "28 percent"),
    ("$28$ percent", "$28$ percent"),
    ("28 is less than a dozen", None),
    ("I have no idea", None),
    ("The length is 5", None),
    ("1\n2", None),
    ("", None),
]


@pytest.mark.parametrize("text, expected", EXTRACTIONS)
def test_extract(text, expected):
    assert answers.extract(text) == expected


@pytest.mark.parametrize("text, expected", EXTRACTIONS)
def test_a_span_is_where_the_answer_stands(text, expected):
    span = spans.find(text)
    assert (span is None) == (expected is None)
    if span is not None and "<<" not in text and "####" not in text:
        assert text[slice(*span)] == expected


MEGABYTE = 2**20
FLOODS = {
    "open boxes": r"\boxed{" * (MEGABYTE // 7),
    "nested boxes": r"\boxed{" * (MEGABYTE // 8) + "}" * (MEGABYTE // 8),
    "bare boxes": r"\boxed " * (MEGABYTE // 7),
    "backslashes": "\\" * MEGABYTE,
    "open braces": "{" * MEGABYTE,
    "closed braces": "}" * MEGABYTE,
    "hashes": "#" * MEGABYTE,
    "numbers behind hashes": "#### 5 " * (MEGABYTE // 7),
    "spaces behind hashes": "#### 5" + " " * MEGABYTE + "x",
    "digits": "#### " + "1" * MEGABYTE,
    "answers": "the answer is " * (MEGABYTE // 14),
    "blank answer": "answer:" + "\n \n" * (MEGABYTE // 3),
    "stars": "answer" + "*" * MEGABYTE,
    "is is is": "answer: " + " is " * (MEGABYTE // 4),
    "displays": r"the answer is \[5" * (MEGABYTE // 17),
    "open display": "the answer is $$5" + "\n" * MEGABYTE,
    "spaces before a reason": "the answer is 5" + " " * MEGABYTE + "since",
    "tags": "<answer>" * (MEGABYTE // 8),
    "thoughts": "<think></think>" * (MEGABYTE // 15),
    "json": '"answer": "' * (MEGABYTE // 11),
    "open json": '"answer": "' + "a" * MEGABYTE,
    "annotations": "answer is " + "<<" * MEGABYTE,
    "zeros": "\0" * MEGABYTE,
    "spaces": " " * MEGABYTE,
    "letters": "x" * MEGABYTE,
    "a long box": box("7" * MEGABYTE),
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
def test_a_megabyte_of_anything_is_wrong_in_linear_time(flood, workers):
    start = time.monotonic()
    assert answers.grade([flood], ["42"], workers=workers) == [(False, None)]
    assert time.monotonic() - start < 5, "the time is not linear in the length of the completion"


def test_an_answer_behind_a_megabyte_of_open_boxes_is_found(workers):
    assert answers.grade([FLOODS["open boxes"] + box(42)], ["42"], workers=workers) == [(True, None)]


EQUAL = [
    # gold, prediction
    ("42", "42"),
    ("1,234", "1234"),
    ("1234", "1{,}234"),
    ("11111111100", r"11,\! 111,\! 111,\! 100"),
    (r"\frac{1}{1,234}", r"\frac{1}{1234}"),
    (r"\frac{1}{2}", "1/2"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", r"\dfrac12"),
    (r"\frac{3}{2}", "1 1/2"),
    ("918.5", r"918\frac{1}{2}"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    (r"\frac{1}{2}", r"\frac{2}{4}"),
    ("0.5", ".50"),
    ("1000", "1e3"),
    (r"336^\circ", "336"),
    ("90", "90 degrees"),
    ("10", r"10\%"),
    (r"50\%", "50"),
    (r"50\%", "0.5"),
    (r"50\%", r"\frac{1}{2}"),
    (r"\$18.90", "18.9"),
    ("5", r"5 \text{ cm}^2"),
    (r"15\mbox{ cm}^2", "15"),
    ("18", "18 apples"),
    (r"9\pi", r"9\pi \text{ square units}"),
    (r"5 \text{ million dollars}", "5000000"),
    ("3", "x = 3"),
    ("x=3", "3"),
    ("y = 2x + 3", "2x+3"),
    (r"\sqrt{15}", "√15"),
    (r"10\sqrt3", r"10\sqrt{3}"),
    ("(3, \\frac{\\pi}{2})", "(3,pi/2)"),
    ("2x+3", "3+2x"),
    ("x^2+y^2=1", "2x^2+2y^2=2"),
    (r"\infty", "+\\infty"),
    ("(x-1)(x+1)", "x^2-1"),
    ("1,2,3", "3, 1, 2"),
    (r"\{1,2\}", "1,2"),
    (r"1 \text{ and } 2", "1,2"),
    (r"3 \pm 2\sqrt{2}", r"3+2\sqrt{2}, 3-2\sqrt{2}"),
    (r"(-\infty,1)\cup(2,\infty)", "(-∞,1)∪(2,∞)"),
    ("[0,1)", r"\left[0, 1\right)"),
    ("x>5", "5<x"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"),
    (r"\begin{pmatrix} 6 \\ -33 \end{pmatrix}", r"\begin{pmatrix}6\-33\end{pmatrix}"),
    (r"\text{Evelyn}", "evelyn"),
    (r"\text{(C)}", "C"),
    (r"\text{4:30 p.m.}", r"4:30 \text{ p.m.}"),
    (r"4\!:\!30 \text{ p.m.}", "4:30"),
    (r"52_8", "52"),
    ("42", "４２"),
    ("42", "٤٢"),
    ("-7", "−7"),
    (r"6.63\times10^{-34}", "6.63e-34"),
    ("0", r"\sin(\pi)"),
    (r"the result is \boxed{7} as claimed", "7"),
    ("4 * 18 = <<4*18=72>>72\n#### 72", "72"),
    # boxes side by side are a list
    ("1,2", r"1} \text{ and } \boxed{2"),
    ("(1,2),(3,4)", "(3, 4)}\\quad\n\\boxed{(1, 2)"),
    ("2", r"2}, \boxed{2"),
    (r"\boxed{1}, \boxed{2}", "1,2"),
    # constants of the parser that are somebody's variables, and the other way round
    (r"I_{\max }=\frac{q}{\sqrt{2LC}}", r"\frac{q}{\sqrt{2CL}}"),
    ("5", "I = 5"),
    ("5", "x = 2 + 3 = 5"),
    ("3.33", r"x = \frac{10}{3} = 3.33"),
    ("i(2-i)", "1+2i"),
    (r"e^{i\pi}", "-1"),
    (r"R_{\odot}^2", r"R_\odot \cdot R_\odot"),
    # degrees inside a function
    (r"\sin 30^\circ", "0.5"),
    (r"\tan(45^{\circ})", "1"),
    (r"\tan 15^\circ", r"\tan15"),
    # units and words
    ("10", "10weeks"),
    ("6 sq. units", "6"),
    ("6", "6 m/s"),
    ("20", r"20^\circ \text{C}"),
    (r"\mathbb{R}", "all real numbers"),
    ("no solution", r"\emptyset"),
    (r"\langle 1,2\rangle", "(1,2)"),
    ("C", "C. 15"),
    (r"\text{(C)}", r"\text{(C) } 15"),
    # towers of powers
    ("512", "2^{3^2}"),
    # without backslashes
    (r"\ln 2", "ln(2)"),
    (r"\ln 2", "ln 2"),
    (r"\ln |x|+C", "ln|x| + C"),
    (r"\sin x", "sin(x)"),
    (r"2\sin x", "2sinx"),
    (r"x\ln x-x", "xlnx - x"),
    (r"-\cos x+C", "-cos(x)+C"),
    (r"\sin^2 x", "sin^2(x)"),
    (r"\arctan 2", "arctan(2)"),
    (r"\sin 30^\circ", "sin(30°)"),
    (r"e^{-x}", "exp(-x)"),
    ("np.arcsin(10/13)", r"\arcsin(10/13)"),
    (r"\log_2 3", "log_2(3)"),
    (r"2\theta", "2theta"),
    (r"r=2\sin\theta", "r = 2 sin(theta)"),
    ("5", "=5"),
    ("101_2", "(101)_2"),
    ("(101)_2", "101_{2}"),
    # decimals
    (r"\frac13", r"0.\overline{3}"),
    (r"0.\overline{3}", "1/3"),
    (r"0.\overline{3}", r"0.\bar 3"),
    (r"0.1\overline{6}", "1/6"),
    ("-1/22", r"-.0\overline{45}"),
    (r"33.\overline{3}\%", r"\frac{1}{3}"),
    ("1", "0.9999999"),
    ("2.0000001", "2"),
    ("1/3", "0.3333333"),
    # sets and inequalities
    (r"[3,\infty)", r"x \ge 3"),
    (r"x \ge 3", r"[3,\infty)"),
    ("(2,5)", "2<x<5"),
    ("2<x<5", "(2,5)"),
]
DIFFERENT = [
    ("42", "43"),
    ("42", "-42"),
    ("1,2", "12"),
    ("12", "1,2"),
    ("67", "6 7"),
    ("1", "1 1/2"),
    ("(1,2)", "(2,1)"),
    ("[0,1)", "[0,1]"),
    ("1,2,3", "1,2"),
    (r"\sqrt{2}", "1.41"),
    ("1/3", "0.33"),
    ("1/2", r"50\%"),
    ("3m+2t", "3m+2"),
    ("3m", "3"),
    ("43_5", "43_6"),
    (r"f'(x)", "f(x)"),
    (r"6.63\times10^{-34}", r"1.05\times10^{-34}"),
    ("0.0000001", "0.0000002"),
    ("10^{100}", "10^{100}+1"),
    (r"\infty", r"-\infty"),
    ("x^2+1=0", "x^2+1"),
    (r"x \geq 5", r"x \leq 5"),
    (r"12\text{ am}", r"12\text{ pm}"),
    (r"n^2 \text{ is odd}", r"n^2 \text{ is even}"),
    ("5 \\text{ million}", "5"),
    ("5", "5 factorial"),
    ("7", "7 is not right, maybe 8"),
    ("7", "6 or 7"),
    ("5", r"\frac{0}{0}"),
    ("5", r"\infty-\infty"),
    ("5", "nan"),
    (r"\text{east}", r"\text{west}"),
    (r"\text{Evelyn}", "42"),
    ("42", r"\text{forty-two}"),
    ("2", r"1}, \boxed{2"),
    ("2", "1}\n\\boxed{2"),
    ("5", "4=5"),
    ("5", "x=4=5"),
    ("i", "-i"),
    ("3+4i", "4+3i"),
    (r"\sin 30^\circ", r"\sin 31^\circ"),
    ("2", "2abcd"),
    ("C", "C. 15, not B"),
    ("C", "(B)(C)"),
    ("A. Smith", "A. Jones"),
    ("5", "9^{9^{9^{9}}}"),
    ("10^{10^{10^{10}}}", "10^{10}"),
    ("0.5", "9^9^9"),
    (r"\ln 2", "ln 3"),
    (r"\sin x", "sin(y)"),
    (r"\theta", "2theta"),
    ("5", "5 sin(x)"),
    ("101_2", "(101)_3"),
    (r"0.\overline{3}", "0.3"),
    ("0.3", r"0.\overline{3}"),
    ("1", "0.99999"),
    ("0", "0.0000001"),
    ("0.0000001", "0"),
    (r"[3,\infty)", "x > 3"),
    ("(2,5)", r"2<x \le 5"),
    ("(2,5)", "2<x"),
    (r"x \in [-2,7]", r"-2 \le x \le 7"),
    ("5", "4<x<6"),
    # not mathematics, not an error
    ("5", ""),
    ("5", " "),
    ("5", r"\frac{"),
    ("5", "\0\ud800\udfff"),
    ("5", "😀"),
    ("5", "\\" * 500),
    ("5", "{" * 500),
    ("5", "(" * 500 + "5" + ")" * 500),
    ("5", r"\frac{1}{" * 100 + "2" + "}" * 100),
    ("5", "5" * 2000),
    ("5", "5" + " " * 2000 + "+0"),
    ("5", "9^" * 400 + "9"),
    ("5", "1" * 900),
    ("5", "import os; os.abort()"),
    ("5", "__import__('os').abort()"),
]


@pytest.mark.parametrize("gold, prediction", EQUAL)
def test_equal_answers_are_right(gold, prediction, workers):
    assert answers.grade([box(prediction)], [gold], workers=workers) == [(True, None)]


@pytest.mark.parametrize("gold, prediction", DIFFERENT)
def test_different_answers_are_wrong(gold, prediction, workers):
    assert answers.grade([box(prediction)], [gold], workers=workers) == [(False, None)]


WORDED = [
    # gold, completion
    ("42", "The final answer is:\n\n42"),
    ("42", "The answer is:\n$$42$$"),
    ("42", "The final answer is:\n\\[42\\]"),
    ("42", "The final answer is\n\n$42$"),
    ("42", "Answer:\n$$\n42\n$$"),
    ("42", "Answer:\n\\[\n42\n\\]"),
    ("1/2", "The answer is: \\[\n\\frac{1}{2}.\n\\]\nWe are done."),
    ("42", "The answer is 42, since 6*7=42."),
    ("42", "The answer is $42$, as required."),
    ("42", "The answer is 42 (since x>0)."),
    ("C", "The answer is C because 2 is even."),
    ("C", "Answer: C, because"),
    ("42", "The answer is approximately 42."),
    ("42", "#### $42$"),
    ("1/2", r"#### $\frac{1}{2}$"),
    ("A", "#### A"),
]


@pytest.mark.parametrize("gold, completion", WORDED)
def test_an_answer_is_found_however_its_sentence_is_laid_out(gold, completion, workers):
    assert answers.grade([completion], [gold], workers=workers) == [(True, None)]


@pytest.mark.parametrize(
    "completion", ["", "I do not know.", r"<think> it is \boxed{5}", r"<think>\boxed{5}</think>Hm."]
)
def test_a_completion_without_an_answer_is_wrong_not_unscored(completion, workers):
    assert answers.grade([completion], ["5"], workers=workers) == [(False, None)]


@pytest.mark.parametrize(
    "gold, message",
    [
        (r"\frac{", "gold answer .* cannot be parsed"),
        ("", "gold answer '' is empty"),
        ("Answer is forty three.", "gold answer .* is a sentence"),
        ("7" * 2000, "gold answer '7777.* is over 1000 characters"),
        ("(" * 50 + "7" + ")" * 50, "gold answer .* depth"),
    ],
)
def test_a_gold_answer_that_cannot_be_read_is_an_error_not_a_wrong_answer(gold, message, workers):
    (verdict,) = answers.grade([box("5")], [gold], workers=workers)
    assert verdict.correct is None
    assert re.search(message, verdict.error)


def test_a_gold_answer_that_cannot_be_parsed_still_equals_itself(workers):
    gold = r"\text{The midpoints form a regular hexagon}"
    assert answers.grade([box(gold), box(r"A \cup B")], [gold, r"A \cup B"], workers=workers) == [(True, None)] * 2


HEALTHY = [(box(r"\frac{x}{2}"), "x/2", True), (box("2x"), "x", False)]


@pytest.mark.parametrize("prediction", [TOWER, r"\binom{1000000000}{500000000}", r"\int_0^\infty e^{-x^2}\sin(x^3) dx"])
def test_an_answer_that_hangs_the_grader_is_an_error_and_the_others_keep_their_verdicts(prediction, workers):
    completions = [HEALTHY[0][0], box(prediction), HEALTHY[1][0], HEALTHY[0][0]]
    start = time.monotonic()
    grades = answers.grade(completions, ["x/2", "5", "x", "x/2"], deadline_s=1.0, workers=workers)
    assert time.monotonic() - start < 8
    assert grades[1].correct is None and "deadline of 1 s" in grades[1].error
    assert [g for i, g in enumerate(grades) if i != 1] == [(True, None), (False, None), (True, None)]


def test_a_worker_killed_in_the_middle_of_an_answer_costs_that_answer_only():
    with pool.Pool(answers.CHECKER, workers=1, memory_mb=512) as single:
        assert answers.grade([HEALTHY[0][0]], ["x/2"], workers=single) == [(True, None)]
        process = single._idle.queue[0].popen
        threading.Timer(0.5, process.kill).start()
        grades = answers.grade(
            [box(TOWER), *[c for c, _, _ in HEALTHY]], ["5", "x/2", "x"], deadline_s=20, workers=single
        )
    assert grades == [(None, "the worker died: killed by SIGKILL"), (True, None), (False, None)]


def test_an_answer_that_eats_memory_is_an_error():
    with pool.Pool(answers.CHECKER, workers=1, memory_mb=64) as small:
        grades = answers.grade([box("[0, 2^{10^{9}}]"), HEALTHY[0][0]], ["[0,1]", "x/2"], deadline_s=30, workers=small)
    assert grades[0].correct is None and "out of memory" in grades[0].error
    assert grades[1] == (True, None)


def test_thousands_of_items_from_several_threads(workers):
    rng = random.Random(0)
    numbers = [rng.randrange(10**6) for _ in range(2000)]
    results = {}

    def use(shift):
        completions = [box(rf"\frac{{{n + shift * (n % 2)}}}{{x}}") for n in numbers[:100]] + [box(n) for n in numbers]
        golds = [rf"{n}/x" for n in numbers[:100]] + [str(n) for n in numbers]
        results[shift] = answers.grade(completions, golds, workers=workers)

    threads = [threading.Thread(target=use, args=(shift,)) for shift in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for grades in results.values():
        assert [g.correct for g in grades] == [n % 2 == 0 for n in numbers[:100]] + [True] * 2000
        assert all(g.error is None for g in grades)


def test_many_rows_at_once_each_get_their_own_verdict(workers):
    """By spelling, and by math-verify; the speed is printed (-s) and is for no test to judge."""
    start = time.monotonic()
    spelt = answers.grade([box(n) for n in range(10_000)], ["77"] * 10_000, workers=workers)
    middle = time.monotonic()
    compared = answers.grade([box(rf"\sqrt{{{n}}}") for n in range(300)], ["17"] * 300, workers=workers)
    end = time.monotonic()
    print(f"\n{10_000 / (middle - start):,.0f} items/s by spelling, {300 / (end - middle):,.0f} items/s by math-verify")
    assert [n for n, grade in enumerate(spelt) if grade.correct] == [77]
    assert [n for n, grade in enumerate(compared) if grade.correct] == [289]
    assert not [grade.error for grade in spelt + compared if grade.error]


def test_equal_pairs_are_compared_once():
    class Counting:
        def run(self, items, *, deadline_s):
            self.items = items
            return [pool.Outcome(True, None) for _ in items]

    # a stand-in, as the real function is under the type checker
    counting, grade = Counting(), answers.grade
    while hasattr(grade, "__wrapped__"):
        grade = grade.__wrapped__
    assert grade([box("x+y")] * 50, ["y+x"] * 50, workers=counting) == [(True, None)] * 50
    assert counting.items == [(["y+x"], "x+y")]


def test_mistakes_of_the_caller_are_named():
    with pytest.raises(ValueError, match="2 completions but 1 gold"):
        answers.grade(["a", "b"], ["c"])


def test_the_verifier_imports_no_array_library_and_no_computer_algebra():
    script = (
        "import sys; from tapojax.rewards import answers\n"
        r"assert answers.grade(['\\boxed{x/2}', '#### 5'], ['\\frac{x}{2}', '5']) == [(True, None)] * 2, 'grade'"
        "\nheavy = {'jax', 'numpy', 'flax', 'sympy', 'math_verify'} & set(sys.modules)\nassert not heavy, heavy"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=60)


def test_tidying_twice_changes_nothing():
    for gold, prediction in EQUAL:
        for text in (gold, prediction):
            once = spelling.tidy(text)
            assert spelling.key(spelling.tidy(once)) == spelling.key(once)


def _completion(case):
    return rf"\boxed{{{case['pred']}}}" if case.get("mode", case.get("kind")) == "answer" else case["pred"]


@pytest.mark.skipif(not CASES.is_dir(), reason=f"no grader cases at {CASES}")
def test_agreement_with_the_verdicts_of_public_graders(workers):
    """On the cases where three of four semantic graders agree. Where we differ on purpose is listed in the table."""
    lines = (CASES / "verdicts.jsonl").read_text("utf-8").splitlines()
    cases = [case for case in map(json.loads, lines) if isinstance(case["gold"], str) and case["kind"] != "choice"]
    grades = answers.grade([_completion(c) for c in cases], [c["gold"] for c in cases], deadline_s=4.0, workers=workers)
    table = collections.Counter()
    for case, verdict in zip(cases, grades, strict=True):
        core = "core" if case["core"] else "other"
        table[core, case["kind"], verdict.correct == case["verdict"]] += 1
        if case["core"] and verdict.correct != case["verdict"]:
            print(f"\n  expected {case['verdict']}, {verdict}: {case['gold']!r:.60} against {case['pred'][-60:]!r}")
    for core, kind in sorted({key[:2] for key in table}):
        agree, differ = table[core, kind, True], table[core, kind, False]
        print(f"\n{core:6} {kind:9} {agree}/{agree + differ} = {agree / (agree + differ):.1%}", end="")
    agree = sum(n for (core, _, equal), n in table.items() if core == "core" and equal)
    assert agree >= 0.98 * sum(n for (core, _, _), n in table.items() if core == "core")


@pytest.mark.skipif(not CASES.is_dir(), reason=f"no grader cases at {CASES}")
def test_agreement_with_graders_on_completions_of_real_models(workers):
    """No answer that three of four graders accept is refused; the few accepted against them are right on inspection."""
    with gzip.open(CASES / "reference_verdicts.jsonl.gz", "rt", encoding="utf-8") as lines:
        cases = [json.loads(line) for line in lines]
    cases = random.Random(0).sample([c for c in cases if not c["id"].startswith("verdict/")], 300)
    grades = answers.grade([_completion(c) for c in cases], [c["gold"] for c in cases], workers=workers)
    accepted = [sum(c["verdicts"][g] is True for g in SEMANTIC_GRADERS) for c in cases]
    assert not [
        (c["gold"], c["pred"][-60:])
        for c, g, n in zip(cases, grades, accepted, strict=True)
        if n >= 3 and not g.correct
    ]
    surplus = [
        (c["gold"], c["pred"][-60:]) for c, g, n in zip(cases, grades, accepted, strict=True) if n <= 1 and g.correct
    ]
    print(f"\n{len(surplus)} of 300 accepted against the majority: {surplus}")
    assert len(surplus) <= 6
    assert all(g.error is None for g in grades)

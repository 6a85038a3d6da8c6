"""The problem, the answer and the solution of a row, whatever its layout; nothing is damaged, nothing is guessed."""

import math

import pytest

from tapojax.datasets import overlap, reading, schema
from tapojax.rewards import spelling
from tests.datasets.layouts import GSM8K, INSTRUCTION, MATH, critic, verl


def example(row, **keys):
    return schema.example(row, "rows.parquet, row 7", "rows/6", **keys)


def read(row, **keys):
    found = example(row, **keys)
    return found["problem"], found["answer"], found["solution"]


# ---- layouts


@pytest.mark.parametrize(
    ("row", "want"),
    [
        (GSM8K[0], (GSM8K[0]["question"], "7", GSM8K[0]["answer"])),
        (GSM8K[1], (GSM8K[1]["question"], "1234", GSM8K[1]["answer"])),
        ({"question": b"1+1?", "answer": b"so\n#### 2", "short_answer": b"2"}, ("1+1?", "2", "so\n#### 2")),  # TFDS
        (MATH, (MATH["problem"], "\\frac14", MATH["solution"])),
        ({"Problem": "1?", "Solution": "It is.", "Answer": 33, "ID": "2024-I-1"}, ("1?", "33", "It is.")),
        ({"prompt": f"1?\n{INSTRUCTION}", "answer": 70}, ("1?", "70", "")),  # QwQ
        ({"prompt": "1?", "solution": "34"}, ("1?", "34", "")),  # open-r1's DAPO: the solution is the answer
        ({"problem": "1?", "solution": "It is \\boxed{5}."}, ("1?", "5", "It is \\boxed{5}.")),
        ({"question": "1?", "final_answer": ["$2$"], "solution": ["one way", "another"]}, ("1?", "2", "one way")),
        ({"problem": "1?", "expected_answer": "7"}, ("1?", "7", "")),
        ({"input": "1?", "label": "7"}, ("1?", "7", "")),
        (verl(f"1?\n\n{INSTRUCTION}", "34"), ("1?", "34", "")),
        (verl("asked in words", "34", raw_problem="1?"), ("1?", "34", "")),
        (verl("asked in words", {"target": "34", "question": "1?"}), ("1?", "34", "")),
        (verl("asked", {"target": "1", "question": "1?", "solution": "It is."}), ("1?", "1", "It is.")),
        (
            {"problem": "1?", "gold_analysis": " Since so, it is so.\n", "answer": "B"},
            ("1?", "B", "Since so, it is so."),
        ),
    ],
)
def test_a_published_row_says_problem_answer_and_solution(row, want):
    assert read(row) == want


def test_a_trace_may_be_the_end_of_a_conversation():
    """RTPO's rows: the last turn is the assistant's reference reasoning."""
    row = {"prompt": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "Think."}], "answer": "1"}
    assert read(row) == ("1?", "1", "Think.")
    asked = {"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "1?"}], "answer": "1"}
    assert read(asked) == ("1?", "1", "")


DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    '$Answer (without quotes) where $Answer is the answer to the problem.\n\n1?\n\nRemember to put your answer on its '
    'own line after "Answer:".'
)  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        DAPO,
        '1? Let\'s think step by step and output the final answer after "####".',
        "1? Let's think step by step and output the final answer within \\boxed{}.",
        f"1?\n\n{INSTRUCTION}",
        "1? Please output the final answer within \\boxed{}.",
        "You are a knowledgeable math assistant. Answer the following questions and think step by step. 1? Please "
        "solve step by step and put your final answer within \\boxed{}.",
    ],
)
def test_known_instructions_are_not_part_of_a_problem(text):
    assert schema.bare(text) == "1?"


@pytest.mark.parametrize("text", ["Let's think step by step.", "Put 3 balls in a box. What is the final answer?"])
def test_other_words_stay(text):
    assert schema.bare(text) == text


def test_ids_are_those_of_the_row_or_its_place():
    assert example({"problem": "1?", "answer": "1", "id": 60})["id"] == "60"
    assert example({"problem": "1?", "answer": "1", "unique_id": "test/a/1.json"})["id"] == "test/a/1.json"
    assert example(verl("1?", "1", index="467930b9-d683"))["id"] == "467930b9-d683"
    assert example(verl("1?", "1", index=2))["id"] == "rows/6", "numbers repeat from file to file"
    assert example({"problem": "1?", "answer": "1", "id": None})["id"] == "rows/6"


def test_what_curricula_use_is_kept():
    found = example({**MATH, "pass_rate": 0.5, "source": "hendrycks/math"})
    assert {k: found[k] for k in found.keys() - {"id", "problem", "answer", "solution"}} == {
        "level": "5", "subject": "Algebra", "source": "hendrycks/math", "pass_rate": 0.5,
    }  # fmt: skip
    assert (
        example({**MATH, "level": 4.0})["level"] == "4" and example({**MATH, "level": "Level ?"})["level"] == "Level ?"
    )
    assert "pass_rate" not in example({**MATH, "pass_rate": math.nan})
    assert example({**MATH, "solved": 1}, pass_rate_key="solved")["pass_rate"] == 1.0


# ---- answers


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (27.0, "27"), (142, "142"), (1.6, "1.6"), ("073", "073"), (-1, "-1"), (["336^\\circ"], "336^\\circ"),
        (105263157894736842, "105263157894736842"), ("105263157894736842", "105263157894736842"),
        ("58,500", "58500"), ("1,2", "1,2"), ("$\\frac{1}{2}$", "\\frac{1}{2}"), ("$1$ and $2$", "$1$ and $2$"),
        (b"12", "12"), ("\\boxed{12}", "12"), (0, "0"), (0.0, "0"), (1e-7, "1e-07"),
    ],
)  # fmt: skip
def test_answers_become_text_without_damage(value, want):
    assert example({"problem": "1?", "answer": value})["answer"] == want


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (["1", "2"], "answer to be a text or a number, it is .*'1', '2'"),
        (True, "answer to be a text or a number, it is 'True'"),
        ({"a": 1}, "no value for .'answer'."),
        (1.0526315789473685e17, "lost its last digits"),
        (math.inf, "answer to be a text or a number, it is 'inf'"),
        (-math.inf, "answer to be a text or a number, it is '-inf'"),
        (math.nan, "no value for .'answer'."),
        ("", "no value for .'answer'."),
        ("  ", "no value for .'answer'."),
        (None, "no value for .'answer'."),
        ([], "no value for .'answer'."),
    ],
)
def test_an_answer_that_is_none_is_named_with_file_and_row(value, said):
    with pytest.raises(ValueError, match=f"rows.parquet, row 7: .*{said}"):
        example({"problem": "1?", "answer": value})


@pytest.mark.parametrize("solution", ["It is \\boxed{}.", "A long story " * 20, "two\nlines", "\\boxed{"])
def test_a_solution_that_gives_no_answer_is_none(solution):
    with pytest.raises(ValueError, match="row 7: no value for .'answer'."):
        example({"problem": "1?", "solution": solution})


def test_the_label_of_steps_is_no_answer():
    with pytest.raises(ValueError, match="no value for .'answer'."):
        example({"problem": "1?", "steps": ["a"], "label": 0})


@pytest.mark.parametrize("problem", [7, {"text": "1?"}, ["one", "two"]])
def test_a_problem_that_is_no_text_is_named(problem):
    with pytest.raises(ValueError, match="row 7: expected problem to be a text or messages, it is"):
        example({"problem": problem, "answer": "1"})


@pytest.mark.parametrize(
    "row", [{"answer": "1"}, {"problem": "", "answer": "1"}, {"problem": INSTRUCTION, "answer": "1"}]
)
def test_a_row_without_problem_is_named_with_what_it_has(row):
    with pytest.raises(ValueError, match=r"row 7: no value for \['problem'\]; it has .*answer.*set task.problem_key"):
        example(row)


def test_a_solution_of_no_text_is_named():
    with pytest.raises(ValueError, match="row 7: expected solution to be a text or a number"):
        example({"problem": "1?", "answer": "1", "solution": {"a": "b"}})


@pytest.mark.parametrize("rate", [1.5, -0.1, "half", True])
def test_a_pass_rate_is_a_share(rate):
    with pytest.raises(ValueError, match="row 7: expected pass_rate to be a share of right answers"):
        example({"problem": "1?", "answer": "1", "pass_rate": rate})


def test_named_columns_go_first():
    row = {"problem": "not this", "answer": "0", "ask": "1?", "gold": "#### 5", "how": "So."}
    assert read(row, problem_key="ask", answer_key="gold", solution_key="how") == ("1?", "5", "So.")
    with pytest.raises(ValueError, match=r"no value for \['answer'\]"):
        example(row, answer_key="none")


# ---- real files

NATIVE = {  # file: rows, a piece of the first problem, first answer, set of the same problems, rows in it
    "BytedTsinghua-SIA_aime-2024.parquet": (960, "Find the largest possible real part", "540", "aime24_test"),
    "MATH-500_test.jsonl": (500, "Convert the point", "\\left( 3, \\frac{\\pi}{2} \\right)", "math500_test"),
    "QwQ_aime25.jsonl": (30, "Find the sum of all integer bases", "70", "aime25_test"),
    "aime2025_problem_answer.parquet": (30, "Find the sum of all integer bases", "70", None),
    "amc23_id_problem_answer_url.parquet": (40, "Cities $A$ and $B$", "27", "amc23_test"),
    "deepscaler_aime.5rows.json": (5, "Let $x$, $y$ and $z$", "60", "aime_1983_2023_train"),
    "gsm8k_train.20lines.jsonl": (20, "Natalia sold clips", "72", "gsm8k_train"),
    "hendrycks_math_test.50rows.parquet": (50, "How many vertical asymptotes", "2", "math_test"),
    "made_dapo-math-17k.40rows.parquet": (40, "In triangle $ABC$", "34", "dapo_math_17k"),
    "oat_aime.arrow": (30, "Every morning Aya", "204", "aime24_test"),
    "oat_amc.arrow": (83, "$\\frac{m}{n}$ is the Irreducible", "142", "amc_aimo83_test"),
    "qwen_aime24.5lines.jsonl": (5, "Every morning Aya", "204", "aime24_test"),
    "qwen_amc23.5lines.jsonl": (5, "Cities $A$ and $B$", "27", "amc23_test"),
    "qwen_minerva_math.5lines.jsonl": (5, "Each of the two Magellan telescopes", "1.6", "minerva_test"),
    "qwen_olympiadbench.5lines.jsonl": (5, "Xenia and Sergey", "2", "olympiadbench_test"),
    "verl_aime2024.parquet": (30, "Every morning Aya", "204", "aime24_test"),
    "verl_aime2025.parquet": (30, "Find the sum of all integer bases", "70", "aime25_test"),
    "verl_amc2023.parquet": (40, "Cities $A$ and $B$", "27", "amc23_test"),
    "verl_dapo_math_17k_svs.50rows.parquet": (50, "In triangle $ABC$", "34", "dapo_math_17k"),
    "verl_ground_truth_struct_aime2025.parquet": (30, "Find the sum of all integer bases", "70", None),
    "verl_math500.parquet": (500, "Convert the point", "\\left( 3, \\frac{\\pi}{2} \\right)", "math500_test"),
    "verl_math_lighteval.50rows.parquet": (50, "Let \\[f(x) =", "0", "math_train"),
    "verl_math_with_solution_struct.50rows.parquet": (50, "Let \\[f(x) =", "0", "math_train"),
}
OWN_ANSWERS = {"verl_math_with_solution_struct.50rows.parquet": 2}  # "\\frac{-33}{2}" for "k = \\frac{-33}{2}"


@pytest.mark.parametrize("name", NATIVE)
def test_a_file_as_published_has_the_problems_and_answers_that_are_known(shared, name):
    rows, begins, answer, same = NATIVE[name]
    path = str(shared / "native" / name)
    found = list(schema.examples(reading.iterate(path), name, path))
    assert len(found) == rows
    assert begins in found[0]["problem"][:60] and found[0]["answer"] == answer
    assert not any(schema.INSTRUCTION.search(one["problem"]) for one in found)
    if same:
        known = {plain(row["problem"]): row["answer"] for row in reading.iterate(shared / f"{same}.jsonl.gz")}
        met = [(one["answer"], known.get(plain(one["problem"]))) for one in found]
        met = [(ours, theirs) for ours, theirs in met if theirs is not None]
        assert len(met) > 0.6 * rows, "some copies write formulas and figures their own way"
        assert sum(not alike(*pair) for pair in met) == OWN_ANSWERS.get(name, 0)


def plain(problem):
    return overlap.loose(overlap.fold(problem))


def alike(one, other):
    return spelling.alike(spelling.tidy(one), spelling.tidy(other)) or one.lstrip("0") == other.lstrip("0")


def test_every_native_file_is_tried(shared):
    steps = {"ProcessBench_gsm8k.5rows.json", "fapo-critic.100lines.jsonl", "README.md"}  # see test_labelled
    assert {path.name for path in (shared / "native").iterdir()} == NATIVE.keys() | steps


def test_a_critics_prompt_is_a_problem_to_a_trainer_of_problems():
    """As verl reads FAPO-Critic: the prompt whole, the label as answer."""
    problem, answer, _ = read(critic(label=-1))
    assert "[Ground Truth]" in problem and answer == "-1"

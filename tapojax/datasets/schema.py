r"""What a row of any published layout means: its bare problem, its final answer, its worked solution.

Layouts: verl's (messages in `prompt`, the answer in `reward_model.ground_truth`), question and answer under the names
that data sets give them, GSM8K's `####`, MATH's last `\boxed{}`, conversations that end in a worked solution (RTPO).
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tapojax.rewards import spans

Row = Mapping[str, Any]
PROBLEM = ("extra_info.raw_problem", "extra_info.question", "reward_model.ground_truth.question") + tuple(
    "problem Problem question Question prompt input".split()  # the bare problem first
)
ANSWER = ("reward_model.ground_truth.target", "reward_model.ground_truth") + tuple(
    "answer Answer expected_answer final_answer short_answer label".split()
)
SOLUTION = ("solution", "Solution", "reward_model.ground_truth.solution", "gold_analysis", "explanation", "annotation")
SOURCE = ("source", "data_source")
ID = ("id", "ID", "unique_id", "extra_info.id")
KEPT = {"level": ("level",), "subject": ("subject", "type"), "source": SOURCE, "subset": ("subset",)}

DAPO_PREFIX = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem."
)
PREFIXES = (
    DAPO_PREFIX,
    "You are a knowledgeable math assistant. Answer the following questions and think step by step.",
)
DAPO_SUFFIX = 'Remember to put your answer on its own line after "Answer:".'
INSTRUCTION = re.compile(  # of verl, FAPO, Qwen, PAPO: "Please reason step by step, and put your final answer ..."
    r"(?:(?:Let's|Please) (?:think|reason|solve) step by step,? and|Please) (?:put|output) (?:your|the) final answer "
    r"(?:within \\boxed\{\}|after \"####\")\.$"
)
BARE_ANSWER = 100  # characters of a `solution` that is nothing but the answer
THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?")
EXACT_FLOAT = 2.0**53


def example(
    row: Row,
    place: str,
    default_id: str,
    *,
    problem_key: str = "",
    answer_key: str = "",
    solution_key: str = "",
    pass_rate_key: str = "pass_rate",
) -> dict[str, Any]:
    """{id, problem, answer, solution} of a row as texts; what it has of {level, subject, source, subset, pass_rate}.

    Args:
      place: file and row, for messages.
      default_id: where the row has none.
      problem_key, answer_key, solution_key: columns to take instead of finding them.
      pass_rate_key: of a number in [0, 1], where the row has it.

    Raises:
      ValueError: no problem, no answer, or one that is no text and no number; a pass rate outside [0, 1].
    """
    flat = flattened(row)
    problem = _problem(flat, place, problem_key)
    answer, told = _answer(flat, place, answer_key)
    solution = _solution(flat, place, solution_key) or told or _assistant(row)
    if answer is None and solution:
        answer = final(solution)
        if answer is None and is_bare(solution):
            answer, solution = solution, ""
    if missing := [name for name, value in (("problem", problem), ("answer", answer)) if not value]:
        raise ValueError(
            f"{place}: no value for {missing}; it has {sorted(row)}. "
            "If they are in columns of other names, set task.problem_key and task.answer_key"
        )
    assert answer is not None
    found = {"id": identity(flat, default_id), "problem": problem, "answer": tidy(answer), "solution": solution or ""}
    return found | kept(flat) | _pass_rate(row, place, pass_rate_key)


def flattened(row: Row) -> Row:
    """The row with what is inside verl's structs under names such as "extra_info.index"."""
    found = dict(row)
    for name in ("extra_info", "reward_model", "reward_model.ground_truth"):
        if isinstance(inner := found.get(name), Mapping):
            found |= {f"{name}.{key}": value for key, value in inner.items()}
    return found


def identity(flat: Row, default: str) -> str:
    """The id that a flattened row has, or the default."""
    index = flat.get("extra_info.index")
    found = next((value for key in ID if (value := flat.get(key)) not in (None, "")), None)
    if found is None and isinstance(index, str) and index:  # numbers repeat from file to file
        found = index
    return default if found is None else str(found)


def kept(flat: Row) -> dict[str, str]:
    """A flattened row's level ("Level 5" is "5"), subject, source and subset, where it has them."""
    found = {name: next((flat[key] for key in keys if key in flat), None) for name, keys in KEPT.items()}
    if match := re.fullmatch(r"(?:Level )?(\d+)(?:\.0)?", str(found["level"])):
        found["level"] = match[1]
    return {name: str(value) for name, value in found.items() if value not in (None, "")}


def bare(text: str) -> str:
    """A problem without the instructions that files are known to put around it."""
    text = text.strip()
    for prefix in PREFIXES:
        text = text.removeprefix(prefix).lstrip()
    return INSTRUCTION.sub("", text.removesuffix(DAPO_SUFFIX).rstrip()).rstrip()


def final(text: str) -> str | None:
    """The final answer that a worked solution gives: behind `####`, in the last box; None without either."""
    if "####" in text:
        return text.rpartition("####")[2].strip() or None
    span = spans.boxed(text, 0)
    return text[slice(*span)].strip() or None if span else None


def is_bare(solution: str) -> bool:
    """Whether a solution is nothing but the answer: short, without a mark of one."""
    return len(solution) <= BARE_ANSWER and not any(mark in solution for mark in ("\n", "\\boxed", "\\fbox", "####"))


def text_of(value: Any, place: str, name: str) -> str | None:
    """A value as text, without damage: 27.0 is "27", 105263157894736842 stays; None and "" are None.

    Raises:
      ValueError: it has no one text: several values, a truth value, infinity, a float whose last digits are lost.
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bytes):
        value = value.decode()
    if value is None or value == "" or value == [] or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, float) and value.is_integer():
        if abs(value) > EXACT_FLOAT:
            raise ValueError(f"{place}: {name} is {value!r}, a float that has lost its last digits")
        return str(int(value))
    if isinstance(value, bool) or not hasattr(value, "__float__") or value in (math.inf, -math.inf):
        raise ValueError(f"{place}: expected {name} to be a text or a number, it is {str(value)[:80]!r}")
    return str(value)


def tidy(answer: str) -> str:
    """Without outer dollars and thousands separators."""
    if len(answer) > 2 and answer[0] == answer[-1] == "$" and answer.count("$") == 2:
        answer = answer[1:-1].strip()
    return answer.replace(",", "") if THOUSANDS.fullmatch(answer) else answer


def _problem(flat: Row, place: str, key: str) -> str | None:
    name, value = _first(flat, (key,) if key else PROBLEM)
    said = message(value, "user") if isinstance(value, list) else value
    text = said.decode() if isinstance(said, bytes) else said
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{place}: expected {name} to be a text or messages, it is {str(value)[:80]!r}")
    return bare(text) if text else None


def _answer(flat: Row, place: str, key: str) -> tuple[str | None, str | None]:
    """The final answer, and the worked solution around it where the column has one."""
    for name in (key,) if key else ANSWER:
        value = flat.get(name)
        several = isinstance(value, Mapping)  # a ground truth of several fields, whose target was empty
        if not key and (several or (name == "label" and "steps" in flat)):  # or a label of steps
            continue
        if (text := text_of(value, place, name)) is not None:
            said = final(text)
            return (text, None) if said is None else (said, text)
    return None, None


def _solution(flat: Row, place: str, key: str) -> str | None:
    name, value = _first(flat, (key,) if key else SOLUTION)
    if isinstance(value, list) and value:  # several ways to solve it
        value = value[0]
    return text_of(value, place, name)


def _pass_rate(row: Row, place: str, key: str) -> dict[str, float]:
    rate = row.get(key)
    if rate is None or rate != rate:
        return {}
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
        raise ValueError(f"{place}: expected {key} to be a share of right answers in [0, 1], it is {str(rate)[:80]!r}")
    return {"pass_rate": float(rate)}


def _assistant(row: Row) -> str | None:
    messages = row.get("prompt")
    last = isinstance(messages, list) and messages and isinstance(messages[-1], dict) and messages[-1].get("role")
    return message(messages, "assistant") if last == "assistant" else None


def message(messages: Any, role: str) -> Any:
    """The last one that `role` says; None if it says nothing, the value itself if it is no conversation."""
    if not all(isinstance(said, dict) and "content" in said for said in messages):
        return messages
    return next((said["content"] for said in reversed(messages) if said.get("role") == role), None)


def _first(flat: Row, names: tuple[str, ...]) -> tuple[str, Any]:
    found = ((name, value) for name in names if (value := flat.get(name)) not in (None, "", b""))
    return next(found, (names[0], None))


def check_template(template: str, name: str):
    """Raises ValueError where a problem cannot be filled into a template, or is not in what comes out."""
    probe = "a problem"
    try:
        filled = template.format(problem=probe)
    except (ValueError, LookupError, AttributeError):  # a brace alone, {}, {question}, {problem.text}
        filled = ""
    if probe not in filled:
        raise ValueError(f"{name}={template!r} needs {{problem}}; write other braces twice, \\boxed{{{{}}}}")


def examples(rows: Iterable[Row], name: str, path: str, **keys: str) -> Iterator[dict[str, Any]]:
    """The examples of a file's rows; `name` begins the ids of rows without one."""
    for index, row in enumerate(rows):
        yield example(row, f"{path}, row {index + 1}", f"{name}/{index}", **keys)

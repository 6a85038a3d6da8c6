r"""Reference solutions as a policy could have written them: the reasoning, and a closing that boxes the answer."""

import re

from tapojax.rewards import answers, spans, spelling

CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's notes to a calculator
BOX = re.compile(r"\\(?:boxed|fbox)\b")


def split(solution: str, answer: str) -> tuple[str, str]:
    r"""A solution as (reasoning, closing), whose concatenation answers `\boxed{answer}`.

    The reasoning ends before the sentence or line that gives the final answer, in a solution of a single sentence
    before the answer itself; it holds no box and no `####`. The closing is the rest where that boxes the answer and
    nothing else, otherwise just the box: so a solution told in several ways ends with the first.
    A solution that nowhere gives the answer, or gives another one, is reasoning as a whole.
    """
    text = CALCULATOR.sub("", solution).strip()
    if BOX.search(answer) or "####" in answer:  # the answer's column may hold a solution too
        answer = answers.extract(answer) or answer
    begin = _answer_begins(text, answer)
    ends = [match.end() for match in spans.SENTENCE_END.finditer(text, 0, begin)]
    before = text[: ends[-1]] if ends and begin < len(text) else ""
    reasoning = before.rstrip() or text[:begin].rstrip("#$ \n")
    rest = text[len(reasoning) :]
    if len(BOX.findall(rest)) == 1 and _says(rest, answer):
        return reasoning, rest
    return reasoning, ("\n" if reasoning else "") + f"\\boxed{{{answer}}}"


def _answer_begins(text: str, answer: str) -> int:
    """Where the first box stands; failing that, the answer in a text without one; failing that, the end."""
    if box := BOX.search(text):
        return box.start()
    span = spans.find(text)
    bare = span == (0, len(text))
    return len(text) if span is None or bare or not _says(text, answer) else span[0]


def _says(text: str, answer: str) -> bool:
    found = answers.extract(text)
    return found is not None and spelling.alike(spelling.tidy(answer), spelling.tidy(found))

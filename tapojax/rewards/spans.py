r"""Where the final answer stands in a completion. One pass over any text, megabytes of open braces too.

A span rather than a string, because whoever edits an answer in place (an injected wrong answer, a highlighted one) must
cut exactly where the verifier reads.
"""

import re
from collections.abc import Iterator

BOX_TOKEN = re.compile(r"(\\\\?(?:boxed|fbox)\s*\{)|\\\\?boxed\s*([-+]?\d[\d.,/]*)|\\.|[{}]", re.DOTALL)
# what may stand between the boxes of one answer: "\boxed{1} \text{ and } \boxed{2}"
BETWEEN = r"(?:[\s$,;&]|\\[()\[\],;: \\]|\\q?quad(?![a-zA-Z])|\\text ?\{ ?(?:and|or) ?\}|\b(?:and|or)\b)*"
BETWEEN_BOXES = re.compile(rf"\}}{BETWEEN}")
JOINT = re.compile(rf"\}}{BETWEEN}\\\\?(?:boxed|fbox)\s*\{{")
MAX_BETWEEN = 60  # characters
FINAL_ANSWER = re.compile(
    r"\bfinal answer is:?[ \t]*(?:\$([^$\n]{1,200})\$|\\\(([^\n]{1,200}?)\\\))(?!\w)", re.IGNORECASE
)
HASHES = re.compile(r"####[ \t]*([-+]?[$€£]?[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?)([^\n]*)")
AFTER_HASHES = re.compile(r"[ \t.%]*(?:<\|[^\n]*)?")
ANSWER_IS = re.compile(r"\banswer\b[*_ \t]*(?:is\b[ \t]*:?|([:=：]))", re.IGNORECASE)
RESULT_IS = re.compile(r"\b(?:result|solution) (?:is\b[ \t]*:?|([:=：]))", re.IGNORECASE)
SENTENCE_END = re.compile(r"\n|[.!?](?=\s|\*|$)|。|<[|/]")
# what may stand before an answer, and what says why it is the answer; "5 or 6" and "5, which is wrong" are no reasons,
# and what comes behind "which is" may be the answer itself
BEFORE = re.compile(
    r"(?:[*_\s]|(?:approximately|about|around|roughly|exactly|precisely|simply|just|therefore|thus|equal to|given by"
    r"|option|choice)\b:?)*",
    re.IGNORECASE,
)
REASON = re.compile(
    r"(?: ?[,;—–] ?| )\(?(?:since|because|(?<!well )as(?! well))\b"
    r"|(?:[,;] ?| \()(?:where|by|using|with equality|which(?=[^\d$\\]{0,80}$))\b"
    r"|(?-i:(?<=\$\$|\\\]) (?=[A-Z]))",  # the sentence that follows a display without a full stop
    re.IGNORECASE,
)
DOUBT = re.compile(
    r"\b(?:or|but|not|never|cannot|maybe|perhaps|possibly|wrong|incorrect|false|otherwise|unless|if|instead|either|also"
    r"|as well|while|whereas|since|because)\b|n['’]t\b",
    re.IGNORECASE,
)
DISPLAYS = {"$$": "$$", r"\[": r"\]", r"\(": r"\)"}
JSON_ANSWER = re.compile(r'"answer"\s*:\s*(?:"((?:[^"\\]|\\.)*)"|([-+]?\d[\d.]*))')
COUNT = re.compile(r"\$?[-+]?\d[\d.,/]*\$? [A-Za-z]+\.?")  # "28 percent"
MAX_BARE = 200  # characters of a completion that is nothing but an answer

Span = tuple[int, int]


def find(text: str, *, side_by_side: bool = False) -> Span | None:
    r"""The final answer as `text[begin:end]`, or None when the completion gives none.

    Only what follows the last `</think>` counts; while a `<think>` is open nothing counts. There, in this order:
    the last balanced `\boxed{}` or `\fbox{}` (or `\boxed 5`), unless a "final answer is $...$" follows it, the last
    `<answer>` tag, the last number alone behind a `####` (on the last line mathematics too), the last "answer is ..."
    or "answer: ..." (failing that, "result" or "solution") without the reason behind it, the last JSON "answer", and
    the whole text when it is a single line of mathematics without prose. If the place is empty there is no answer.

    side_by_side: boxes with nothing but commas, "and" and white space between them are one answer. The span then goes
    from the first to the last, and `join` makes a list of it; else it is the last box, where the public parsers look.
    """
    start = text.rfind("</think>") + len("</think>") if "</think>" in text else 0
    if text.find("<think>", start) >= 0:
        return None
    if found := _boxed_answer(text, start, side_by_side):
        return _trim(text, *found)
    for finder in (_tagged, _hashes, _phrase, _json, _bare):
        if found := finder(text, start):
            return _trim(text, *found)
    return None


def _trim(text: str, begin: int, end: int) -> Span | None:
    content = text[begin:end]
    if not content.strip().strip("$ "):
        return None
    return begin + len(content) - len(content.lstrip()), end - (len(content) - len(content.rstrip()))


def boxed(text: str, start: int) -> Span | None:
    r"""Content of the last balanced `\boxed{}` or `\fbox{}` (or `\boxed 5`) from `start`; of nested boxes the inner."""
    last = _last(_boxes(text, start))
    return last and last[1]


def _boxes(text: str, start: int) -> Iterator[tuple[int, Span]]:
    """Each box that is the last so far: where its command and where its content stands."""
    open_braces: list[Span | None] = []  # for each: command and begin of the content, None if it is no box's
    last = start
    for token in BOX_TOKEN.finditer(text, start):
        if token[1]:
            open_braces.append(token.span())
        elif token[2]:
            last = token.start(2)
            yield token.start(), token.span(2)
        elif token[0] == "{":
            open_braces.append(None)
        elif token[0] == "}" and open_braces:
            box = open_braces.pop()
            if box is not None and box[1] > last:
                last = box[1]
                yield box[0], (box[1], token.start())


def join(answer: str) -> str:
    r"""What stands in boxes side by side, as a list: `1}, \boxed{2` is `1, 2`."""
    return JOINT.sub(", ", answer)


def _boxed_answer(text: str, start: int, side_by_side: bool) -> Span | None:
    begin, box = start, None
    for command, content in _boxes(text, start):
        begin = begin if side_by_side and box and _together(text, box, command, content) else content[0]
        box = content
    if box is None:
        return None
    final = _last(FINAL_ANSWER.finditer(text, box[1]))
    return final.span(final.lastindex) if final else (begin, box[1])


def _together(text: str, box: Span, command: int, other: Span) -> bool:
    """Whether the box whose command begins there goes on with the answer of the box before it."""
    between = text[box[1] : command] if 0 < command - box[1] <= MAX_BETWEEN else ""
    return bool(BETWEEN_BOXES.fullmatch(between)) and text[slice(*box)].strip() != text[slice(*other)].strip()


def _tagged(text: str, start: int) -> Span | None:
    end = text.rfind("</answer>", start)
    begin = text.rfind("<answer>", start, end) if end >= 0 else -1
    return (begin + len("<answer>"), end) if begin >= 0 else None


def _hashes(text: str, start: int) -> Span | None:
    # alone on its line: a markdown heading "#### 3. Conclusion" is no answer
    alone = (m.span(1) for m in HASHES.finditer(text, start) if AFTER_HASHES.fullmatch(m[2]))
    number, last = _last(alone), text.rfind("####", start)
    formula = _bare(text, last + len("####")) if last >= 0 and (number is None or number[0] < last) else None
    return formula or number


def _phrase(text: str, start: int) -> Span | None:
    matches = ANSWER_IS.finditer(text, start)
    match = _last(matches) or _last(RESULT_IS.finditer(text, start))
    if match is None:
        return None
    begin = next(BEFORE.finditer(text, match.end())).end()
    closer = DISPLAYS.get(text[begin : begin + 2])
    stop = SENTENCE_END.search(text, max(begin, text.find(closer, begin + 2) if closer else begin))
    end = stop.start() if stop else len(text)
    reason = REASON.search(text, begin + 1, end)
    if reason and not DOUBT.search(text, reason.end(), end):
        end = reason.start()
    while end > begin and text[end - 1] in "*_ \t":
        end -= 1
    # "Answer: the largest n is 34"
    verb = text.rfind(" is ", begin, end) if match[1] else -1
    return (verb + len(" is ") if verb >= 0 else begin), end


def _json(text: str, start: int) -> Span | None:
    match = _last(JSON_ANSWER.finditer(text, start))
    return match.span(match.lastindex) if match else None


def _bare(text: str, start: int) -> Span | None:
    line = text[start:].strip()
    if not line or len(line) > MAX_BARE or "\n" in line or "boxed" in line:
        return None
    if COUNT.fullmatch(line):
        return start, len(text)
    prose = " " in line and re.search(r"[^\W\d_]{3}", re.sub(r"\\[a-zA-Z]+(?:\{[a-zA-Z* ]*\})?", "", line))
    return None if prose else (start, len(text))


def _last(items):
    item = None
    for item in items:  # noqa: B007
        pass
    return item

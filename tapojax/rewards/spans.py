r"""Where the final answer stands in a completion. One pass over any text, megabytes of open braces too.

A span rather than a string, because whoever edits an answer in place (an injected wrong answer, a highlighted one) must
cut exactly where the verifier reads.
"""

import re

BOX_TOKEN = re.compile(r"(\\\\?(?:boxed|fbox)\s*\{)|\\\\?boxed\s*([-+]?\d[\d.,/]*)|\\.|[{}]", re.DOTALL)
HASHES = re.compile(r"####[ \t]*([-+]?[$€£]?[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?)([^\n]*)")
AFTER_HASHES = re.compile(r"[ \t.%]*(?:<\|[^\n]*)?")
ANSWER_IS = re.compile(r"\banswer\b[*_ \t]*(?:is\b[ \t]*:?|([:=：]))", re.IGNORECASE)
RESULT_IS = re.compile(r"\b(?:result|solution) (?:is\b[ \t]*:?|([:=：]))", re.IGNORECASE)
SENTENCE_END = re.compile(r"\n|[.!?](?=\s|\*|$)|。|<[|/]")
JSON_ANSWER = re.compile(r'"answer"\s*:\s*(?:"((?:[^"\\]|\\.)*)"|([-+]?\d[\d.]*))')
MAX_BARE = 200  # characters of a completion that is nothing but an answer

Span = tuple[int, int]


def find(text: str) -> Span | None:
    r"""The final answer as `text[begin:end]`, or None when the completion gives none.

    Only what follows the last `</think>` counts; while a `<think>` is open nothing counts. There, in this order:
    the last balanced `\boxed{}` or `\fbox{}` (or `\boxed 5`), the last `<answer>` tag, the last number alone behind a
    `####`, the last "answer is ..." or "answer: ..." (failing that, "result" or "solution"), the last JSON "answer",
    and the whole text when it is a single line of mathematics without prose.
    """
    start = text.rfind("</think>") + len("</think>") if "</think>" in text else 0
    if text.find("<think>", start) >= 0:
        return None
    for finder in (boxed, _tagged, _hashes, _phrase, _json, _bare):
        if found := finder(text, start):
            return _trim(text, *found)
    return None


def _trim(text: str, begin: int, end: int) -> Span:
    content = text[begin:end]
    begin += len(content) - len(content.lstrip())
    return begin, max(begin, end - (len(content) - len(content.rstrip())))


def boxed(text: str, start: int) -> Span | None:
    r"""Content of the last balanced `\boxed{}` or `\fbox{}` (or `\boxed 5`) from `start`; of nested boxes the inner."""
    open_braces: list[int | None] = []  # for each: where the content of a box begins, None if it is another brace
    best = None
    for token in BOX_TOKEN.finditer(text, start):
        if token[1]:
            open_braces.append(token.end())
        elif token[2]:
            best = token.span(2)
        elif token[0] == "{":
            open_braces.append(None)
        elif token[0] == "}" and open_braces:
            begin = open_braces.pop()
            if begin is not None and (best is None or begin > best[0]):
                best = begin, token.start()
    return best


def _tagged(text: str, start: int) -> Span | None:
    end = text.rfind("</answer>", start)
    begin = text.rfind("<answer>", start, end) if end >= 0 else -1
    return (begin + len("<answer>"), end) if begin >= 0 else None


def _hashes(text: str, start: int) -> Span | None:
    # alone on its line: a markdown heading "#### 3. Conclusion" is no answer
    alone = (m.span(1) for m in HASHES.finditer(text, start) if AFTER_HASHES.fullmatch(m[2]))
    return _last(alone)


def _phrase(text: str, start: int) -> Span | None:
    matches = ANSWER_IS.finditer(text, start)
    match = _last(matches) or _last(RESULT_IS.finditer(text, start))
    if match is None:
        return None
    begin = match.end()
    while begin < len(text) and (text[begin] in "*_ \t" or (match[1] and text[begin].isspace())):
        begin += 1
    stop = SENTENCE_END.search(text, begin)
    end = stop.start() if stop else len(text)
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
    prose = " " in line and re.search(r"[^\W\d_]{3}", re.sub(r"\\[a-zA-Z]+(?:\{[a-zA-Z* ]*\})?", "", line))
    return None if prose else (start, len(text))


def _last(items):
    item = None
    for item in items:  # noqa: B007
        pass
    return item

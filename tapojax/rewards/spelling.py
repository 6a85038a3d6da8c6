r"""One spelling for the many ways to write the same answer: pure string work in linear time, safe on any input.

`tidy` gives LaTeX that a parser understands, `key` a string that is equal for answers that are spelt alike.
Taken for spelling, not for value:
  * LaTeX dress: `$`, `\(`, `\left`, `\dfrac`, `\!`, `\text{}`, `\frac12`, `\sqrt2`, and unicode signs for LaTeX's;
  * units behind a number (`\text{ cm}^2`, `apples`), currency and degree signs. A wrong unit is not seen, as in every
    public grader. Single letters stay (`3m` is a product), and so does all that is not a unit (`am`, `is odd`);
  * functions and Greek letters without a backslash (`ln(2)`, `2theta`), a leading `=`, repeating decimals;
  * the percent sign: 10% is 10 (that it is 0.1 too is the business of `answers`);
  * thousands separators: `1,234`, `12{,}000`, `11,\! 111`. Any other comma separates a list.
"""

import fractions
import re
import unicodedata

SIGNS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∗": "*", "÷": r"\div ",
    "π": r"\pi ", "θ": r"\theta ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ",
    "≈": r"\approx ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "°": r"^\circ ",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "²": "^{2}", "³": "^{3}", "′": "'", "’": "'", "“": '"', "”": '"', "，": ",", "；": ";", "：": ":", "。": ".",
    "（": "(", "）": ")", "［": "[", "］": "]", "｛": r"\{", "｝": r"\}", "％": "%", "＝": "=", "＋": "+", "－": "-",
    "\u200b": "", "\u2060": "", "\ufeff": "",
}  # fmt: skip
TRANSLATION = str.maketrans(SIGNS)
WORD = r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt)|[mh]box)(?![a-zA-Z])\s*\{([^{}]*)\}"
IN_RADIANS = re.compile(r"\(\\frac\{([\d.]+)\\pi\}\{180\}\)")
DEGREE = r"(?:\^ ?\{ ?\\circ ?\}|\^ ?\\circ(?![a-zA-Z])|\\degree(?![a-zA-Z]))"

FUNCTION = "arc(?:sin|cos|tan)|(?:sin|cos|tan)h?|cot|sec|csc|ln|log|exp"
GREEK = "alpha|beta|gamma|delta|theta|lambda|mu|rho|sigma|tau|phi|psi|omega"

# in this order; none of them can look twice at an unbounded stretch
REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"<<[^<>]*>>", ""),  # calculator annotations of GSM8K
        (r"<\|[^<|>]*\|>", ""),  # end-of-turn tokens
        (r"\\?\$|[£€¥₹]|(?<!\\)\\[()\[\]]", ""),
        (r"(?<=\d) ?(?:\{,\}|, ?\\!|\\[,!:; ]) ?(?=\d{3}(?!\d))", ""),
        (r"(?<!\\)\\!", ""),
        (r"(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|~", " "),
        (r"\\(?:left|right) ?\.", ""),
        (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|thinspace)(?![a-zA-Z])", ""),
        (r"(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi "),
        (rf"(?<![a-zA-Z\\])({GREEK})(?![a-zA-Z]| [a-zA-Z]{{2}})", r"\\\1 "),
        (
            rf"(?<![a-wyzA-Z\\])(?:(?:np|math)\.)?({FUNCTION})(?= ?[\d(^_{{|\\]| [a-zA-Z](?![a-zA-Z])|x(?![a-zA-Z]))",
            r"\\\1 ",
        ),
        (r"\((\d[\dA-F]*)\) ?_", r"\1_"),
        (
            rf"(\\(?:sin|cos|tan|cot|sec|csc)) ?(?:(\(|\{{) ?)?(\d+(?:\.\d+)?) ?{DEGREE}(?(2) ?[)}}])",
            r"\1(\\frac{\3\\pi}{180})",
        ),
        (rf"{DEGREE}(?: ?(?:\\(?:text|mathrm) ?\{{)? ?[CF]\b\}}?)?", " "),
        (r"\\langle(?![a-zA-Z]) ?", "("),
        (r" ?\\rangle(?![a-zA-Z])", ")"),
        (r" ?\\?%| ?\b(?:percent(?:age)?|pct)\b", ""),
        (r"\b([ap])\. ?m\b\.?", r"\1m"),
        (r"(?<=\d) ?(\\text ?\{)? ?\bthousand\b", r"\\times 10^{3} \1"),
        (r"(?<=\d) ?(\\text ?\{)? ?\bmillion\b", r"\\times 10^{6} \1"),
        (r"(?<=\d) ?(\\text ?\{)? ?\bbillion\b", r"\\times 10^{9} \1"),
        (r"(?<=\d) ?(\\text ?\{)? ?\btrillion\b", r"\\times 10^{12} \1"),
        (r"\*\*", "^"),
        (r"(?<=[\])]) ?U ?(?=[\[(])", r"\\cup "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\frac ?([0-9a-zA-Z]) ?([0-9a-zA-Z])", r"\\frac{\1}{\2}"),
        (r"\\frac ?([0-9a-zA-Z]) ?\{", r"\\frac{\1}{"),
        (r"\\frac ?(\{[^{}]*\}) ?([0-9a-zA-Z])", r"\\frac\1{\2}"),
        (r"\\frac ?(\\[a-zA-Z]+) ?(\d)", r"\\frac{\1}{\2}"),
        (r"√ ?(\d+|[a-zA-Z])", r"\\sqrt{\1}"),
        (r"(?:√|\\sqrt) ?\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\sqrt ?([0-9a-zA-Z])", r"\\sqrt{\1}"),
        (r"\\varnothing(?![a-zA-Z])", r"\\emptyset"),
        (r"_ ?(\{ ?)?\\(max|min|odot|oplus|perp|parallel|star|ast)(?![a-zA-Z]) ?(?(1)\})", r"_{\2}"),
    ]
]
DOUBLED_COMMAND = re.compile(r"\\(?=\\[a-zA-Z])")
HALVED_ROW_BREAK = re.compile(r"(?<!\\)\\(?=[-+.\d])")

NUMBER = r"[-+]?(?:\d[\d,]*(?:\.\d*)?|\.\d+)(?:\\times 10\^\{\d+\})?"
FRACTION = r"-?\\frac ?\{[^{}]*\} ?\{[^{}]*\}"
POWER = r"(?: ?\^ ?(?:\{\d\}|\d))?"
TRAILING_WORD = re.compile(rf" ?{WORD}{POWER}$")
ENDS_LIKE_A_NUMBER = re.compile(r"(?:[\d})!]|\\[a-zA-Z]+)$")
SPEED = r"(?<= )k?m ?/ ?(?:s|h|hr|min)\b"
COUNTED = r"(?:second|minute|hour|day|week|month|year|cent|dollar|degree|meter|inche|mile|unit|point)s\b"
PLAIN_UNIT = re.compile(
    rf"((?:{NUMBER}|{FRACTION})(?: ?/ ?\d+)?) ?(?:cm|mm|km|kg|ft|lbs?|mph|hrs?|{SPEED}|{COUNTED}"
    rf"|(?:sq|cu)\b\.? ?[A-Za-z]+|(?<= )[A-Za-z]{{4}}[A-Za-z ]*){POWER}"
)
NOT_A_UNIT = re.compile(
    r"\b(?:[ap]m|and|or|is|are|if|for|when|where|with|than|to|at|not|over|mod|times|plus|minus|choose|half|halves|thirds?"
    r"|quarters?|dozens?|hundreds?|factorial|squared|cubed)\b|\b(?:sin|cos|tan|cot|log|exp|sqrt|arc|theta|alpha|infin)"
)

REPEATING = re.compile(r"(?<!\d)(\d{0,30})\.(\d{0,30})\\(?:overline|bar|dot) ?(?:\{ ?(\d{1,30}) ?\}|(\d))")
MIXED = re.compile(r"([-+]?\d+) (\d+) ?/ ?(\d+)")
THOUSANDS = re.compile(r"(?:^|(?<=(?<!\\)\{))[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?:$|(?=\}))")
IN_WORDS = {
    **dict.fromkeys(("all real numbers", "all reals", "all real"), r"\mathbb{R}"),
    **dict.fromkeys(("no solution", "no solutions", "no real solutions", "empty set"), r"\emptyset"),
}
CHOICE = re.compile(r"(?:\(([A-J])\)|([A-J])[.:)]) ?(.*)")
SCIENTIFIC = re.compile(r"([-+]?\d+(?:\.\d+)?)[eE]([-+]?\d+)")


def tidy(answer: str) -> str:
    """The answer in one dress, still LaTeX."""
    text = _ascii(answer).strip("*` ")
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    text = REPEATING.sub(_repeating, text)
    if "matrix" in text:
        text = HALVED_ROW_BREAK.sub(r"\\\\", text)
    elif "\\begin" not in text:
        text = DOUBLED_COMMAND.sub("", text)
    text = re.sub(WORD, r" \1 ", _drop_unit(_strip(text)))
    text = _drop_unit(_strip(re.sub(r"(?<=[{(]) | (?=[})])", "", " ".join(text.split()))))
    text = re.sub(
        r"^\{([^{}]*)\}$|^\(([A-Za-z])\)$", r"\1\2", re.sub(r"^(?:\\approx(?![a-zA-Z])|=(?![<>=])) ?", "", text)
    )
    text = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    text = SCIENTIFIC.sub(r"\1\\times 10^{\2}", text) if SCIENTIFIC.fullmatch(text) else text
    text = MIXED.sub(r"\1\\frac{\2}{\3}", text) if MIXED.fullmatch(text) else text
    return IN_WORDS.get(text.casefold(), text)


def _ascii(text: str) -> str:
    """Signs as LaTeX, digits of any script as 0-9, control characters and runs of white space as one space."""
    text = text.translate(TRANSLATION)
    if not text.isascii():
        text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _repeating(match: re.Match[str]) -> str:
    """A repeating decimal as a fraction."""
    before, period = match[1] + match[2], match[3] or match[4]
    numerator = int(before + period) - int(before or 0)
    value = fractions.Fraction(numerator, 10 ** len(match[2]) * (10 ** len(period) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _strip(text: str) -> str:
    return " ".join(text.split()).rstrip(" .,;:\\").lstrip(" ,;:")


def _drop_unit(text: str) -> str:
    match = TRAILING_WORD.search(text)
    if match and not NOT_A_UNIT.search(match[1]):
        head = text[: match.start()]
        if ENDS_LIKE_A_NUMBER.search(head) and not re.search(WORD, head):
            return head
    match = PLAIN_UNIT.fullmatch(text)
    return match[1] if match and not NOT_A_UNIT.search(text, match.end(1)) else text


def key(tidied: str) -> str:
    """A string that is equal for answers spelt alike. Spaces count only between digits, case only in mathematics, the
    degree sign not even inside a sine."""
    tidied = IN_RADIANS.sub(r"\1", tidied)
    text = re.sub(r"(?<!\d)\.(?=\d)", "0.", re.sub(r"(?<!\d) | (?!\d)", "", tidied))
    return text.casefold() if is_literal(tidied) else text


def is_literal(tidied: str) -> bool:
    """Whether the answer is words (a name, a direction, a sentence) or a time of day, and not mathematics."""
    words = re.fullmatch(r"[A-Za-z ,.'\"!?-]*", tidied) and re.search(r"[A-Za-z]{4}", tidied)
    return bool(words or re.fullmatch(r"\d{1,2}(?::\d\d){0,2} ?[ap]m|\d{1,2}:0\d(?::\d\d)?", tidied))


def alike(gold: str, prediction: str) -> bool:
    """Whether two tidy answers are spelt alike. One of two times of day may leave out `am` or `pm`; a letter of a
    multiple choice may bring the text of its option, `C. 15`, as long as it names no other letter."""
    a, b = key(_chosen(gold, prediction)), key(_chosen(prediction, gold))
    return a == b or re.sub(r"(?<=\d)[ap]m$", "", a) == b or a == re.sub(r"(?<=\d)[ap]m$", "", b)


def _chosen(tidied: str, other: str) -> str:
    match = CHOICE.fullmatch(tidied) if re.fullmatch("[A-J]", other) else None
    return match[1] or match[2] if match and not re.search(r"\b[A-J]\b", match[3]) else tidied

r"""One spelling for the many ways to write the same answer: pure string work in linear time, safe on any input.

`tidy` gives LaTeX that a parser understands; `key` gives a string that is equal for answers that are spelt alike.
What is taken for spelling and not for value:
  * LaTeX dress: `$`, `\(`, `\left`, `\dfrac`, `\!`, `\text{}`, `\frac12`, `\sqrt2`, and the unicode signs for LaTeX's;
  * units after a number (`\text{ cm}^2`, `apples`), currency signs, degree signs. A wrong unit is not seen, as in every
    public grader. Single letters stay (`3m` is a product), so do `am`, `pm` and `million`, which is a power of ten;
  * the percent sign: 10% is 10 (`equality` also knows that it is 0.1);
  * thousands separators: `1,234`, `12{,}000`, `11,\! 111`. A comma elsewhere separates a list.
"""

import re
import unicodedata

WORD = r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt)|[mh]box)(?![a-zA-Z])\s*\{([^{}]*)\}"

SIGNS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∗": "*", "÷": r"\div ",
    "π": r"\pi ", "θ": r"\theta ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ",
    "≈": r"\approx ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "√": r"\sqrt ", "°": r"^\circ ",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "²": "^{2}", "³": "^{3}", "′": "'", "’": "'", "“": '"', "”": '"', "，": ",", "；": ";", "：": ":", "。": ".",
    "（": "(", "）": ")", "［": "[", "］": "]", "｛": r"\{", "｝": r"\}", "％": "%", "＝": "=", "＋": "+", "－": "-",
}  # fmt: skip

# each pattern looks at a bounded distance or consumes what it scans, so a megabyte of anything is one pass
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
        (r"\^ ?\{ ?\\circ ?\}|\^ ?\\circ(?![a-zA-Z])|\\degree(?![a-zA-Z])", " "),
        (r" ?\\?%| ?\b(?:percent(?:age)?|pct)\b", ""),
        (r"(?<!\\)\*\*", "^"),
        (r"(?<=[\])]) ?U ?(?=[\[(])", r"\\cup "),
        (r"(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\frac ?([0-9a-zA-Z]) ?([0-9a-zA-Z])", r"\\frac{\1}{\2}"),
        (r"\\frac ?([0-9a-zA-Z]) ?\{", r"\\frac{\1}{"),
        (r"\\frac ?(\{[^{}]*\}) ?([0-9a-zA-Z])", r"\\frac\1{\2}"),
        (r"\\sqrt ?([0-9a-zA-Z])", r"\\sqrt{\1}"),
        (r"(?<=\d) ?thousand\b", r"\\times 10^{3}"),
        (r"(?<=\d) ?million\b", r"\\times 10^{6}"),
        (r"(?<=\d) ?billion\b", r"\\times 10^{9}"),
        (r"(?<=\d) ?trillion\b", r"\\times 10^{12}"),
        (r"\b([ap])\. ?m\b\.?", r"\1m"),
    ]
]
NUMBER = r"[-+]?(?:\d[\d,]*(?:\.\d*)?|\.\d+)"
FRACTION = r"\\frac ?\{[^{}]*\} ?\{[^{}]*\}"
TRAILING_WORD = re.compile(rf"(?<=[\w}})\]!|]) ?{WORD}(?: ?\^ ?(?:\{{\d\}}|\d))?$")
PLAIN_UNIT = re.compile(
    rf"((?:{NUMBER}|-?{FRACTION})(?: ?/ ?\d+)?) ?(?:(?:[cmk]?m|k?g|ft|lbs?|mph|hrs?)|(?<= )[A-Za-z]{{4}}[A-Za-z ]*)"
    r"(?: ?\^ ?(?:\{\d\}|\d))?"
)
NOT_A_UNIT = re.compile(r"\b(?:a\.?m\b|p\.?m\b|and\b|or\b|sin|cos|tan|cot|log|exp|sqrt|arc|theta|alpha|beta|infin|mod\b)")
HALVED_ROW_BREAK = re.compile(r"(?<!\\)\\(?=[-+.\d])")
MIXED = re.compile(r"([-+]?\d+) (\d+) ?/ ?(\d+)|([-+]?\d+) ?(\\frac ?\{\d+\} ?\{\d+\})")
THOUSANDS = re.compile(r"(?:^|(?<=(?<!\\)\{))[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?:$|(?=\}))")
SCIENTIFIC = re.compile(r"([-+]?\d+(?:\.\d+)?)[eE]([-+]?\d+)")


def _ascii(text: str) -> str:
    """Signs as LaTeX, digits of any script as 0-9, control characters and runs of white space as one space."""
    out = (SIGNS.get(c) or (str(unicodedata.decimal(c)) if c.isdecimal() else c if c.isprintable() else " ") for c in text)
    return " ".join("".join(out).split())


def _drop_unit(text: str) -> str:
    match = TRAILING_WORD.search(text)
    if match and "\\text" not in text[: match.start()] and not NOT_A_UNIT.search(match[1]):
        return text[: match.start()].rstrip()
    match = PLAIN_UNIT.fullmatch(text)
    return match[1] if match and not NOT_A_UNIT.search(text) else text


def _strip(text: str) -> str:
    return " ".join(text.split()).rstrip(" .,;:").lstrip(" ,;:")


def tidy(answer: str) -> str:
    """The answer in one dress, still LaTeX."""
    text = _ascii(answer).strip("*` ")
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    text = re.sub(WORD, r" \1 ", _drop_unit(_strip(text)))
    text = re.sub(r"^\{([^{}]*)\}$", r"\1", _drop_unit(_strip(text)))
    text = re.sub(r"^\\approx(?![a-zA-Z]) ?", "", text)
    if "matrix" in text:
        text = HALVED_ROW_BREAK.sub(r"\\\\", text)
    text = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    if match := SCIENTIFIC.fullmatch(text):
        text = rf"{match[1]}\times 10^{{{match[2]}}}"
    if match := MIXED.fullmatch(text):
        text = rf"{match[1]}\frac{{{match[2]}}}{{{match[3]}}}" if match[1] else match[4] + match[5]
    return re.sub(r"^\(([A-Za-z])\)$", r"\1", text)


def key(tidied: str) -> str:
    """Equal for answers that are spelt alike. Takes what `tidy` gives; spaces count only between digits."""
    text = re.sub(r"(?<!\d) | (?!\d)", "", tidied)
    text = re.sub(r"(?<!\d)\.(?=\d)", "0.", text)
    return text.casefold() if is_words(tidied) else text


def is_words(tidied: str) -> bool:
    """Whether the answer is words and not mathematics: a name, a direction, a sentence."""
    return bool(re.fullmatch(r"[A-Za-z ,.'\"!?-]*", tidied)) and bool(re.search(r"[A-Za-z]{4}", tidied))

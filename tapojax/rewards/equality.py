r"""Whether two answers are the same mathematics: math-verify, for the inside of a worker process.

math-verify's own time-outs are off: they are signals, which reach neither C code nor any thread but the first. Its
search for an answer in free text, its removal of units (`3m+2t` = `3m+2`) and its blindness to number bases
(`43_5` = `43_6`) are not used: `spelling` has done that work, and the whole string must parse.
"""

import logging
import re
from collections.abc import Callable

from tapojax.rewards import spelling

BASE = re.compile(r"([-+]?\d[\dA-F]*)_\{?(\d+)\}?")
PRIME = re.compile(r"(?<=[A-Za-z)])'|\\prime")


def checker() -> Callable[[list[str]], bool]:
    """A function of [gold, prediction], both tidy: whether they are equal. Lists are sets, tuples keep their order.

    A prediction that is not mathematics equals nothing. Raises ValueError when the gold answer is not mathematics.
    """
    import math_verify
    from latex2sympy2_extended import NormalizationConfig

    logging.disable(logging.CRITICAL)  # it warns that it has no time-outs
    normalization = NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True, boxed="none")
    config = [math_verify.LatexExtractionConfig(normalization_config=normalization)]

    def parse(text):
        return math_verify.parse(
            f"${text}$", config, fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=None
        )

    def equal(gold, prediction):
        return math_verify.verify(gold, prediction, timeout_seconds=None, raise_on_error=True)

    def check(pair: list[str]) -> bool:
        gold, prediction = pair
        if not (parsed := parse(gold)):
            raise ValueError(f"gold answer {gold!r} cannot be parsed")
        if len(PRIME.findall(gold)) != len(PRIME.findall(prediction)):
            return False
        gold_base, base = BASE.fullmatch(gold), BASE.fullmatch(prediction)
        if gold_base:
            return prediction == gold_base[1] or bool(base) and base.groups() == gold_base.groups()
        return equal(parsed, parse(prediction))

    check([r"\frac{1}{2}", "0.5"])  # builds the parser's tables, before any deadline runs
    return check

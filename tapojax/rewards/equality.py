r"""Whether two answers are the same mathematics: math-verify, for the inside of a worker process.

math-verify's own time-outs are off: they are signals, which reach neither C code nor any thread but the first. Its
search for an answer in free text, its removal of units (`3m+2t` = `3m+2`) and its blindness to number bases
(`43_5` = `43_6`) are not used: `spelling` has done that work, and the whole string must parse.
"""

import itertools
import logging
import re
from collections.abc import Callable

BASE = re.compile(r"([-+]?\d[\dA-F]*)_\{?(\d+)\}?")
RELATIVE_TOLERANCE = 1e-4
HALF_A_PLACE = 5e-7  # of the 6 that math-verify compares
ROUNDED = 1e-2  # the same for a chain such as x = 10/3 = 3.33
# sympy takes these letters for constants, so "I = 5" is no definition to it
CONSTANT_IS = re.compile(r" ?[Iei](?:_(?:\{[A-Za-z0-9]+\}|[A-Za-z0-9]))? ?=(?!.*[=<>,])")
IMAGINARY = re.compile(r"(?<![A-Za-z\\])i(?![A-Za-z])")  # to the parser i is any symbol, and I the imaginary unit
MEMBER = re.compile(r"\\in(?![a-zA-Z])")
PRIME = re.compile(r"(?<=[A-Za-z)])'|\\prime")


def _far_apart(gold, prediction, tolerance: float = RELATIVE_TOLERANCE) -> bool:
    """Whether both are numbers and surely different. Saves a symbolic proof that they differ, and tells tiny numbers
    apart, which math-verify does not: it compares to 6 decimals."""
    from sympy import Expr

    gold, prediction = _value(gold), _value(prediction)
    if not all(isinstance(side, Expr) and side.is_number for side in (gold, prediction)):
        return False
    a, b = gold.evalf(), prediction.evalf()
    if not (a.is_finite and b.is_finite):
        return False
    return bool(abs(a - b) > tolerance * (abs(a) if a != 0 else 1))


def _rounds_to_integer(gold, prediction) -> bool:
    """Whether one is an integer other than 0 and the other a decimal that is it to 6 places; to sympy 1 is not 1.0."""
    from sympy import Float, Integer

    integer, decimal = sorted((_value(gold), _value(prediction)), key=lambda side: isinstance(side, Float))
    if not (isinstance(integer, Integer) and isinstance(decimal, Float) and integer):
        return False
    return bool(abs(decimal - integer) < HALF_A_PLACE)


def _value(side):
    """5 of `x = 5`."""
    from sympy import Eq, Symbol

    return side.rhs if isinstance(side, Eq) and isinstance(side.lhs, Symbol) else side


def checker() -> Callable[[tuple[list[str], str]], bool]:
    """A function of (golds, prediction), all tidy: whether the prediction equals one of the golds.

    Lists are sets, tuples keep their order. A prediction that is not mathematics equals nothing.
    The function raises ValueError when a gold answer is not mathematics.
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

    def equal(gold: str, prediction: str) -> bool:
        relations = not MEMBER.search(gold)  # `(2,5)` may be written 2 < x < 5
        if not (parsed := parse(gold)):
            raise ValueError(f"gold answer {gold!r} cannot be parsed")
        predicted = parse(prediction)
        if not predicted or _far_apart(parsed[0], predicted[0]):
            return False
        same = _rounds_to_integer(parsed[0], predicted[0]) or math_verify.verify(
            parsed, predicted, allow_set_relation_comp=relations, timeout_seconds=None, raise_on_error=True
        )
        return same and not false(prediction)

    def false(chain: str) -> bool:
        """Whether it calls different numbers equal, as `4 = 5`, whose last number may well be the answer."""
        parts = chain.split("=")
        if len(parts) == 1 or any(part.count("{") != part.count("}") for part in parts):
            return False
        sides = [parsed[0] for part in parts if (parsed := parse(part))]
        return any(_far_apart(*pair, ROUNDED) for pair in itertools.pairwise(sides))

    def check_one(gold: str, prediction: str) -> bool:
        if ("=" in gold) != ("=" in prediction):
            gold, prediction = CONSTANT_IS.sub("", gold), CONSTANT_IS.sub("", prediction)
        if len(PRIME.findall(gold)) != len(PRIME.findall(prediction)):
            return False
        if gold_base := BASE.fullmatch(gold):
            base = BASE.fullmatch(prediction)
            return prediction == gold_base[1] or (base is not None and base.groups() == gold_base.groups())
        if equal(gold, prediction):
            return True
        both = gold + prediction
        with_unit = IMAGINARY.search(both) and not re.search("[I_]", both)
        return bool(with_unit) and equal(IMAGINARY.sub("I", gold), IMAGINARY.sub("I", prediction))

    def check(item: tuple[list[str], str]) -> bool:
        golds, prediction = item
        return any(check_one(gold, prediction) for gold in golds)

    check(([r"\frac{1}{2}"], "0.5"))  # builds the parser's tables, before any deadline runs
    return check

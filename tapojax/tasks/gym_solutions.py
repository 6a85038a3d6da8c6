"""Worked solutions of the arithmetic gym, derived from the problem's text alone.

A problem is an expression over non-negative integers followed by '?'. Its solution prescribes every step:

- a sum goes column by column from the ones, each column closing with the carry       57+86?  7+6+0=13,5+8+1=14#143
- a difference adds ten to a column that must borrow and takes the borrow off next    53-27?  13-7-0=6,5-2-1=2#26
- a product by one digit goes digit by digit, adding the carry                        47*6?   7*6+0=42,4*6+4=28#282
- a longer product forms one partial product per digit, states it, and adds them up
- an expression goes operation by operation, inner and left first. Mental arithmetic (one operand below 10, result
  below 100) is one step; anything else is written out in columns and, unless it is the last operation, stated
                                                    (47+38)*6-129?  7+8+0=15,4+3+1=8,47+38=85,5*6+0=30,8*6+3=51,85*6=...
"""

import ast
import functools
import re
from typing import NamedTuple

_PROBLEM = re.compile(r"(?!.*\b0[0-9])[0-9+*()-]{1,64}\?")  # no leading zeros; short, so the parser's stack suffices
_SUM = re.compile(r"[0-9]+(?:\+[0-9]+)+")
_OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}


class Solution(NamedTuple):
    """The prescribed steps, each an equation, and the answer as canonical decimal text."""

    steps: tuple[str, ...]
    answer: str

    @property
    def text(self) -> str:
        return ",".join(self.steps) + "#" + self.answer


@functools.lru_cache(maxsize=4096)
def solve(problem: str) -> Solution:
    """The worked solution of `problem`. Raises ValueError naming a text that is no problem of the gym."""
    try:
        if not _PROBLEM.fullmatch(problem):
            raise ValueError("expected integers without leading zeros, + - * and brackets, then '?'")
        expression = problem[:-1]
        if _SUM.fullmatch(expression):
            addends = tuple(map(int, expression.split("+")))
            return Solution(_add(addends), str(sum(addends)))
        value, steps = _derive(ast.parse(expression, mode="eval").body, root=True)
        if not steps:
            raise ValueError("there is nothing to work out")
        return Solution(steps, str(value))
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{problem!r} is not a problem of the gym: {error}") from error


def mental(a: int, b: int, value: int) -> bool:
    """Whether an operation on a and b with result `value` is one step: an operand below 10, the result in [0, 100)."""
    return min(a, b) < 10 and 0 <= value < 100


def apply(operator: str, a: int, b: int) -> int:
    """`a operator b` for one of + - *."""
    return a + b if operator == "+" else a - b if operator == "-" else a * b


def _derive(node: ast.expr, *, root: bool) -> tuple[int, tuple[str, ...]]:
    """Value of an expression tree and the steps that reach it; `root` marks the last operation."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value, ()
    if not isinstance(node, ast.BinOp) or type(node.op) not in _OPERATORS:
        raise ValueError("only + - * between non-negative integers")
    operator = _OPERATORS[type(node.op)]
    a, left = _derive(node.left, root=False)
    b, right = _derive(node.right, root=False)
    value = apply(operator, a, b)
    if value < 0:
        raise ValueError(f"{a}{operator}{b} is negative")
    statement = (f"{a}{operator}{b}={value}",)
    if mental(a, b, value) and (left or right or not root):
        return value, left + right + statement
    return value, left + right + _written(operator, a, b) + (() if root else statement)


def _written(operator: str, a: int, b: int) -> tuple[str, ...]:
    """Steps of one operation, digit by digit."""
    if operator == "+":
        return _add((a, b))
    if operator == "-":
        return _subtract(a, b)
    return _multiply(b, a) if a < 10 <= b else _multiply(a, b)


def _digits(number: int, width: int = 1) -> list[int]:
    """Decimal digits, ones first, padded with zeros to `width`."""
    return [int(digit) for digit in reversed(str(number).zfill(width))]


def _add(numbers: tuple[int, ...]) -> tuple[str, ...]:
    width = len(str(max(numbers)))
    steps, carry = [], 0
    for column in zip(*(_digits(number, width) for number in numbers), strict=True):
        total = sum(column) + carry
        steps.append("+".join(map(str, (*column, carry))) + f"={total}")
        carry = total // 10
    return tuple(steps)


def _subtract(a: int, b: int) -> tuple[str, ...]:
    width = len(str(a))
    steps, borrow = [], 0
    for top, bottom in zip(_digits(a, width), _digits(b, width), strict=True):
        lent = 10 if top < bottom + borrow else 0
        steps.append(f"{top + lent}-{bottom}-{borrow}={top + lent - bottom - borrow}")
        borrow = lent // 10
    return tuple(steps)


def _multiply(a: int, b: int) -> tuple[str, ...]:
    if b < 10:
        return _multiply_by_digit(a, b)
    steps: tuple[str, ...] = ()
    partials = []
    for place, digit in enumerate(_digits(b)):
        shifted = digit * 10**place
        partials.append(a * shifted)
        steps += _multiply_by_digit(a, digit) + (f"{a}*{shifted}={a * shifted}",)
    return steps + _add(tuple(partials))


def _multiply_by_digit(a: int, digit: int) -> tuple[str, ...]:
    steps, carry = [], 0
    for d in _digits(a):
        total = d * digit + carry
        steps.append(f"{d}*{digit}+{carry}={total}")
        carry = total // 10
    return tuple(steps)

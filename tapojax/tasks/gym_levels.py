"""The ladder of the arithmetic gym: families of problems in order of difficulty.

Most tokens a problem and its worked solution can have, by level:

| level | family             | example                | prompt tokens | solution tokens |
|-------|--------------------|------------------------|---------------|-----------------|
| 1     | 1-digit sum        | 7+6?                   |             4 |              11 |
| 2     | 2-digit sum        | 57+86?                 |             6 |              21 |
| 3     | 3-digit sum        | 457+386?               |             8 |              31 |
| 4     | 4-digit sum        | 2457+9386?             |            10 |              41 |
| 5     | 5-digit sum        | 52457+19386?           |            12 |              51 |
| 6     | 6-digit sum        | 752457+619386?         |            14 |              61 |
| 7     | 2-digit difference | 83-47?                 |             6 |              19 |
| 8     | 4-digit difference | 8305-4712?             |            10 |              39 |
| 9     | sum of three       | 47+38+25?              |             9 |              25 |
| 10    | sum of four        | 347+538+925+601?       |            16 |              43 |
| 11    | 2 digits times 1   | 47*6?                  |             5 |              21 |
| 12    | 4 digits times 1   | 3047*6?                |             7 |              41 |
| 13    | chain              | 3+4*5-2?               |             8 |              25 |
| 14    | brackets           | (8-3)*(2+7)-6?         |            16 |              33 |
| 15    | deep brackets      | 2*((9-4)*(3+5)-7)+8-1? |            24 |              49 |
| 16    | 2 digits times 2   | 47*36?                 |             6 |              94 |
| 17    | written out        | (47+38)*6-129?         |            14 |             105 |
| 18    | 3 digits times 2   | 347*26?                |             7 |             126 |

One character is one token (`gym_tokenizer`); lengths leave out the end-of-sequence token. Level 2 is the recipe of the
quick start. "brackets" and "deep brackets" have 4 and 6 operations and "chain" 3, each of them mental arithmetic.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from tapojax.tasks import gym_solutions


@dataclasses.dataclass(frozen=True)
class Level:
    """A family of problems: how to draw one, and the problem with the longest text and the one with most to write."""

    name: str
    draw: Callable[[np.random.Generator], str]
    example: str
    longest_problem: str
    longest_solution: str


def lengths(level: int) -> tuple[int, int]:
    """The most tokens a problem and a worked solution of `level` can have, end of sequence not counted."""
    require([level])
    longest = LEVELS[level]
    return len(longest.longest_problem), len(gym_solutions.solve(longest.longest_solution).text)


def require(levels: Sequence[int]) -> None:
    """Raises ValueError naming what is no level of the ladder."""
    if not levels or any(level not in LEVELS for level in levels):
        raise ValueError(f"levels {list(levels)}: choose one or more of {list(LEVELS)}")


def _operand(rng: np.random.Generator, digits: int) -> int:
    return int(rng.integers(10 ** (digits - 1), 10**digits))


def _sum(rng: np.random.Generator, *, digits: int, operands: int = 2) -> str:
    return "+".join(str(_operand(rng, digits)) for _ in range(operands))


def _difference(rng: np.random.Generator, *, digits: int) -> str:
    a, b = sorted((_operand(rng, digits), _operand(rng, digits)), reverse=True)
    return f"{a}-{b}"


def _product(rng: np.random.Generator, *, digits: tuple[int, int]) -> str:
    return "*".join(str(_operand(rng, n)) for n in digits)


def _written(rng: np.random.Generator) -> str:
    """(a±b)*c±d with two-digit a and b, one-digit c and three-digit d; never below zero."""
    b, a = sorted((_operand(rng, 2), _operand(rng, 2)))
    c, d = _operand(rng, 1), _operand(rng, 3)
    inner = str(rng.choice(["+", "-"]))
    product = gym_solutions.apply(inner, a, b) * c
    outer = str(rng.choice(["+", "-"])) if product >= d else "+"
    return f"({a}{inner}{b})*{c}{outer}{d}"


def _mental(rng: np.random.Generator, *, operations: int, brackets: bool) -> str:
    """An expression over one-digit numbers, each operation mental arithmetic; with brackets, or a chain without."""
    while True:
        text, _, _ = _grow(rng, operations, brackets)
        if ("(" in text) == brackets and set(text) & set("-*"):  # a bare sum would be one of columns
            return text


def _grow(rng: np.random.Generator, operations: int, brackets: bool) -> tuple[str, int, int]:
    """A random expression tree as text, its value, and how tightly it binds (1 sum, 2 product, 3 number)."""
    if operations == 0:
        number = _operand(rng, 1)
        return str(number), number, 3
    while True:
        left_operations = int(rng.integers(operations))
        left, a, left_binding = _grow(rng, left_operations, brackets)
        right, b, right_binding = _grow(rng, operations - 1 - left_operations, brackets)
        values = {operator: gym_solutions.apply(operator, a, b) for operator in "+-*"}
        allowed = [
            operator for operator in "+-*" if values[operator] > 0 and gym_solutions.mental(a, b, values[operator])
        ]
        if not allowed:
            continue
        operator = allowed[int(rng.integers(len(allowed)))]
        binding = 2 if operator == "*" else 1
        left_opens, right_opens = left_binding < binding, right_binding <= binding
        if brackets or not (left_opens or right_opens):
            left = f"({left})" if left_opens else left
            right = f"({right})" if right_opens else right
            return left + operator + right, values[operator], binding


_LADDER = (
    Level("1-digit sum", partial(_sum, digits=1), "7+6?", "9+9?", "9+9?"),
    Level("2-digit sum", partial(_sum, digits=2), "57+86?", "99+99?", "99+99?"),
    Level("3-digit sum", partial(_sum, digits=3), "457+386?", "999+999?", "999+999?"),
    Level("4-digit sum", partial(_sum, digits=4), "2457+9386?", "9999+9999?", "9999+9999?"),
    Level("5-digit sum", partial(_sum, digits=5), "52457+19386?", "99999+99999?", "99999+99999?"),
    Level("6-digit sum", partial(_sum, digits=6), "752457+619386?", "999999+999999?", "999999+999999?"),
    Level("2-digit difference", partial(_difference, digits=2), "83-47?", "83-47?", "83-47?"),
    Level("4-digit difference", partial(_difference, digits=4), "8305-4712?", "9111-1222?", "9111-1222?"),
    Level("sum of three", partial(_sum, digits=2, operands=3), "47+38+25?", "99+99+99?", "99+99+99?"),
    Level("sum of four", partial(_sum, digits=3, operands=4), "347+538+925+601?", *["999+999+999+999?"] * 2),
    Level("2 digits times 1", partial(_product, digits=(2, 1)), "47*6?", "99*9?", "99*9?"),
    Level("4 digits times 1", partial(_product, digits=(4, 1)), "3047*6?", "9999*9?", "9999*9?"),
    Level("chain", partial(_mental, operations=3, brackets=False), "3+4*5-2?", "9*9+9+9?", "9*9+9+9?"),
    Level(
        "brackets",
        partial(_mental, operations=4, brackets=True),
        "(8-3)*(2+7)-6?",
        "9-(9-(8-(7-6)))?",
        "9+(9*9-8-8)?",
    ),
    Level(
        "deep brackets",
        partial(_mental, operations=6, brackets=True),
        "2*((9-4)*(3+5)-7)+8-1?",
        "9-(9-(8-(9-(8-(7-6)))))?",
        "9+(9*9-8-8-8-8)?",
    ),
    Level("2 digits times 2", partial(_product, digits=(2, 2)), "47*36?", "99*99?", "99*99?"),
    Level("written out", _written, "(47+38)*6-129?", "(99+99)*9+999?", "(99+99)*9+999?"),
    Level("3 digits times 2", partial(_product, digits=(3, 2)), "347*26?", "999*99?", "999*99?"),
)
LEVELS: dict[int, Level] = dict(enumerate(_LADDER, start=1))

"""How much of a hint is left at a step: RTPO's annealing. Plain Python in float64, for it runs on the host."""

import inspect
import math
from collections.abc import Callable, Sequence

READ_BY = {
    "linear": ("direction",),
    "cosine": ("direction",),
    "exponential": ("direction", "rate"),
    "piecewise": ("direction", "milestones", "values"),
    "constant": ("value",),
}


def hint_fraction(
    kind: str,
    steps: int | float,
    *,
    direction: str = "down",
    rate: int | float = 5.0,
    milestones: Sequence[int | float] = (0.3, 0.6, 0.9),
    values: Sequence[int | float] = (0.2, 0.5, 0.8, 1.0),
    value: int | float = 0.0,
) -> Callable[[int], float]:
    """f(step) in [0, 1], the share of a hint that is kept: 1 - v for direction "down", v for "up".

    With rho = min(step / steps, 1), so that f stays as it is once the horizon of `steps` is over:

      linear       v = rho
      cosine       v = (1 - cos(pi rho)) / 2          slow, fast, slow
      exponential  v = 1 - exp(-rate rho)             never all of it: f ends at exp(-rate), .0067 at rate 5
      piecewise    v = values[i], i the first with rho < milestones[i], else the last: f starts at .8 by default
      constant     f = value                          at every step, whatever the horizon

    Raises:
      ValueError: an unknown kind or direction, a horizon that is not positive, a knob that is out of range or that
        `kind` does not read.

    Formulas: RTPO's published trainer, a fork of TRL; there is no paper. Ours: the horizon must be given (the trainer
    takes max_steps, -1 unless set, and drops the whole hint after step 0), and a constant is the share itself (the
    trainer turns it around for "down").
    """
    _check(kind in READ_BY, f"no schedule is called {kind!r}: choose one of {list(READ_BY)}")
    _check(direction in ("down", "up"), f"direction={direction!r}: choose 'down' or 'up'")
    milestones, values = tuple(milestones), tuple(values)
    given = dict(direction=direction, rate=rate, milestones=milestones, values=values, value=value)
    for name, parameter in inspect.signature(hint_fraction).parameters.items():
        unread = name in given and name not in READ_BY[kind]
        _check(
            not unread or given[name] == parameter.default,
            f"{name}={given.get(name)!r} is not read by the {kind} schedule, only {' and '.join(READ_BY[kind])}",
        )
    _check(steps > 0, f"an anneal horizon of {steps} steps: give the steps over which hints change, more than 0")
    _check(rate > 0, f"rate={rate}: must be positive")
    _check(0 <= value <= 1, f"value={value}: a share of the hint, in [0, 1]")
    _check(
        list(milestones) == sorted(milestones)
        and len(values) == len(milestones) + 1
        and 0 <= min(values) <= max(values) <= 1,
        f"milestones={milestones}, values={values}: give increasing milestones and one value more, in [0, 1]",
    )
    progress: dict[str, Callable[[float], float]] = {
        "linear": lambda rho: rho,
        "cosine": lambda rho: 0.5 * (1 - math.cos(math.pi * rho)),
        "exponential": lambda rho: 1 - math.exp(-rate * rho),
        "piecewise": lambda rho: values[sum(rho >= milestone for milestone in milestones)],
    }
    if kind == "constant":
        return lambda step: float(value)
    if direction == "up":
        return lambda step: progress[kind](min(step / steps, 1.0))
    return lambda step: 1 - progress[kind](min(step / steps, 1.0))


def kept_tokens(fraction: int | float, length: int) -> int:
    """How many of `length` tokens are kept: floor(fraction * length + 1e-9).

    The published int(fraction * length) loses a token to binary rounding: int((1 - .9) * 10) = 0.
    """
    return math.floor(fraction * length + 1e-9)


def _check(holds: bool, message: str):
    if not holds:
        raise ValueError(message)

"""The endless order in which a run reads its problems: shuffled, mixed, chosen by pass rate, resumable to the row.

Everything is derived from (seed, position): `get_state()` / `set_state(state)` of what `batches` returns, plain JSON,
take the order up at the exact row. What else decides it, the pass rates that the run itself has seen, is a dict that
the caller keeps beside the state.
"""

import bisect
import dataclasses
import fractions
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex

import grain
import numpy as np

from tapojax.types import Example, Examples

MAX_EPOCHS = 3  # that a curriculum may refuse in a row before it is believed that it refuses everything

Batches = grain.DatasetIterator[list[Example]]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Several sources as one. `batches` draws from them in the shares of the weights, whatever their sizes."""

    parts: tuple[Examples, ...]
    weights: tuple[fractions.Fraction, ...]

    def __post_init__(self):
        if len(self.parts) != len(self.weights) or not self.parts:
            raise ValueError(f"{len(self.parts)} sources and {len(self.weights)} weights: give each source a weight")
        for number, (part, weight) in enumerate(zip(self.parts, self.weights, strict=True), 1):
            if weight <= 0 or not len(part):
                raise ValueError(
                    f"source {number} of the mixture has weight {weight} and {len(part)} examples: leave it out, or "
                    "give it a positive weight and data"
                )

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: SupportsIndex) -> Example:
        index = range(len(self))[index]
        ends = list(itertools.accumulate(map(len, self.parts)))
        number = bisect.bisect_right(ends, index)
        return self.parts[number][index - ends[number] + len(self.parts[number])]


def parse_sources(text: str) -> tuple[list[str], list[fractions.Fraction]]:
    """Paths and weights of "a.jsonl:3, b.parquet:1"; no weights where none is written.

    Raises:
      ValueError: some have a weight and some have none.
    """
    paths, weights = [], []
    for entry in filter(None, map(str.strip, text.split(","))):
        match = re.fullmatch(r"(.+):(\d+(?:\.\d+)?)", entry)
        paths.append(match[1] if match else entry)
        weights += [fractions.Fraction(match[2])] if match else []
    if weights and len(weights) != len(paths):
        raise ValueError(f"{text!r}: give every file a weight, as in a.jsonl:3,b.jsonl:1, or none")
    return paths, weights


def batches(
    examples: Examples,
    *,
    batch_size: int,
    seed: int,
    pass_rates: tuple[float, float] = (0.0, 1.0),
    outside: float = 0.0,
    rates: dict[str, float] | None = None,
    host: int = 0,
    hosts: int = 1,
) -> Batches:
    """Endless batches, every source shuffled anew each epoch.

    Of a `Mixture`, the source that lags most behind its share comes next: of the first k examples, source i has given
    fewer than k w_i / Σw + 1, and exactly its share whenever k w_i / Σw is whole for all i.

    Curriculum (our choice): an example is taken if its pass rate is known to lie within `pass_rates`, both bounds
    included, or is not known; otherwise with probability `outside`. It is that of `rates`, by id, else the example's
    own "pass_rate". With (0, 1) all are taken, and the order is the plain one.

    Of each batch, host h of n gets the examples h, h + n, ...; all hosts have the same state, so a run may go on with
    another number of them.

    Raises:
      ValueError: fewer examples than a batch needs, hosts that do not divide it, a curriculum that cannot choose.
    """
    if len(examples) < batch_size:
        raise ValueError(
            f"{len(examples)} examples cannot fill a batch of {batch_size}: lower prompts_per_step or add data"
        )
    if not 0 <= host < hosts or batch_size % hosts:
        raise ValueError(f"host {host} of {hosts} gets no even part of a batch of {batch_size}")
    parts = examples.parts if isinstance(examples, Mixture) else (examples,)
    choose = _chooser(pass_rates, outside, {} if rates is None else rates)
    streams = [
        _stream(part, seed if not number else _derived(seed, number), choose) for number, part in enumerate(parts)
    ]
    dataset = _Mixed(streams, examples.weights) if isinstance(examples, Mixture) else streams[0]
    return iter(dataset.batch(batch_size, batch_fn=lambda rows: list(rows)[host::hosts]))


def observe(rates: dict[str, float], examples: Sequence[Example], correct, source):
    """Notes the pass rate of each example's group, in `rates` by id; the newest group replaces what was known.

    Args:
      correct: [B], NaN where there is no verdict; such rows say nothing.
      source: [B], 0 where the policy sampled the row; injected rows say nothing of the policy.
    """
    counted = np.where(np.asarray(source) == 0, np.asarray(correct, np.float64), np.nan)
    for example, group in zip(examples, counted.reshape(len(examples), -1), strict=True):
        if (group := group[~np.isnan(group)]).size:
            rates[str(example["id"])] = float(group.mean())


Choose = Callable[[Example, float], bool]  # (example, uniform number) -> whether it is taken


def _chooser(pass_rates: tuple[float, float], outside: float, rates: dict[str, float]) -> Choose | None:
    """None: everything is taken."""
    low, high = pass_rates
    if not (0 <= low <= high <= 1 and 0 <= outside < 1):
        raise ValueError(
            f"curriculum.pass_rates={pass_rates}, outside={outside}: need 0 <= low <= high <= 1 and 0 <= outside < 1"
        )
    if (low, high) == (0, 1):
        if outside:
            raise ValueError(f"curriculum.outside={outside}: no pass rate is outside (0, 1); narrow pass_rates")
        return None

    def choose(example: Example, uniform: float) -> bool:
        rate = rates.get(str(example["id"]), example.get("pass_rate"))
        return rate is None or low <= rate <= high or uniform < outside

    return choose


def _derived(seed: int, number: int) -> int:
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def _stream(examples: Examples, seed: int, choose: Choose | None) -> grain.IterDataset[Example]:
    """One source without end."""
    options = grain.ReadOptions(num_threads=0)  # rows are in memory: threads would only read ahead of the saved state
    dataset = grain.MapDataset.source(examples).seed(seed).shuffle().repeat(None, reseed_each_epoch=True)
    if choose is None:
        return dataset.to_iter_dataset(options)
    refused, limit = 0, MAX_EPOCHS * len(examples)

    def taken(item: tuple[int, Example]) -> bool:
        nonlocal refused
        position, example = item
        refused = 0 if choose(example, np.random.default_rng((seed, position)).random()) else refused + 1
        if refused > limit:
            raise ValueError(
                f"the curriculum refused {refused} problems in a row, of {len(examples)}: widen "
                "curriculum.pass_rates, or set curriculum.outside above 0"
            )
        return not refused

    numbered = dataset.map_with_index(lambda position, example: (position, example)).to_iter_dataset(options)
    return numbered.filter(taken).map(lambda item: item[1])


class _Mixed(grain.IterDataset[Example]):
    """Sources in exact shares. grain's own mix rounds them: weights 3 and 7 become 100 and 233."""

    def __init__(self, streams: Sequence[grain.IterDataset[Example]], weights: Sequence[fractions.Fraction]):
        super().__init__(streams)
        self._weights = tuple(weights)

    def __iter__(self) -> grain.DatasetIterator[Example]:
        return _MixedIterator([iter(stream) for stream in self._parents], self._weights)


class _MixedIterator(grain.DatasetIterator[Example]):
    def __init__(self, parents: Sequence[grain.DatasetIterator[Example]], weights: Sequence[fractions.Fraction]):
        super().__init__(parents)
        total = sum(weights)
        self._shares, self._taken = [weight / total for weight in weights], [0] * len(weights)

    def __next__(self) -> Example:
        drawn = sum(self._taken) + 1
        lag = [drawn * share - taken for share, taken in zip(self._shares, self._taken, strict=True)]
        number = lag.index(max(lag))
        example = next(self._parents[number])
        self._taken[number] += 1
        return example

    def get_state(self) -> dict[str, Any]:
        return {"taken": list(self._taken), "parts": [parent.get_state() for parent in self._parents]}

    def set_state(self, state: dict[str, Any]):
        self._taken = list(state["taken"])
        for parent, its in zip(self._parents, state["parts"], strict=True):
            parent.set_state(its)

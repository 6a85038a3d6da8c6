"""Problems come in one order that can be taken up anywhere; sources keep their shares, a curriculum its bounds."""

import collections
import itertools
import json
from fractions import Fraction

import grain
import numpy as np
import pytest

from tapojax.tasks import gym, order

TEN = [{"id": i} for i in range(10)]


def start(seed=0, batch_size=4, examples=TEN, **options):
    return order.batches(examples, batch_size=batch_size, seed=seed, **options)


def ids(batches, count):
    return [[example["id"] for example in batch] for batch in itertools.islice(batches, count)]


def test_the_seed_decides_the_order():
    assert ids(start(), 8) == ids(start(), 8)
    assert ids(start(seed=0), 8) != ids(start(seed=1), 8)


def test_epochs_hold_each_row_once_and_differ():
    rows = sum(ids(start(), 10), [])
    epochs = [rows[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs), "an epoch is a permutation, also across batches"
    assert len({tuple(epoch) for epoch in epochs}) == 4, "each epoch is shuffled anew"
    assert list(range(10)) not in epochs


@pytest.mark.parametrize("examples", ["one source", "a mixture"])
@pytest.mark.parametrize("taken", range(8))
def test_a_resumed_order_goes_on_at_the_exact_row(taken, examples):
    """10 rows in batches of 4: batch 3 crosses the border of the first epoch, batch 5 ends the second."""
    examples = TEN if examples == "one source" else mixture(3, 7)
    whole = ids(start(examples=examples), 12)
    first = start(examples=examples)
    assert ids(first, taken) == whole[:taken]
    state = json.loads(json.dumps(first.get_state()))  # as a checkpoint's record keeps it
    second = start(examples=examples)
    second.set_state(state)
    assert ids(second, 12 - taken) == whole[taken:]
    assert ids(first, 1) == whole[taken : taken + 1], "asking for the state does not move the order"


def test_a_batch_may_be_all_there_is():
    assert [sorted(batch) for batch in ids(start(batch_size=10), 3)] == [list(range(10))] * 3


def test_too_few_examples_are_an_error():
    with pytest.raises(ValueError, match="10 examples cannot fill a batch of 11: lower prompts_per_step or add data"):
        start(batch_size=11)


def test_any_sequence_will_do():
    class Squares:
        def __len__(self):
            return 10

        def __getitem__(self, index):
            return {"id": index * index}

    (batch,) = ids(start(examples=Squares(), batch_size=10), 1)
    assert sorted(batch) == [i * i for i in range(10)]
    assert isinstance(start(), grain.DatasetIterator)


def test_the_order_is_the_plain_shuffle_of_grain():
    """The neutral value of everything: what a run without mixture, curriculum and hosts has always read."""
    dataset = grain.MapDataset.source(TEN).seed(0).shuffle().repeat(None, reseed_each_epoch=True)
    plain = [dataset[i]["id"] for i in range(40)]
    assert sum(ids(start(), 10), []) == plain
    assert sum(ids(start(pass_rates=(0.0, 1.0), rates={"3": 0.5}), 10), []) == plain


# ---- mixtures

THREE = [{"id": f"b{i}"} for i in range(3)]


def mixture(*weights, parts=(TEN, THREE)):
    return order.Mixture(tuple(parts[: len(weights)]), tuple(map(Fraction, weights)))


@pytest.mark.parametrize("weights", [("1", "1"), ("3", "7"), ("0.3", "0.7"), ("1", "30"), ("2.5", "1")])
def test_sources_have_exactly_their_shares(weights):
    first, second = map(Fraction, weights)
    cycle = (first / (first + second)).denominator
    drawn = sum(ids(start(examples=mixture(*weights), batch_size=4), 2 * cycle), [])
    for k in range(1, len(drawn) + 1):
        given = sum(isinstance(id, int) for id in drawn[:k])
        assert abs(given - k * first / (first + second)) < 1, "never an example away from the share"
    for k in range(cycle, len(drawn), cycle):
        given = sum(isinstance(id, int) for id in drawn[:k])
        assert given == k * first / (first + second), "exact whenever the share is whole"


def test_many_sources_have_exactly_their_shares():
    parts = [[{"id": (name, i)} for i in range(5 + name)] for name in range(4)]
    drawn = sum(ids(start(examples=mixture(1, 2, 4, 6, parts=parts), batch_size=13), 3), [])
    assert collections.Counter(name for name, _ in drawn) == {0: 3, 1: 6, 2: 12, 3: 18}
    assert collections.Counter(name for name, _ in drawn[:13]) == {0: 1, 1: 2, 2: 4, 3: 6}


def test_each_source_is_shuffled_anew_each_epoch_by_itself():
    twins = mixture(1, 1, parts=(TEN, [{"id": i + 10} for i in range(10)]))
    drawn = sum(ids(start(examples=twins), 20), [])
    for begin in (0, 10):
        own = [id - begin for id in drawn if begin <= id < begin + 10]
        epochs = [own[i : i + 10] for i in range(0, 40, 10)]
        assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [id % 10 for id in drawn[::2]] != [id % 10 for id in drawn[1::2]], "two sources have two orders"


def test_a_mixture_of_one_source_is_that_source():
    assert ids(start(examples=mixture(5)), 8) == ids(start(), 8)


def test_a_mixture_has_random_access_to_all_its_examples():
    both = mixture(1, 9)
    assert len(both) == 13
    assert [both[i] for i in range(13)] == [*TEN, *THREE] == list(both)
    assert both[-1] == THREE[-1]
    with pytest.raises(IndexError):
        both[13]


def test_virtual_sources_mix():
    """The gym's: a million problems, none of which exists before it is asked for."""
    easy, hard = (gym.source([level], 10**6, 0) for level in (1, 8))
    drawn = next(start(examples=mixture(3, 1, parts=(easy, hard)), batch_size=8))
    assert [example["level"] for example in drawn].count(8) == 2


@pytest.mark.parametrize(
    "parts, weights, message",
    [
        ([TEN, THREE], [1], "2 sources and 1 weights"),
        ([], [], "0 sources and 0 weights"),
        ([TEN, THREE], [1, 0], "source 2 of the mixture has weight 0 and 3 examples"),
        ([TEN, []], [1, 1], "source 2 of the mixture has weight 1 and 0 examples"),
    ],
)
def test_a_source_without_weight_or_data_is_named(parts, weights, message):
    with pytest.raises(ValueError, match=message):
        order.Mixture(tuple(parts), tuple(map(Fraction, weights)))


@pytest.mark.parametrize(
    "text, paths, weights",
    [
        ("", [], []),
        ("a.jsonl", ["a.jsonl"], []),
        ("a.jsonl, b.parquet", ["a.jsonl", "b.parquet"], []),
        ("a.jsonl:3,b.parquet:0.5", ["a.jsonl", "b.parquet"], [3, Fraction(1, 2)]),
        ("gs://bucket/a.jsonl:1,/b:c/d.jsonl:2", ["gs://bucket/a.jsonl", "/b:c/d.jsonl"], [1, 2]),
    ],
)
def test_paths_may_have_weights(text, paths, weights):
    assert order.parse_sources(text) == (paths, weights)


def test_all_paths_have_weights_or_none():
    with pytest.raises(ValueError, match="give every file a weight"):
        order.parse_sources("a.jsonl:3,b.jsonl")


# ---- curriculum

RATED = [{"id": i, "pass_rate": i / 10} for i in range(11)]


def test_problems_outside_the_bounds_are_left_out():
    drawn = sum(ids(start(examples=RATED, pass_rates=(0.2, 0.5)), 10), [])
    assert collections.Counter(drawn) == {2: 10, 3: 10, 4: 10, 5: 10}, "the others keep their epochs"
    plain = sum(ids(start(examples=RATED), 40), [])
    assert drawn == [id for id in plain if 2 <= id <= 5][:40], "and their order"


def test_some_problems_outside_are_trained_all_the_same():
    drawn = sum(ids(start(examples=RATED, pass_rates=(0.2, 0.5), outside=0.25), 200), [])
    inside = sum(2 <= id <= 5 for id in drawn)
    epochs = inside / 4
    assert abs((len(drawn) - inside) / (7 * epochs) - 0.25) < 0.04


def test_the_runs_own_pass_rates_replace_those_of_the_file():
    rates = {"2": 0.9, "9": 0.3}
    stream = start(examples=RATED, pass_rates=(0.2, 0.5), rates=rates)
    assert set(sum(ids(stream, 10), [])) == {3, 4, 5, 9}
    rates |= {"9": 1.0, "10": 0.5}
    assert set(sum(ids(stream, 10), [])) == {3, 4, 5, 10}, "as soon as they are known"


def test_a_problem_without_a_pass_rate_is_trained():
    assert set(sum(ids(start(pass_rates=(0.2, 0.5), rates={"4": 0.0}), 9), [])) == set(range(10)) - {4}


def test_a_curriculum_that_refuses_everything_stops():
    with pytest.raises(ValueError, match="refused 34 problems in a row, of 11: widen curriculum.pass_rates"):
        next(start(examples=RATED, pass_rates=(0.21, 0.29)))


@pytest.mark.parametrize("outside", [0.0, 0.3])
def test_a_resumed_curriculum_goes_on_at_the_exact_row(outside):
    """The pass rates change on the way, as they do online; they are saved beside the state."""

    def run(stream, rates, steps):
        for step in steps:
            batch = next(stream)
            solved = [0.0 if example["id"] % 2 and step % 3 == 0 else 0.5 for example in batch]
            order.observe(rates, batch, solved, [0] * 4)
            yield [example["id"] for example in batch]

    options = dict(examples=RATED, pass_rates=(0.4, 0.6), outside=outside)
    rates: dict[str, float] = {"1": 0.5, "2": 0.5}
    stream = start(**options, rates=rates)
    whole = list(run(stream, rates, range(6)))
    kept = json.loads(json.dumps([stream.get_state(), rates]))
    rest = list(run(stream, rates, range(6, 14)))
    again = start(**options, rates=kept[1])
    again.set_state(kept[0])
    assert list(run(again, kept[1], range(6, 14))) == rest
    assert kept[1] == rates
    assert len({tuple(batch) for batch in whole + rest}) > 10


def test_shares_hold_among_what_the_curriculum_takes():
    rated = [{"id": f"b{i}", "pass_rate": 0.5} for i in range(3)]
    drawn = sum(ids(start(examples=mixture(1, 1, parts=(RATED, rated)), pass_rates=(0.5, 0.5)), 10), [])
    assert collections.Counter(drawn)[5] == 20


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(pass_rates=(0.6, 0.5)), "need 0 <= low <= high <= 1"),
        (dict(pass_rates=(-0.1, 0.5)), "need 0 <= low"),
        (dict(pass_rates=(0.0, 1.5)), "need 0 <= low <= high <= 1"),
        (dict(pass_rates=(0.0, 0.5), outside=1.0), "0 <= outside < 1"),
        (dict(outside=0.5), "no pass rate is outside"),
    ],
)
def test_a_curriculum_that_cannot_choose_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        start(**options)


def test_a_pass_rate_is_that_of_the_newest_group():
    rates = {"a": 1.0, "b": 0.25, "c": 0.5}
    examples = [{"id": "a"}, {"id": "b"}, {"id": "d"}]
    nan = np.nan
    correct = np.float32([1, 0, nan, 0, nan, nan, nan, 1, 1, 1, 1, 1])
    order.observe(rates, examples, correct, np.int32([0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0]))
    assert rates == {"a": 1 / 3, "b": 0.25, "c": 0.5, "d": 1.0}, "no verdict and injected rows say nothing"
    order.observe(rates, examples[:1], [0, 1], [0, 0])
    assert rates["a"] == 0.5


# ---- hosts


@pytest.mark.parametrize("examples", [TEN, mixture(3, 7), RATED], ids=["plain", "mixture", "curriculum"])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_every_batch(examples, hosts):
    options = dict(examples=examples, seed=5) | (dict(pass_rates=(0.3, 0.8)) if examples is RATED else {})
    parts = [ids(start(**options, host=host, hosts=hosts), 12) for host in range(hosts)]
    for whole, *shared in zip(ids(start(**options), 12), *parts, strict=True):
        assert [len(part) for part in shared] == [4 // hosts] * hosts
        assert [id for row in zip(*shared, strict=True) for id in row] == whole


def test_a_run_may_go_on_with_another_number_of_hosts():
    first = start(examples=mixture(3, 7), host=1, hosts=2)
    ids(first, 5)
    alone = start(examples=mixture(3, 7))
    alone.set_state(first.get_state())
    assert ids(alone, 3) == ids(start(examples=mixture(3, 7)), 8)[5:]


@pytest.mark.parametrize("host, hosts", [(0, 3), (2, 2), (-1, 2)])
def test_hosts_must_divide_a_batch(host, hosts):
    with pytest.raises(ValueError, match=f"host {host} of {hosts} gets no even part of a batch of 4"):
        start(host=host, hosts=hosts)

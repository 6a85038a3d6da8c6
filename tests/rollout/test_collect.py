"""Collecting fills the batch in order, hands every slot its data, and stops where something is missing."""

import itertools
import threading
import time

import jax
import numpy as np
import pytest

from tapojax.algorithms.dapo import dapo
from tapojax.algorithms.grpo import grpo
from tapojax.rewards import loop
from tapojax.rollout import collect
from tapojax.types import Engine, Prompts, Rollout, Sampling, Task

NAN = float("nan")
GROUP, WIDTH = 2, 5


class Letters:
    eos_token_id = pad_token_id = 0

    def __len__(self):
        return 128

    def encode(self, text):
        return [ord(letter) for letter in text]

    def decode(self, token_ids, skip_special_tokens=True):
        return "".join(chr(t) for t in token_ids if t)


def fake_engine(calls):
    """Row r of prompt p completes with p's letter and the place in the group: "A0", "A1", then the end token.

    The last rows are told of first.
    """

    def generate(weights, prompts, key, *, group_size, sampling, temperature=None, carry=(), finished=None):
        calls.append({"weights": weights, "prompts": prompts, "key": key, "temperature": temperature, "carry": carry})
        tokens = np.zeros((len(prompts.tokens) * group_size, WIDTH), np.int32)
        for row in range(len(tokens)):
            letter = prompts.tokens[row // group_size][-1]
            tokens[row, :3] = [81, letter, ord("0") + row % group_size]
        mask = np.tile([False, True, True, True, False], (len(tokens), 1))
        numbers = -tokens.astype(np.float32) * mask
        rows = len(tokens)
        source, truncated = np.zeros(rows, np.int32), np.zeros(rows, bool)
        versions = np.where(mask, tokens, -1)
        for row in reversed(range(rows if finished else 0)):
            finished(row, tokens[row][mask[row]].tolist())
        return Rollout(tokens, mask, numbers, numbers, np.ones(rows, np.int32), truncated, source, versions)

    return Engine(load=lambda params, version: params, generate=generate)


def fake_task(verdict, calls=None):
    """verdict(example, completion) -> score or NaN, for which an error is given."""

    def score(examples, completions):
        if calls is not None:
            calls.append((list(examples), list(completions)))
        correct = np.array([verdict(e, c) for e, c in zip(examples, completions, strict=True)], np.float32)
        errors = [f"judge down on {c}" if np.isnan(v) else None for v, c in zip(correct, completions, strict=True)]
        return {"correct": correct}, errors

    return Task(Letters(), [], [], lambda example: [81, ord(example["problem"])], score, lambda text: text)


def batches_of(*letters):
    """One batch of examples for each text, an example for each letter; endless repeats of the last."""
    rounds = [[{"id": letter, "problem": letter, "answer": letter} for letter in text] for text in letters]
    return itertools.chain(rounds, itertools.repeat(rounds[-1]))


def run(batches, task, algorithm=None, *, calls=None, step=3, **kwargs):
    return collect.collect(
        fake_engine([] if calls is None else calls),
        "weights",
        batches,
        task,
        grpo(group_size=GROUP) if algorithm is None else algorithm,
        Sampling(3),
        step=step,
        key=jax.random.key(7),
        **kwargs,
    )


def right(example, completion):
    return 1.0


def mixed(example, completion):
    """Upper-case problems have one right row of two, lower-case ones none."""
    return float(example["problem"].isupper() and completion.endswith("0"))


def ids(part):
    return "".join(example["id"] for example in part.prompts.examples)


def test_one_round():
    calls, scored = [], []
    part = run(batches_of("ABC"), fake_task(right, scored), calls=calls, carry=("c",))
    assert ids(part) == "ABC" and part.completions == ["A0", "A1", "B0", "B1", "C0", "C1"]
    assert [e["id"] for e in scored[0][0]] == list("AABBCC"), "one example a row"
    assert list(part.prompts.tokens) == [[81, 65], [81, 66], [81, 67]]
    assert (part.sampled_rows, part.sampled_tokens, list(part.errors)) == (6, 18, [])
    np.testing.assert_array_equal(part.scores["correct"], np.ones(6))
    (call,) = calls
    assert call["weights"] == "weights" and call["carry"] == ("c",) and call["temperature"] is None
    assert part.seconds.keys() == {"sample", "reward"} and min(part.seconds.values()) >= 0


def test_refills_until_p_groups_are_kept_in_order():
    calls, algorithm = [], dapo(group_size=GROUP, max_tokens=3)
    part = run(batches_of("aBcD", "efGh", "IjKL", "MNOP"), fake_task(mixed), algorithm, calls=calls)
    assert ids(part) == "BDGI", "kept groups in the order they came, the surplus of the last round left out"
    assert len(calls) == 3, "no round more than needed"
    assert part.completions == ["B0", "B1", "D0", "D1", "G0", "G1", "I0", "I1"]
    np.testing.assert_array_equal(part.scores["correct"], [1, 0] * 4)
    np.testing.assert_array_equal(part.rollout.tokens[:, 1], [ord(c) for c in "BBDDGGII"])
    assert part.sampled_rows == 24 and part.sampled_tokens == 72, "discarded rows were sampled too"
    for name, values in part.rollout._asdict().items():
        assert len(values) == 8, name
    assert len({tuple(jax.random.key_data(call["key"]).tolist()) for call in calls}) == 3, "each round has its own key"


def test_the_same_key_collects_the_same():
    first, second = ([], [])
    for calls in (first, second):
        run(batches_of("aB", "Cd", "EF"), fake_task(mixed), dapo(group_size=GROUP, max_tokens=3), calls=calls)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(jax.random.key_data(a["key"]), jax.random.key_data(b["key"]))


def test_a_full_first_round_takes_the_rows_as_they_are():
    part = run(batches_of("AB"), fake_task(mixed), dapo(group_size=GROUP, max_tokens=3))
    assert ids(part) == "AB" and part.sampled_rows == 4


def test_max_rounds_says_what_was_found():
    with pytest.raises(ValueError) as error:
        run(batches_of("aB", "cd"), fake_task(mixed), dapo(group_size=GROUP, max_tokens=3), max_rounds=4)
    assert "step 3: 4 rounds of 2 prompts gave 1 groups worth keeping" in str(error.value)
    assert "(share of the last rounds [0.0, 0.0, 0.0])" in str(error.value)
    assert "raise collect.max_rounds, or turn dynamic sampling off" in str(error.value)


def test_a_missing_channel_stops_the_run():
    algorithm = grpo(group_size=GROUP)._replace(needs=frozenset({"correct", "process", "flawed"}))
    with pytest.raises(ValueError, match=r"score channels \['flawed', 'process'\], the task gives \['correct'\]"):
        run(batches_of("AB"), fake_task(right), algorithm)


# ---- rows without a score


def test_nan_scores_flow_and_are_told():
    part = run(batches_of("ABCDE"), fake_task(lambda e, c: NAN if c == "B1" else 1.0))
    np.testing.assert_array_equal(part.scores["correct"], [1, 1, 1, NAN, 1, 1, 1, 1, 1, 1])
    assert list(part.errors) == ["judge down on B1"]


def test_too_many_errors_stop_the_run_and_show_the_first():
    def half(example, completion):
        return NAN if completion.endswith("1") else 1.0

    with pytest.raises(ValueError, match=r"4 of 8 rows .*max_error_share is 0.2\); the first error: judge down on A1"):
        run(batches_of("ABCD"), fake_task(half))
    assert len(run(batches_of("ABCD"), fake_task(half), max_error_share=0.5).errors) == 4, "the share itself is allowed"


def test_errors_of_discarded_groups_are_counted():
    def verdict(example, completion):
        return NAN if completion == "a1" else mixed(example, completion)

    algorithm = dapo(group_size=GROUP, max_tokens=3)
    part = run(batches_of("aBC", "DEF"), fake_task(verdict), algorithm, max_error_share=0.3)
    assert ids(part) == "BCD" and list(part.errors) == ["judge down on a1"]
    assert not np.isnan(part.scores["correct"]).any()


# ---- slots


def test_the_prompts_slot_changes_what_is_sampled_and_not_what_is_scored():
    calls, scored, steps = [], [], []

    def hint(prompts, step):
        steps.append(step)
        return Prompts(prompts.examples, [[*tokens, ord("x")] for tokens in prompts.tokens])

    part = run(batches_of("AB"), fake_task(right, scored), grpo(group_size=GROUP)._replace(prompts=hint), calls=calls)
    assert steps == [3]
    assert list(calls[0]["prompts"].tokens) == [[81, 65, 120], [81, 66, 120]] == list(part.prompts.tokens)
    assert [e["problem"] for e in scored[0][0]] == list("AABB")


def test_the_inject_slot_replaces_rows_scores_and_texts():
    seen = []

    def inject(rollout, scores, prompts, key, memory, score):
        seen.append((scores, prompts, key, memory, score))
        tokens, source = rollout.tokens.copy(), rollout.source.copy()
        tokens[1, 1:3], source[1] = [ord("!"), ord("?")], 2
        correct = scores["correct"].copy()
        correct[1] = 5.0
        mask = rollout.mask.copy()
        mask[1, 3] = False
        return rollout._replace(tokens=tokens, mask=mask, source=source), {**scores, "correct": correct}, memory + 1

    def policy(tokens, mask):
        raise AssertionError("the algorithm decides whether rows are scored")

    injecting = grpo(group_size=GROUP)._replace(inject=inject)
    part = run(batches_of("AB"), fake_task(right), injecting, memory=1, score=policy)
    assert part.completions == ["A0", "!?", "B0", "B1"], "texts are those of the rows that train"
    np.testing.assert_array_equal(part.scores["correct"], [1, 5, 1, 1])
    np.testing.assert_array_equal(part.rollout.source, [0, 2, 0, 0])
    assert part.sampled_tokens == 12, "what was injected was not sampled"
    (scores, prompts, key, memory, score), *rest = seen
    assert not rest and list(prompts.tokens) == [[81, 65], [81, 66]]
    assert (memory, part.memory, score) == (1, 2, policy), "the memory goes in and comes out"
    assert scores.keys() == {"correct"} and jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)


def test_the_temperature_slot_reaches_the_engine():
    def hot(logits, carry):
        return carry

    calls = []
    run(batches_of("AB"), fake_task(right), grpo(group_size=GROUP)._replace(temperature=hot), calls=calls, carry=0.7)
    assert calls[0]["temperature"] is hot and calls[0]["carry"] == 0.7


def test_keep_judges_rewards_of_this_step():
    seen = []

    def rewards(scores, rollout, step):
        return scores["correct"] * 0 + step

    def keep(rewards, scores):
        seen.append(np.asarray(rewards))
        return np.array([True, True])

    run(batches_of("AB"), fake_task(right), grpo(group_size=GROUP)._replace(rewards=rewards, keep=keep), step=11)
    np.testing.assert_array_equal(seen, [[11] * 4])


# ---- select, concatenate, decode


def test_select_takes_groups_in_the_given_order():
    whole = run(batches_of("ABCD"), fake_task(mixed))
    part = collect.select(whole, [3, 1], GROUP)
    assert ids(part) == "DB" and part.completions == ["D0", "D1", "B0", "B1"]
    for name, values in part.rollout._asdict().items():
        np.testing.assert_array_equal(values, getattr(whole.rollout, name)[[6, 7, 2, 3]], err_msg=name)
        assert values.dtype == getattr(whole.rollout, name).dtype, name
    np.testing.assert_array_equal(part.scores["correct"], whole.scores["correct"][[6, 7, 2, 3]])
    assert part.sampled_rows == 8, "counts are of what was sampled"
    nothing = collect.select(whole, [], GROUP)
    assert ids(nothing) == "" and nothing.rollout.tokens.shape == (0, WIDTH)


def test_concatenate_undoes_a_split():
    whole = run(batches_of("ABCD"), fake_task(lambda e, c: NAN if c == "A0" else 1.0))
    parts = [collect.select(whole, groups, GROUP) for groups in ([0, 1], [2], [3])]
    joined = collect.concatenate(parts)
    assert ids(joined) == "ABCD" and list(joined.completions) == list(whole.completions)
    for got, want in zip(joined.rollout, whole.rollout, strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(joined.scores["correct"], whole.scores["correct"])
    assert joined.sampled_rows == 3 * whole.sampled_rows and len(joined.errors) == 3
    assert joined.seconds["sample"] == pytest.approx(3 * whole.seconds["sample"])


def test_an_engine_that_tells_no_versions_is_collected_too():
    whole = run(batches_of("ABCD"), fake_task(mixed))
    silent = whole._replace(rollout=whole.rollout._replace(versions=None))
    joined = collect.concatenate([collect.select(silent, groups, GROUP) for groups in ([2], [0, 1])])
    assert ids(joined) == "CAB" and joined.rollout.versions is None


def test_decode_reads_the_mask_and_nothing_else():
    rollout = run(batches_of("A"), fake_task(right)).rollout
    assert collect.decode(Letters(), rollout) == ["A0", "A1"]
    holes = rollout._replace(mask=np.array([[0, 0, 1, 0, 0], [0, 0, 0, 0, 0]], bool))
    assert collect.decode(Letters(), holes) == ["0", ""]


# ---- streaming or after


def small_chunks(overlap):
    return loop.Options(overlap, chunk_rows=3, threads=2, linger_s=0.01, wait_s=30.0)


def with_costs(task):
    """As judges do it: only right rows cost something, and a call without one has no such channel."""

    def score(examples, completions):
        scores, errors = task.score(examples, completions)
        right = scores["correct"] == 1
        cost = np.where(right, np.char.str_len(completions), np.nan).astype(np.float32)
        return {**scores, **({"judge_tokens": cost} if right.any() else {})}, errors

    return task._replace(score=score)


def flaky(example, completion):
    return NAN if completion == "D1" else mixed(example, completion)


def test_streaming_and_after_collect_the_same():
    """Several rounds, rows without a score, channels that come and go: not a bit differs but the clock's."""
    parts = []
    for overlap in (True, False):
        algorithm = dapo(group_size=GROUP, max_tokens=3)
        task = with_costs(fake_task(flaky))
        how = dict(max_error_share=0.3, reward=small_chunks(overlap))
        parts.append(run(batches_of("abcd", "aBcD", "efGh", "IjKL"), task, algorithm, **how))
    streamed, after = parts
    assert ids(streamed) == ids(after) and streamed.completions == after.completions
    assert (streamed.errors, streamed.sampled_rows) == (after.errors, after.sampled_rows) == (["judge down on D1"], 32)
    assert {*streamed.scores} == {*after.scores} == {"correct", "judge_tokens"}
    jax.tree.map(np.testing.assert_array_equal, streamed.scores, after.scores)
    jax.tree.map(np.testing.assert_array_equal, streamed.rollout, after.rollout)
    assert len(after.call_seconds) == 4 and len(streamed.call_seconds) >= 12, "one call a round, or chunks of 3 rows"


def test_scoring_begins_before_sampling_ends():
    """The engine waits for the first score before it finishes its last row."""
    scored = threading.Event()

    def verdict(example, completion):
        scored.set()
        return 1.0

    engine = fake_engine([])

    def generate(*given, finished, **how):
        def last_one_waits(row, tokens):
            assert row or scored.wait(30), "nothing is scored while a row is missing"
            finished(row, tokens)

        return engine.generate(*given, finished=last_one_waits, **how)

    part = collect.collect(
        engine._replace(generate=generate),
        "weights",
        batches_of("ABC"),
        fake_task(verdict),
        grpo(group_size=GROUP),
        Sampling(3),
        step=3,
        key=jax.random.key(7),
        reward=small_chunks(True),
    )
    np.testing.assert_array_equal(part.scores["correct"], np.ones(6))


def test_after_means_that_the_engine_is_asked_to_tell_nobody():
    def generate(*given, **how):
        assert "finished" not in how
        return engine.generate(*given, **how)

    engine = fake_engine([])
    for silent in (engine._replace(generate=generate),):
        part = collect.collect(
            silent,
            "weights",
            batches_of("AB"),
            fake_task(right),
            grpo(group_size=GROUP),
            Sampling(3),
            step=3,
            key=jax.random.key(7),
            reward=small_chunks(False),
        )
    assert ids(part) == "AB"


@pytest.mark.parametrize("overlap", [True, False])
def test_each_row_is_decoded_once_and_injected_ones_again(overlap):
    class Counting(Letters):
        def decode(self, token_ids, skip_special_tokens=True):
            decoded.append(super().decode(token_ids))
            return decoded[-1]

    def inject(rollout, scores, prompts, key, memory, score):
        tokens = rollout.tokens.copy()
        tokens[1, 2] = ord("!")
        return rollout._replace(tokens=tokens), scores, memory

    decoded = []
    task = fake_task(right)._replace(tokenizer=Counting())
    injecting = grpo(group_size=GROUP)._replace(inject=inject)
    part = run(batches_of("AB"), task, injecting, reward=small_chunks(overlap))
    assert part.completions == ["A0", "A!", "B0", "B1"]
    assert sorted(decoded) == ["A!", "A0", "A1", "B0", "B1"]


def test_the_breaker_stops_the_engine():
    """The first chunk's failures are known before the last rows are sampled: those never are."""
    told = []

    def generate(weights, prompts, key, *, finished, **how):
        for row in range(12):
            finished(row, [65, 48])
            told.append(row)
            assert row < 3 or failed.wait(30)
            time.sleep(0.05 * (row >= 3))
        raise AssertionError("it was not stopped")

    failed = threading.Event()

    def verdict(example, completion):
        failed.set()
        return NAN

    with pytest.raises(ValueError, match="3 of 3 rows could not be scored, 12 are sampled in a round") as error:
        collect.collect(
            Engine(lambda *_: None, generate),
            "weights",
            batches_of("ABCDEF"),
            fake_task(verdict),
            grpo(group_size=GROUP),
            Sampling(3),
            step=3,
            key=jax.random.key(7),
            reward=small_chunks(True),
        )
    assert "collect.max_error_share is 0.2" in str(error.value) and len(told) < 12


def test_rows_scored_by_the_servers_follow_the_same_rules():
    def scored(verdict, **kwargs):
        engine, task = fake_engine([]), fake_task(verdict)

        def generate_scored(weights, prompts, key, *, group_size, **how):
            rollout = engine.generate(weights, prompts, key, group_size=group_size, **how)
            rows = [example for example in prompts.examples for _ in range(group_size)]
            return rollout, *task.score(rows, collect.decode(Letters(), rollout))

        def not_here(examples, completions):
            raise AssertionError("scored again")

        return collect.collect(
            engine._replace(generate_scored=generate_scored),
            "weights",
            batches_of("ABCD"),
            task._replace(score=not_here),
            grpo(group_size=GROUP)._replace(**kwargs),
            Sampling(3),
            step=3,
            key=jax.random.key(7),
        )

    part = scored(lambda e, c: NAN if c == "B1" else 1.0)
    np.testing.assert_array_equal(part.scores["correct"], [1, 1, 1, NAN, 1, 1, 1, 1])
    assert list(part.errors) == ["judge down on B1"] and list(part.call_seconds) == []
    with pytest.raises(ValueError, match="8 of 8 rows could not be scored"):
        scored(lambda e, c: NAN)
    with pytest.raises(ValueError, match=r"score channels \['process'\], the task gives \['correct'\]"):
        scored(right, needs=frozenset({"correct", "process"}))


def test_the_groups_that_are_not_kept_are_observed_too():
    told = []
    algorithm = dapo(group_size=GROUP, max_tokens=3)
    run(batches_of("aB", "cD"), fake_task(mixed), algorithm, observe=lambda *round: told.append(round))
    assert [[example["id"] for example in examples] for examples, _, _ in told] == [["a", "B"], ["c", "D"]]
    assert [correct.tolist() for _, correct, _ in told] == [[0, 0, 1, 0]] * 2
    assert [source.tolist() for _, _, source in told] == [[0] * 4] * 2, "where each row came from"

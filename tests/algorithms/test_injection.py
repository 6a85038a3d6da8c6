"""TAPO's rules of injection: which row, by what, and what is remembered."""

import jax.numpy as jnp
import numpy as np
import pytest

from tapojax.algorithms import injection
from tapojax.tasks.gym_tokenizer import TOKENIZER
from tapojax.types import Perturbed, Prompts, Rollout, Task, TokenStats

GROUP, BUDGET, LENGTH = 4, 10, 16
EXAMPLE = {"id": "a", "problem": "7+6?", "answer": "13"}


def ids(text: str) -> list[int]:
    return [*TOKENIZER.encode(text), TOKENIZER.eos_token_id]


def rollout_of(*completions: str) -> Rollout:
    """Rows of prompt "7+6?" and a completion."""
    tokens, mask = np.zeros((len(completions), LENGTH), np.int32), np.zeros((len(completions), LENGTH), bool)
    for row, row_mask, text in zip(tokens, mask, completions, strict=True):
        row[: 4 + len(text) + 1] = TOKENIZER.encode("7+6?") + ids(text)
        row_mask[4 : 4 + len(text) + 1] = True
    zeros = np.zeros(tokens.shape, np.float32)
    lengths = np.full(len(tokens), 4, np.int32)
    return Rollout(tokens, mask, zeros, zeros, lengths, np.zeros(len(tokens), bool), np.zeros(len(tokens), np.int32))


def rows_of(*completions: str, rewards=None) -> injection.Rows:
    correct = np.array([float(text.endswith("#13")) for text in completions], np.float32)
    prompts = Prompts([{**EXAMPLE, "id": name} for name in "abc"[: len(completions) // GROUP]], [[1]])
    rewards = correct if rewards is None else np.asarray(rewards)
    return injection.Rows(rollout_of(*completions), correct, rewards, prompts, GROUP, BUDGET)


def score(examples, texts):
    return {"correct": np.array([text.endswith("#13") for text in texts], np.float32)}, [None] * len(texts)


def perturb(example, tokens, suggestions, rng):
    text = TOKENIZER.decode([t for t in tokens if t != TOKENIZER.eos_token_id])
    begin, answer = text.rindex("#") + 1, (*suggestions, "14")[0]
    return Perturbed(ids(text[:begin] + answer), begin, begin + len(answer))


def task(**slots) -> Task:
    def answer(text):
        return text.rpartition("#")[2] or None

    made = Task(TOKENIZER, [], [], lambda e: TOKENIZER.encode(e["problem"]), score, answer, perturb=perturb)
    return made._replace(**slots)


def likes(*preferred: str):
    """A policy under which the given completions are likelier than any other."""
    wanted = [ids(text) for text in preferred]

    def stats(tokens, mask):
        liked = np.array([t[m].tolist() in wanted for t, m in zip(tokens, mask, strict=True)])
        logprobs = np.where(mask, np.where(liked, -0.1, -3.0)[:, None], 0)
        return TokenStats(jnp.asarray(logprobs), jnp.zeros(mask.shape))

    return stats


def texts(candidates):
    return [TOKENIZER.decode(candidate.completion.tokens) for candidate in candidates]


RNG = np.random.default_rng(0)
WRONG = ("#10", "#11", "#9999", "#12")
RIGHT = ("#13", "7+6=13#13", "1#13", "#13")


def test_a_group_that_is_neither_all_right_nor_all_wrong_is_left_alone():
    rows = rows_of("#13", "#11", "#12", "#14")
    memory = {"a": {"right": [[injection.OWN, ids("#13")]], "wrong": [[injection.OWN, ids("#9")]]}}
    assert injection.dynamic_teacher(rows, task(), memory, RNG) == []


def test_an_all_wrong_group_gets_what_is_remembered_right_in_place_of_its_longest_row():
    memory = {"a": {"right": [[injection.OWN, ids("#13")], [injection.SOLUTION, ids("7+6=13#13")]], "wrong": []}}
    found = injection.dynamic_teacher(rows_of(*WRONG), task(), memory, RNG)
    assert [(c.row, c.source, c.origin) for c in found] == [
        (2, injection.TEACHER, injection.OWN),
        (2, injection.TEACHER, injection.SOLUTION),
    ]
    assert texts(found) == ["#13", "7+6=13#13"]


def test_an_all_wrong_group_of_which_nothing_right_is_known_stays_collapsed():
    assert injection.dynamic_teacher(rows_of(*WRONG), task(), {}, RNG) == []


def test_an_all_right_group_gets_the_policys_own_failure_in_place_of_its_worst_row():
    memory = {"a": {"right": [], "wrong": [[injection.OWN, ids("#7")]]}}
    found = injection.dynamic_teacher(rows_of(*RIGHT, rewards=[1, 0.5, 0.9, 0.5]), task(), memory, RNG)
    assert [(c.row, c.source, c.origin) for c in found] == [(1, injection.WRONG, injection.OWN)], "longest of the worst"
    assert texts(found) == ["#7"]


def test_without_a_failure_to_remember_the_best_row_is_perturbed():
    found = injection.dynamic_teacher(rows_of(*RIGHT, rewards=[1, 0.5, 0.9, 1]), task(), {}, RNG)
    assert [(c.row, c.source, c.origin) for c in found] == [(1, injection.WRONG, injection.SURGERY)]
    assert texts(found) == ["#14"]
    assert (found[0].completion.begin, found[0].completion.end) == (1, 3)


def test_the_perturbed_answer_is_one_that_the_group_gave_and_replaces_a_wrong_row():
    found = injection.perturbed_answers(rows_of("7+6=13#13", "#11", "#1", "#999"), task(), set(), RNG, 1.0)
    assert [(c.row, c.source) for c in found] == [(3, injection.PERTURBED)], "the longest wrong row goes"
    assert texts(found) == ["7+6=13#11"], "right reasoning, the answer of a wrong row"


@pytest.mark.parametrize(
    ("completions", "replaced"),
    [
        (("#13", "#13", "#11", "#13"), [3]),  # one wrong row is kept, a third right one goes
        (("#13", "#13", "#11", "#13"), [3]),
        (RIGHT, [1]),
    ],
)
def test_the_last_wrong_row_is_never_replaced(completions, replaced):
    found = injection.perturbed_answers(rows_of(*completions), task(), set(), RNG, 1.0)
    assert [candidate.row for candidate in found] == replaced


def test_a_group_without_room_or_out_of_luck_is_passed_over():
    two_right = rows_of("#13", "#13", "#11", "#12")._replace(group_size=2)
    two_right = two_right._replace(prompts=Prompts([EXAMPLE, EXAMPLE], []))
    assert injection.perturbed_answers(two_right, task(), set(), RNG, 1.0) == [], "two right of two; none right"
    mixed = rows_of("#13", "#11", "#12", "#14")
    assert injection.perturbed_answers(mixed, task(), set(), RNG, 0.0) == []
    assert injection.perturbed_answers(mixed, task(), {2}, RNG, 1.0) == [], "DTI came first"
    assert injection.perturbed_answers(mixed, task(perturb=None), set(), RNG, 1.0) == []
    assert injection.perturbed_answers(mixed._replace(max_tokens=3), task(), set(), RNG, 1.0) == [], "past the budget"


def test_unscored_rows_neither_count_nor_go():
    rows = rows_of(*WRONG)
    rows.correct[2] = np.nan
    memory = {"a": {"right": [[injection.OWN, ids("#13")]], "wrong": []}}
    assert [c.row for c in injection.dynamic_teacher(rows, task(), memory, RNG)] == [3], "row 2 is the longest"


def test_the_likeliest_candidate_is_taken_with_its_own_logprobs():
    rows = rows_of(*WRONG)
    memory = {"a": {"right": [[injection.OWN, ids("#13")], [injection.SOLUTION, ids("7+6=13#13")]], "wrong": []}}
    candidates = injection.dynamic_teacher(rows, task(), memory, RNG)
    for wanted in ("#13", "7+6=13#13"):
        ((chosen, logprobs),) = injection.most_likely(candidates, rows.rollout, likes(wanted))
        assert texts([chosen]) == [wanted]
        rollout, channels = injection.overwrite(rows.rollout, [(chosen, logprobs)])
        row = chosen.row
        assert TOKENIZER.decode(rollout.tokens[row][rollout.mask[row]]) == wanted
        np.testing.assert_allclose(rollout.behaviour_logprobs[row], np.where(rollout.mask[row], -0.1, 0), rtol=1e-6)
        assert rollout.source.tolist() == [0, 0, 1, 0] and channels["origin"][row] == chosen.origin
        assert np.isnan(channels["span_begin"]).all() and np.isnan(np.delete(channels["origin"], row)).all()
    assert rows.rollout.source.sum() == 0, "the sampled rollout is not touched"


def test_more_candidates_than_rows_are_scored_in_batches_of_the_rollouts_shape():
    rows = rows_of(*WRONG)
    candidates = [injection.Candidate(2, 1, 1, Perturbed(ids(f"#{n}"), 0, 0)) for n in range(11)]
    shapes = []

    def stats(tokens, mask):
        shapes.append(tokens.shape)
        return likes("#10")(tokens, mask)

    ((chosen, _),) = injection.most_likely(candidates, rows.rollout, stats)
    assert texts([chosen]) == ["#10"] and shapes == [(4, LENGTH)] * 3, "one compiled shape"


def test_only_verified_completions_that_fit_are_taught():
    def teacher(example):
        return ["#13", "#12", "7+6+0=13#13"]

    taught = injection.consult({}, rows_of(*WRONG), task(solution=lambda e: ("7+6=13", "#13"), teacher=teacher))
    assert taught == {
        "a": {"right": [[injection.SOLUTION, ids("7+6=13#13")], [injection.STRONGER, ids("#13")]], "wrong": []}
    }
    again = injection.consult(taught, rows_of(*WRONG), task(solution=lambda e: pytest.fail("known already")))
    assert again == taught
    assert injection.consult({}, rows_of(*RIGHT), task(teacher=lambda e: pytest.fail("not all wrong"))) == {}
    assert injection.consult({}, rows_of(*WRONG), task(solution=lambda e: None)) == {}


def test_the_memory_keeps_the_newest_four_of_a_kind_and_forgets_the_oldest_prompts():
    memory = injection.remember({}, rows_of("#13", "#11", "#12", "#14", *WRONG), limit=100)
    assert [tokens for _, tokens in memory["b"]["wrong"]] == [ids(text) for text in WRONG]
    assert [tokens for _, tokens in memory["a"]["right"]] == [ids("#13")]
    more = injection.remember(memory, rows_of("#15", "#16", "#14", "#17"), limit=100)
    assert [tokens for _, tokens in more["a"]["wrong"]] == [ids(t) for t in ("#14", "#15", "#16", "#17")], "FIFO of 4"
    assert list(more) == ["b", "a"], "the prompt just met is the newest"
    small = injection.remember(more, rows_of("#13", "#11", "#12", "#14"), limit=30)
    assert list(small) == ["a"], "the oldest prompt went"
    assert sum(len(t) for entry in small.values() for known in entry.values() for _, t in known) <= 30
    assert injection.remember(more, rows_of(*WRONG), limit=0) == {}


def test_truncated_and_unscored_rows_are_not_remembered():
    rows = rows_of("#13", "#11", "#12", "#14")
    rows.rollout.truncated[0] = True
    rows.correct[1] = np.nan
    memory = injection.remember({}, rows, limit=100)
    assert memory["a"]["right"] == [] and [t for _, t in memory["a"]["wrong"]] == [ids("#12"), ids("#14")]


def test_overwriting_leaves_padding_behind_a_shorter_completion():
    rows = rows_of(*WRONG)
    sampled = rows.rollout._replace(versions=np.where(rows.rollout.mask, 7, -1))
    chosen = [(injection.Candidate(2, 1, 1, Perturbed(ids("#13"), 0, 0)), np.zeros(LENGTH))]
    rollout, _ = injection.overwrite(sampled, chosen)
    assert rollout.mask[2].sum() == 4 and not rollout.mask[2, 8:].any() and not rollout.tokens[2, 8:].any()
    assert (rollout.versions[2] == -1).all(), "no version of the weights sampled it"
    untouched = [0, 1, 3]
    for new, old in zip(rollout, sampled, strict=True):
        np.testing.assert_array_equal(new[untouched], old[untouched])
    assert injection.overwrite(rows.rollout, chosen)[0].versions is None

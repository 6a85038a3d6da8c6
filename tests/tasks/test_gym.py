import re

import numpy as np
import pytest

from tapojax.tasks import gym, gym_levels, gym_solutions, gym_tokenizer

LEVELS = list(gym_levels.LEVELS)
TOKENIZER = gym_tokenizer.TOKENIZER


def shape(text):
    """A problem with its digits blanked out; families without brackets have one shape."""
    return re.sub("[0-9]", "d", text)


def test_level_2_is_the_quickstart_recipe():
    assert gym_solutions.solve("57+86?").text == "7+6+0=13,5+8+1=14#143"
    assert gym_solutions.solve("67+86?").text == "7+6+0=13,6+8+1=15#153"
    operands = {int(n) for i in range(3000) for n in gym.problem(2, 0, i)[:-1].split("+")}
    assert operands == set(range(10, 100)), "level 2 adds numbers of exactly two digits"


@pytest.mark.parametrize(
    ("problem", "solution"),
    [
        ("53-27?", "13-7-0=6,5-2-1=2#26"),
        ("1000-1?", "10-1-0=9,10-0-1=9,10-0-1=9,1-0-1=0#999"),
        ("88-84?", "8-4-0=4,8-8-0=0#4"),
        ("47+38+25?", "7+8+5+0=20,4+3+2+2=11#110"),
        ("5+123?", "5+3+0=8,0+2+0=2,0+1+0=1#128"),
        ("6*47?", "7*6+0=42,4*6+4=28#282"),
        ("12*30?", "2*0+0=0,1*0+0=0,12*0=0,2*3+0=6,1*3+0=3,12*30=360,0+0+0=0,0+6+0=6,0+3+0=3#360"),
        ("3+4*5-2?", "4*5=20,3+20=23,23-2=21#21"),
        ("2*((9-4)+3)?", "9-4=5,5+3=8,2*8=16#16"),
        ("(47+38)*6-129?", "7+8+0=15,4+3+1=8,47+38=85,5*6+0=30,8*6+3=51,85*6=510,10-9-0=1,11-2-1=8,5-1-1=3#381"),
    ],
)
def test_worked_solutions_by_hand(problem, solution):
    assert gym_solutions.solve(problem).text == solution


@pytest.mark.parametrize(
    "text",
    ["", "?", "7?", "3-5?", "3/5?", "2**3?", "-3+4?", "07+1?", "1*00?", "3(4)?", "()?", "1+2", "a+b?", "(" * 30 + "?"]
    + ["1+" * 40 + "1?", "1+2?\n"],
)
def test_texts_that_are_no_problem_are_named(text):
    with pytest.raises(ValueError, match="is not a problem of the gym"):
        gym_solutions.solve(text)


@pytest.mark.parametrize("level", LEVELS)
def test_answers_and_steps_agree_with_python(level):
    for i in range(200):
        problem = gym.problem(level, 1, i)
        solution = gym_solutions.solve(problem)
        assert int(solution.answer) == eval(problem[:-1]) >= 0
        for step in solution.steps:
            left, _, right = step.partition("=")
            assert eval(left) == int(right), f"{problem}: {step} is false"


@pytest.mark.parametrize("level", LEVELS)
def test_lengths_bound_every_problem_and_are_reached(level):
    longest = gym_levels.LEVELS[level]
    most = gym_levels.lengths(level)
    assert len(longest.longest_problem) == most[0]
    for i in range(200):
        problem = gym.problem(level, 2, i)
        assert len(TOKENIZER.encode(problem)) <= most[0]
        assert len(TOKENIZER.encode(gym_solutions.solve(problem).text)) <= most[1]
        if "(" not in longest.example and level != 13:
            assert shape(problem) == shape(longest.example) == shape(longest.longest_solution)


@pytest.mark.parametrize(
    ("level", "operator", "a", "b"),
    [
        (1, "+", (1, 10), (1, 10)),
        (2, "+", (10, 100), (10, 100)),
        (7, "-", (10, 100), (10, 100)),
        (11, "*", (10, 100), (1, 10)),
    ],
)
def test_lengths_are_exact_on_whole_problem_spaces(level, operator, a, b):
    problems = [f"{x}{operator}{y}?" for x in range(*a) for y in range(*b) if operator != "-" or x >= y]
    longest = max(len(gym_solutions.solve.__wrapped__(problem).text) for problem in problems)
    assert longest == gym_levels.lengths(level)[1]


def test_documented_table_is_the_ladder():
    rows = re.findall(r"^\| (\d+) +\| (.+?) +\| (\S+) +\| +(\d+) \| +(\d+) \|$", gym_levels.__doc__, re.MULTILINE)
    ladder = [
        (level, value.name, value.example, *gym_levels.lengths(level)) for level, value in gym_levels.LEVELS.items()
    ]
    assert [tuple(map(str, row)) for row in ladder] == rows


def test_levels_draw_what_they_say():
    assert all("(" not in gym.problem(13, 0, i) for i in range(100)), "a chain has no brackets"
    for level, operations in ((13, 3), (14, 4), (15, 6)):
        problems = [gym.problem(level, 0, i) for i in range(100)]
        assert {len(re.findall(r"[+*-]", problem)) for problem in problems} == {operations}
        steps = {len(gym_solutions.solve(problem).steps) for problem in problems}
        assert steps == {operations}, "every operation is mental arithmetic, so one step"
    assert all("(" in gym.problem(level, 0, i) for level in (14, 15, 17) for i in range(100))


@pytest.mark.parametrize("level", LEVELS)
def test_splits_are_disjoint_and_both_exist(level):
    train = {gym.problem(level, 0, i) for i in range(150)}
    heldout = {gym.problem(level, 0, i, split="heldout") for i in range(20)}
    assert heldout and train and not train & heldout
    assert not any(map(gym.held_out, train)) and all(map(gym.held_out, heldout))


def test_split_holds_out_a_tenth_and_ignores_operand_order():
    problems = [f"{a}+{b}?" for a in range(10, 100) for b in range(10, 100)]
    assert 0.07 < np.mean([gym.held_out(problem) for problem in problems]) < 0.13
    assert all(gym.held_out(f"{a}+{b}?") == gym.held_out(f"{b}+{a}?") for a in range(10, 60) for b in range(60, 90))


def test_a_level_too_small_to_split_is_named(monkeypatch):
    constant = gym_levels.Level("constant", lambda rng: "1+1", "1+1?", "1+1?", "1+1?")
    monkeypatch.setitem(gym_levels.LEVELS, 99, constant)
    missing = "train" if gym.held_out("1+1?") else "heldout"
    with pytest.raises(ValueError, match="level 99"):
        gym.problem(99, 0, 0, split=missing)


def test_source_is_a_deterministic_random_access_sequence():
    source = gym.source([2, 14], 100, 3)
    again = gym.source([2, 14], 100, 3)
    assert len(source) == 100
    assert [again[i] for i in reversed(range(100))][::-1] == list(source), "an example depends on its index alone"
    assert gym.source([2, 14], 7, 3)[5] == source[5], "and not on the size"
    assert source[-1] == source[99] and source[np.int64(4)] == source[4]
    assert [example["level"] for example in source] == [2, 14] * 50
    assert list(source) != list(gym.source([2, 14], 100, 4))
    with pytest.raises(IndexError):
        source[100]


def test_examples_have_their_keys_and_ids_name_problems():
    examples = list(gym.source([1], 400, 0))
    assert set(examples[0]) == {"id", "problem", "answer", "solution", "level"}
    assert all(example["solution"].endswith("#" + example["answer"]) for example in examples)
    assert len({e["id"] for e in examples}) == len({e["problem"] for e in examples})
    evaluation = gym.source([1], 50, 0, split="heldout")
    assert not {e["id"] for e in examples} & {e["id"] for e in evaluation}


def test_source_feeds_grain():
    grain = pytest.importorskip("grain")
    source = gym.source([2], 64, 0)
    dataset = grain.MapDataset.source(source).shuffle(seed=1)
    assert sorted(example["id"] for example in dataset) == sorted(example["id"] for example in source)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: gym.source([2, 99], 1, 0), "99"),
        (lambda: gym.source([], 1, 0), "levels"),
        (lambda: gym.source([2], 0, 0), "size=0"),
        (lambda: gym.source([2], 1, -1), "seed=-1"),
        (lambda: gym.source([2], 1, 0, split="test"), "'test'"),
        (lambda: gym.problem(0, 0, 0), "levels .0."),
        (lambda: gym_levels.lengths(99), "99"),
    ],
)
def test_mistakes_are_named(call, names):
    with pytest.raises(ValueError, match=names):
        call()


def test_demonstrations_have_the_recipe_shares():
    rng = np.random.default_rng(0)
    examples = list(gym.source([2], 4000, 0))
    texts = [gym.demonstration(example, rng, scratchpad=0.4, sloppiness=0.8) for example in examples]
    worked = np.array([text == e["solution"] for text, e in zip(texts, examples, strict=True)])
    honest = np.array([text == "#" + e["answer"] for text, e in zip(texts, examples, strict=True)])
    assert abs(worked.mean() - 0.4) < 0.03
    assert abs(honest.mean() - 0.6 * 0.2) < 0.02
    for text, example, other in zip(texts, examples, ~worked & ~honest, strict=True):
        if other:
            answer = "#" + example["answer"]
            assert len(text) == len(answer) and sum(map(str.__ne__, text, answer)) == 1, "one wrong digit"


def test_demonstration_knobs_at_their_ends():
    example = gym.source([17], 1, 0)[0]
    rng = np.random.default_rng(0)
    assert gym.demonstration(example, rng, scratchpad=1.0, sloppiness=1.0) == example["solution"]
    assert gym.demonstration(example, rng, scratchpad=0.0, sloppiness=0.0) == "#" + example["answer"]
    draws = [gym.demonstration(example, np.random.default_rng(7), scratchpad=0.4, sloppiness=0.8) for _ in range(2)]
    assert draws[0] == draws[1], "a demonstration is a function of the generator's state"

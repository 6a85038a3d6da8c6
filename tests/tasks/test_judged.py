"""A judge's verdicts reach the right rows, what cannot be judged is NaN with a reason, and one shape serves all."""

import jax
import numpy as np
import pytest

from tapojax.models import decoder
from tapojax.models.config import DecoderConfig
from tapojax.rollout import local
from tapojax.tasks import critiques, gym_checker, judged
from tapojax.tasks.arithmetic import arithmetic
from tapojax.tasks.gym_tokenizer import TOKENIZER
from tapojax.types import Engine, Rollout, Sampling

NAN = float("nan")
PROBLEM, CLEAN, FLAWED, WRONG = "57+86?", "7+6+0=13,5+8+1=14#143", "7+6+0=13,5+8+1=15#143", "7+6+0=13,5+8+1=14#153"
SAMPLING = Sampling(max_tokens=24, stop_token_ids=(TOKENIZER.eos_token_id,), pad_token_id=TOKENIZER.pad_token_id)


def saying(answer, calls=None):
    """An engine that criticises a prompt's text with answer(text), and writes down its calls."""

    def generate(weights, prompts, key, *, group_size, sampling):
        if calls is not None:
            calls.append((len(prompts.tokens), jax.random.key_data(key).tolist()))
        texts = [TOKENIZER.encode(answer(TOKENIZER.decode(ids))) for ids in prompts.tokens]
        length = sampling.max_tokens
        tokens = np.array([ids + [0] * (length - len(ids)) for ids in texts], np.int32)
        mask = np.array([[True] * len(ids) + [False] * (length - len(ids)) for ids in texts])
        zeros = np.zeros(tokens.shape, np.float32)
        rows = np.zeros(len(texts), np.int32)
        return Rollout(tokens, mask, zeros, zeros, rows, rows.astype(bool), rows)

    return Engine(load=lambda params, version: params, generate=generate)


def exact(text):
    """A perfect critic."""
    problem, solution = text[: text.index("?") + 1], text[text.index("?") + 1 : -1]
    return f"#{gym_checker.first_error(problem, solution)}"


def critic(answer=exact, *, calls=None, max_prompt_tokens=28, batch_rows=4):
    engine = saying(answer, calls)
    return judged.critic(engine, None, SAMPLING, max_prompt_tokens=max_prompt_tokens, batch_rows=batch_rows)


def rows(*completions):
    return [{"id": "a", "problem": PROBLEM, "answer": "143"}] * len(completions), list(completions)


def gym():
    return arithmetic(seed=0, max_prompt_tokens=8)


# ---- the judge


def test_a_perfect_critic_says_what_the_checker_says():
    verdicts, errors = critic()(*rows(CLEAN, FLAWED, "#143", "5+8+1=14#143", "7+6+0=12,5+8+1=14#143"))
    np.testing.assert_array_equal(verdicts, [0, 1, 0, 0, 1])
    assert errors == [None] * 5 and verdicts.dtype == np.float32


@pytest.mark.parametrize(
    ("completion", "critique", "said"),
    [
        (CLEAN, "7+6", "the judge gave no verdict: '7+6'"),
        (CLEAN, "#2", "the judge gave no verdict: '#2'"),  # out of range
        (CLEAN + "9", "#-1", "problem and solution have 29 tokens, the judge reads 28"),
        ("7+6;T#-1", "#-1", "contains ';'"),  # a solution that criticises itself
        ("7x6#143", "#-1", "character 'x' is not in the gym's vocabulary"),
    ],
)
def test_no_verdict_is_nan_and_says_why(completion, critique, said):
    verdicts, errors = critic(lambda text: critique)(*rows(completion, "7+6+0=13#143"))
    assert np.isnan(verdicts[0]) and said in errors[0]


def test_calls_have_one_shape_and_depend_on_the_solutions_alone():
    calls = []
    judge = critic(calls=calls, batch_rows=3)
    verdicts, _ = judge(*rows(*[CLEAN, FLAWED] * 4))
    np.testing.assert_array_equal(verdicts, [0, 1] * 4)
    assert [size for size, _ in calls] == [3, 3, 3]
    first = calls.copy()
    judge(*rows(*[CLEAN, FLAWED] * 4))
    assert calls[3:] == first, "the same draws, as after a resume"
    judge(*rows(FLAWED))
    assert calls[-1] not in first
    assert len(judge([], [])[0]) == 0 and len(calls) == 7, "nothing to judge, nobody asked"


def test_a_real_engine_compiles_once_and_answers_alike():
    config = DecoderConfig(len(TOKENIZER), 16, 24, 1, 2, 1, 8)
    engine = local.local_engine(config, max_prompt_tokens=28)
    weights = engine.load(decoder.init(config, jax.random.key(0)), 0)
    judge = judged.critic(engine, weights, SAMPLING, max_prompt_tokens=28, batch_rows=2)
    first = judge(*rows(CLEAN, FLAWED, CLEAN))
    compiled = local.sample._cache_size()
    again = judge(*rows(CLEAN, FLAWED, CLEAN))
    assert local.sample._cache_size() == compiled, "another batch of solutions compiled the sampler again"
    np.testing.assert_array_equal(first[0], again[0])
    assert first[1] == again[1] and all("no verdict" in error for error in first[1]), "it was never trained"


# ---- the task


def test_only_right_rows_are_judged_and_the_exact_flag_stays_beside():
    asked = []

    def judge(examples, completions):
        asked.extend(completions)
        return np.array([1, 0, 0, NAN], np.float32), [None, None, None, "too hard"]

    scores, errors = judged.judged(gym(), judge).score(*rows(CLEAN, WRONG, FLAWED, CLEAN, FLAWED))
    assert asked == [CLEAN, FLAWED, CLEAN, FLAWED] and errors == [None] * 4 + ["too hard"]
    expected = {
        "correct": [1, 0, 1, 1, 1],
        "flawed": [1, 0, 0, 0, NAN],
        "flawed_exact": [0, 0, 1, 0, 1],
        "judge_precision": [0, NAN, NAN, NAN, NAN],  # 1 where it says flawed and is right
        "judge_recall": [NAN, NAN, 0, NAN, NAN],  # 1 where a flawed row is found
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(scores[name], values, err_msg=name)
    assert {"process", "format"} <= scores.keys(), "the task's own channels stay"


def test_means_of_the_two_channels_are_precision_and_recall():
    completions = [CLEAN] * 5 + [FLAWED] * 4
    said = np.array([1, 0, 0, 0, NAN, 1, 1, 0, NAN], np.float32)
    scores, _ = judged.judged(gym(), lambda *_: (said, [None] * 9)).score(*rows(*completions))
    assert np.nanmean(scores["judge_precision"]) == pytest.approx(2 / 3)  # of 3 called, 2 flawed
    assert np.nanmean(scores["judge_recall"]) == pytest.approx(2 / 3)  # of 3 flawed with a verdict, 2 called


def test_a_perfect_critic_changes_nothing():
    completions = [CLEAN, FLAWED, WRONG, "#143", "#153", "7+6+0=13,5+8+1=14"]
    scores, errors = judged.judged(gym(), critic()).score(*rows(*completions))
    np.testing.assert_array_equal(scores["flawed"], gym().score(*rows(*completions))[0]["flawed"])
    np.testing.assert_array_equal(scores["flawed"], scores["flawed_exact"])
    assert errors == [None] * 6


def test_rows_that_the_task_could_not_score_are_not_judged_and_keep_their_reason():
    def score(examples, completions):
        return {"correct": np.array([NAN, 1], np.float32)}, ["killed", None]

    scores, errors = judged.judged(gym()._replace(score=score), critic()).score(*rows(CLEAN, FLAWED))
    np.testing.assert_array_equal(scores["flawed"], [NAN, 1])
    assert errors == ["killed", None] and scores.keys() == {"correct", "flawed"}, "no exact flag, no quality"


def test_the_critic_reads_what_the_task_critiques_writes():
    built = critiques.critiques(seed=0, max_prompt_tokens=28)
    texts = []
    judge = critic(lambda text: texts.append(text) or "#-1", batch_rows=1)
    row = built.train[1]
    judge([{"id": "a", "problem": row["gym"]}], [row["solution"]])
    assert texts == [row["problem"]] == [TOKENIZER.decode(built.prompt(row))]

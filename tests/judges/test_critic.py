"""A trained critic as judge: its verdicts, what cannot be judged is NaN with a reason, and one shape serves all."""

import json

import jax
import numpy as np
import pytest

from tapojax import sharding
from tapojax.judges import critic as critics
from tapojax.models import decoder
from tapojax.models.config import DecoderConfig
from tapojax.rollout import local
from tapojax.tasks import critique_files, critiques, gym_checker
from tapojax.tasks.arithmetic import arithmetic
from tapojax.tasks.gym_tokenizer import TOKENIZER
from tapojax.types import Engine, Rollout, Sampling
from tests.tasks.test_files import save_tokenizer

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


def critic(answer=exact, *, calls=None, max_prompt_tokens=28, batch_rows=4, engine=None, weights=None):
    task = critiques.critiques(seed=0, max_prompt_tokens=28)
    engine, mesh = engine or saying(answer, calls), sharding.make_mesh(data=1, fsdp=1, tensor=1, context=1)
    run = critics.Trained(engine, weights, SAMPLING, max_prompt_tokens, task, "critiques", mesh)
    return critics.critic(trained=lambda workdir: run, batch_rows=batch_rows)


def rows(*completions):
    return [{"id": "a", "problem": PROBLEM, "answer": "143"}] * len(completions), list(completions)


def gym():
    return arithmetic(seed=0, max_prompt_tokens=8)


# ---- the judge


def test_a_perfect_critic_says_what_the_checker_says():
    verdicts, errors, _ = critic()(*rows(CLEAN, FLAWED, "#143", "5+8+1=14#143", "7+6+0=12,5+8+1=14#143"))
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
    verdicts, errors, _ = critic(lambda text: critique)(*rows(completion, "7+6+0=13#143"))
    assert np.isnan(verdicts[0]) and said in errors[0]


def test_calls_have_one_shape_and_depend_on_the_solutions_alone():
    calls = []
    judge = critic(calls=calls, batch_rows=3)
    verdicts = judge(*rows(*[CLEAN, FLAWED] * 4))
    np.testing.assert_array_equal(verdicts.values, [0, 1] * 4)
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
    judge = critic(engine=engine, weights=weights, batch_rows=2)
    first = judge(*rows(CLEAN, FLAWED, CLEAN))
    compiled = local.sample._cache_size()
    again = judge(*rows(CLEAN, FLAWED, CLEAN))
    assert local.sample._cache_size() == compiled, "another batch of solutions compiled the sampler again"
    np.testing.assert_array_equal(first[0], again[0])
    assert first[1] == again[1] and all("no verdict" in error for error in first[1]), "it was never trained"


def test_the_critic_reads_what_the_task_critiques_writes():
    built = critiques.critiques(seed=0, max_prompt_tokens=28)
    texts = []
    judge = critic(lambda text: texts.append(text) or "#-1", batch_rows=1)
    row = built.train[1]
    judge([{"id": "a", "problem": row["gym"]}], [row["solution"]])
    assert texts == [row["problem"]] == [TOKENIZER.decode(built.prompt(row))]


# ---- what it takes, and critics of text


def test_it_says_what_a_critique_took():
    verdicts = critic(lambda text: "7+6+0=13T#-1")(*rows(CLEAN, "#143", "7x6#143"))
    assert verdicts.costs["tokens"].tolist() == pytest.approx([12, NAN, NAN], nan_ok=True)
    assert verdicts.costs["seconds"][0] > 0 and np.isnan(verdicts.costs["seconds"][1:]).all()
    assert critic()([], []).costs.keys() == verdicts.costs.keys(), "the channels do not depend on the rows"


def test_a_critic_of_text_is_asked_in_the_words_of_its_training(tmp_path):
    """A run of the task critique_files: steps are paragraphs, the verdict is in a box."""
    save_tokenizer(tmp_path)
    row = {"problem": "1+1?", "answer": "2", "steps": ["1+1 is 2", "so it is 2"], "label": 0}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    task = critique_files.critique_files(
        seed=0,
        max_prompt_tokens=4096,
        tokenizer_path=str(tmp_path),
        train_path=str(tmp_path / "rows.jsonl"),
    )
    prompts = []

    def generate(weights, given, key, *, group_size, sampling):
        prompts.extend(given.tokens)
        text = "The first is wrong.\\boxed{0}" if len(prompts) == 1 else "\\boxed{2}"
        ids = task.tokenizer.encode(text)
        zeros = np.zeros((1, len(ids)), np.float32)
        return Rollout(
            np.array([ids]), np.ones((1, len(ids)), bool), zeros, zeros, zeros[:, 0], zeros[:, 0], zeros[:, 0]
        )

    engine, mesh = Engine(load=None, generate=generate), sharding.make_mesh(data=1, fsdp=1, tensor=1, context=1)
    run = critics.Trained(engine, None, SAMPLING, 4096, task, "critique_files", mesh)
    judge = critics.critic(trained=lambda workdir: run, batch_rows=1)
    examples = [{"id": "a", "problem": "1+1?", "answer": "2"}] * 4
    texts = [
        "1+1 is 2\n \n\nso it is 2\n",
        "<think>hm\n\nhm</think>1+1 is 2\n\nso it is 2",
        "<think>hm</think>",
        "a</step 0>",
    ]
    values, errors, _ = judge(examples, texts)
    assert prompts == [task.prompt(task.train[0])] * 2, "not the words that it was trained on"
    assert values.tolist() == pytest.approx([1, NAN, NAN, NAN], nan_ok=True) and errors[0] is None
    for error, said in zip(
        errors[1:], ("no verdict: ", "no text beside its thoughts", "contains '</step '"), strict=True
    ):
        assert said in error


def test_a_batch_without_rows_is_refused():
    with pytest.raises(ValueError, match="judge.batch_rows=0"):
        critics.critic(trained=lambda workdir: None, batch_rows=0)

"""Problems from files meet a tokenizer, its chat template and the verifier."""

import gzip
import itertools
import json

import numpy as np
import pytest
import tokenizers
import transformers
from ml_collections import ConfigDict

from launch import sft
from tapojax.algorithms.rtpo import rtpo
from tapojax.tasks import order
from tapojax.tasks.files import files
from tapojax.types import Prompts

TEMPLATE = (
    "{%- if messages[0].role != 'system' %}"
    "{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
ROWS = [
    {"question": "Tom has 3 apples and buys 4. How many?", "final": "7", "why": "3+4 = 7.", "id": "gsm/0"},
    {"question": "A rope of 12 m is cut in 4. How long is each?", "final": 3, "why": "12/4 = 3.", "id": "gsm/1"},
    {"question": "Half of a half?", "final": "\\frac{1}{4}", "why": None, "id": "gsm/2"},
]
KEYS = {"problem_key": "question", "answer_key": "final", "solution_key": "why"}


def save_tokenizer(folder, template=None, **kwargs):
    """Bytes as tokens, ChatML's special tokens, and a few merges; `template` says what encoding adds to a text."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    model.train_from_iterator(["Please reason step by step. The answer is \\boxed{42}."] * 20, trainer)
    if template:
        special_tokens = [(kwargs["bos_token"], model.token_to_id(kwargs["bos_token"]))]
        model.post_processor = tokenizers.processors.TemplateProcessing(template, special_tokens=special_tokens)
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": TEMPLATE} | kwargs
    given = {name: value for name, value in special.items() if value is not None}
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, **given).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def rows_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


@pytest.fixture(scope="module")
def task(tokenizer_path, rows_path):
    return make(tokenizer_path, rows_path, **KEYS)


def make(tokenizer_path, train_path="", *, max_prompt_tokens=400, **kwargs):
    return files(
        seed=0, max_prompt_tokens=max_prompt_tokens, tokenizer_path=tokenizer_path, train_path=train_path, **kwargs
    )


# ---- rows


def test_rows_are_read_by_their_column_names(task):
    assert [dict(example) for example in task.train] == [
        {"id": "gsm/0", "problem": ROWS[0]["question"], "answer": "7", "solution": "3+4 = 7."},
        {"id": "gsm/1", "problem": ROWS[1]["question"], "answer": "3", "solution": "12/4 = 3."},
        {"id": "gsm/2", "problem": "Half of a half?", "answer": "\\frac{1}{4}", "solution": ""},
    ]
    assert list(task.evaluation) == []


def test_evaluation_rows_come_from_their_own_file(tokenizer_path, rows_path, tmp_path):
    path = tmp_path / "held_out.jsonl"
    path.write_text('{"question": "0?", "final": 0}\n')
    task = make(tokenizer_path, rows_path, evaluation_path=str(path), **KEYS)
    assert len(task.train) == 3
    (example,) = task.evaluation
    assert example == {"id": "held_out.jsonl/0", "problem": "0?", "answer": "0", "solution": ""}, "0 is an answer"


def test_a_missing_column_is_named(tokenizer_path, rows_path):
    with pytest.raises(ValueError, match=r"rows.jsonl, row 1: no value for \['answer'\]; it has \['final'"):
        make(tokenizer_path, rows_path)


@pytest.mark.parametrize("answer", [None, ""])
def test_a_row_without_an_answer_is_named(tokenizer_path, tmp_path, answer):
    path = tmp_path / "rows.jsonl"
    rows = [{"problem": "1?", "answer": "1"}, {"problem": "2?", "answer": answer}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"rows.jsonl, row 2: no value for \['answer'\]"):
        make(tokenizer_path, str(path))


# ---- prompts


def test_the_prompt_ends_with_the_open_turn_of_the_assistant(task):
    tokens = task.prompt(task.train[0])
    assert all(isinstance(token, int) for token in tokens), "plain numbers, no encoding object"
    assert task.tokenizer.decode(tokens) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nTom has 3 apples and buys 4. How many?\n\n"
        "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokens.count(task.tokenizer.eos_token_id) == 2, "special tokens are tokens, not their letters"


def test_without_chat_the_prompt_is_the_template(tokenizer_path, rows_path):
    task = make(tokenizer_path, rows_path, chat=False, template="Q: {problem}\nA:", **KEYS)
    assert task.tokenizer.decode(task.prompt(task.train[2])) == "Q: Half of a half?\nA:"


@pytest.mark.parametrize(
    "template", ["Think.", "{problem} \\boxed{}", "{question}", "{problem.x}", "{problem} {", "{{problem}}"]
)
def test_a_template_without_the_problem_is_refused(template):
    with pytest.raises(
        ValueError, match=r"task.template=.* needs \{problem\}; write other braces twice, \\boxed\{\{\}\}"
    ):
        make("", template=template)


def test_an_overlong_prompt_stops_the_run_or_is_dropped(tokenizer_path, rows_path, task):
    lengths = [len(task.prompt(example)) for example in task.train]
    budget = sorted(lengths)[1]
    message = rf"1 of 3 prompts exceed sampling.max_prompt_tokens={budget}, the longest \(gsm/1\) has {max(lengths)}"
    with pytest.raises(ValueError, match=message):
        make(tokenizer_path, rows_path, max_prompt_tokens=budget, **KEYS)
    kept = make(tokenizer_path, rows_path, max_prompt_tokens=budget, overlong_prompts="drop", **KEYS).train
    assert [example["id"] for example in kept] == ["gsm/0", "gsm/2"], "a prompt of exactly the budget stays"
    with pytest.raises(ValueError, match="task.overlong_prompts='cut': choose 'error' or 'drop'"):
        make(tokenizer_path, rows_path, overlong_prompts="cut", **KEYS)


# ---- tokenizers


def test_a_tokenizer_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ValueError, match="task.tokenizer_path is empty"):
        make("")
    with pytest.raises(ValueError, match="no tokenizer can be loaded from .*nowhere"):
        make(str(tmp_path / "nowhere"))


def test_a_tokenizer_without_end_token_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no end-of-sequence token"):
        make(save_tokenizer(tmp_path, eos_token=None))


def test_the_end_token_pads_where_there_is_no_other(tmp_path):
    tokenizer = make(save_tokenizer(tmp_path, pad_token=None)).tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id is not None


def test_a_tokenizer_without_chat_template_is_an_error_that_says_so(tmp_path, rows_path):
    path = save_tokenizer(tmp_path, chat_template=None)
    with pytest.raises(ValueError, match="chat.template"):
        make(path, rows_path, **KEYS)
    assert len(make(path, rows_path, chat=False, **KEYS).train) == 3


# ---- scores


def test_completions_are_graded_by_the_verifier(task):
    a, b, c = task.train
    examples = [a, a, a, b, c, c]
    completions = [
        "3+4 = 7, so \\boxed{7}.",
        "3+4 = 8, so \\boxed{8}.",
        "I do not know.",
        "\\boxed{3.0}",
        "\\boxed{0.25}",
        "\\boxed{\\frac{2}{4}}",
    ]
    scores, errors = task.score(examples, completions)
    assert scores.keys() == {"correct"} and scores["correct"].dtype == np.float32
    np.testing.assert_array_equal(scores["correct"], [1, 0, 0, 1, 1, 0])
    assert list(errors) == [None] * 6
    assert task.answer(completions[0]) == "7" and task.answer(completions[2]) is None


def test_an_answer_that_cannot_be_graded_is_nan_with_its_error(task):
    """A gold answer of a thousand words has no verdict: an error, never a 0."""
    broken = {**task.train[0], "answer": "(" * 1200}
    scores, errors = task.score([broken, task.train[0]], ["\\boxed{7}", "\\boxed{7}"])
    np.testing.assert_array_equal(scores["correct"], [np.nan, 1])
    assert "gold answer" in errors[0] and errors[1] is None


def test_demonstrations_end_in_the_boxed_answer(task):
    rng = np.random.default_rng(0)
    demonstration = task.demonstration(task.train[0], rng)
    assert demonstration == "3+4 = 7.\n\\boxed{7}" and task.answer(demonstration) == "7"
    with pytest.raises(ValueError, match="example 'gsm/2' has no solution to imitate"):
        task.demonstration(task.train[2], rng)


def test_solutions_come_apart_into_reasoning_and_closing(task):
    assert task.solution(task.train[0]) == ("3+4 = 7.", "\n\\boxed{7}")
    assert task.solution(task.train[2]) is None
    published = {**task.train[0], "solution": "3+4 = <<3+4=7>>7.\n#### 7"}
    assert task.solution(published) == task.solution(task.train[0])
    assert task.demonstration(published, None) == task.demonstration(task.train[0], None), "one format for both"


def test_a_closed_hint_is_a_finished_turn_of_the_assistant(task, tokenizer_path, rows_path):
    tokens = task.closed_hint(task.train[0], task.tokenizer.encode("3+4"))
    said = task.tokenizer.decode(tokens).removeprefix(task.tokenizer.decode(task.prompt(task.train[0])))
    assert said == "3+4<|im_end|>\n<|im_start|>assistant\n"
    assert make(tokenizer_path, rows_path, chat=False, **KEYS).closed_hint is None, "without turns there is none"


def test_files_are_mixed_by_weight(tokenizer_path, rows_path, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(ROWS[0] | {"pass_rate": 0.25}) + "\n")
    plain = make(tokenizer_path, f"{rows_path}, {other}", **KEYS).train
    ids = [f"{rows_path}:gsm/{i}" for i in range(3)] + [f"{other}:gsm/0"]
    assert [example["id"] for example in plain] == ids, "the same id in two files is two problems"
    assert [example.get("pass_rate") for example in plain] == [None, None, None, 0.25]
    mixed = make(tokenizer_path, f"{rows_path}:1,{other}:2", **KEYS).train
    assert [*mixed] == plain
    drawn = [example["id"] for example in next(order.batches(mixed, batch_size=3, seed=0))]
    assert drawn.count(ids[-1]) == 2


@pytest.mark.parametrize("rate", [1.5, -0.1, "half", [0.5]])
def test_a_pass_rate_that_is_none_is_named(tokenizer_path, tmp_path, rate):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0] | {"pass_rate": rate}) + "\n")
    with pytest.raises(ValueError, match=r"rows.jsonl, row 1: expected pass_rate to be a share of right answers"):
        make(tokenizer_path, str(path), **KEYS)


def test_demonstrations_and_hints_have_no_begin_token(tmp_path, rows_path):
    """Such as Llama's: it opens a prompt, in the middle of a row it would be noise."""
    bos = "<|endoftext|>"
    path = save_tokenizer(tmp_path, bos_token=bos, template=f"{bos} $A")
    task = make(path, rows_path, chat=False, max_prompt_tokens=500, **KEYS)
    begin = task.tokenizer.bos_token_id
    prompt = task.prompt(task.train[0])
    assert prompt[0] == begin and begin not in prompt[1:]
    budget = ConfigDict({"max_prompt_tokens": 500, "max_tokens": 100})
    tokens, mask = sft.demonstrations([task.train[0]], task, task.demonstration, None, budget)
    assert begin not in tokens[mask]
    algorithm = rtpo(group_size=2, max_tokens=100, steps=10, task=task)
    (hinted,) = algorithm.prompts(Prompts([task.train[0]], [prompt]), 0).tokens
    assert task.tokenizer.decode(hinted[len(prompt) :]) == "3+4 = 7." and hinted[: len(prompt)] == prompt


def test_real_problems_and_their_solutions(shared, tokenizer_path, tmp_path):
    """The first 40 of GSM8K: each demonstration is graded right, another problem's answer wrong."""
    path = tmp_path / "gsm8k.jsonl"
    with gzip.open(shared / "gsm8k_train.jsonl.gz", "rt") as source:
        path.write_text("".join(itertools.islice(source, 40)))
    task = make(tokenizer_path, str(path), max_prompt_tokens=2000)
    assert len(task.train) == 40
    demonstrations = [task.demonstration(example, None) for example in task.train]
    scores, errors = task.score(task.train, demonstrations)
    assert scores["correct"].all() and set(errors) == {None}
    others = [example for example in task.train if example["answer"] != task.train[0]["answer"]]
    scores, _ = task.score([task.train[0]] * len(others), [task.demonstration(example, None) for example in others])
    assert not scores["correct"].any()

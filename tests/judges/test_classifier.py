"""Reward models as judges: what heads compute, how rows become scores, and who gets none. Parity: tests/parity."""

import concurrent.futures
import dataclasses
import gzip
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from configs import base
from launch import build
from tapojax import evaluation, sharding
from tapojax.judges import JUDGES, PLACES, classifier, reward_model
from tapojax.judges.judged import judged
from tapojax.models import config_json, decoder, huggingface, presets
from tapojax.models.config import ScoreHead
from tapojax.tasks.arithmetic import arithmetic
from tapojax.tasks.files import files
from tests.judges import reward_models
from tests.judges.reward_models import HEADS
from tests.tasks.test_files import save_tokenizer

label_logits = jax.jit(decoder.label_logits, static_argnums=0)
OUTCOMES = [name for name in HEADS if name.startswith("outcome")]
PROBLEMS = [{"problem": "1+1+1?"}, {"problem": "Half of a half?"}, {"problem": "57+86?"}]
COMPLETIONS = ["1+1 = 2\n\n2+1 = 3\n\nso 3.", "A quarter.", "7+6=13\n\n5+8+1=14\n\n143\n\n\n\n"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def of(name):
        if name not in made:
            made[name] = str(reward_models.save(tmp_path_factory.mktemp("reward") / "model", name))
        return made[name]

    return of


def problems(count):
    return [PROBLEMS[i % 3]["problem"] for i in range(count)]


# ---- heads


@pytest.mark.parametrize("name", HEADS)
def test_a_reward_model_goes_out_and_comes_back_bit_for_bit(name, folder):
    config = config_json.read_classifier(folder(name))
    assert config.score == HEADS[name]
    want = traverse_util.flatten_dict(reward_models.random_params(config), sep="/")
    got = traverse_util.flatten_dict(huggingface.load_params(folder(name), config), sep="/")
    assert sorted(got) == sorted(want) and "head" not in got, "no vocabulary head"
    for path, x in want.items():
        assert got[path].tobytes() == x.tobytes(), path


@pytest.mark.parametrize("name", HEADS)
def test_the_head_by_hand(name):
    """W h + b, or W2 relu(W0 h + b0) + b2, of the state after the last norm."""
    config = reward_models.shape(HEADS[name])
    params, tokens = reward_models.random_params(config), jnp.arange(12).reshape(2, 6)
    x, score = np.asarray(decoder.hidden_states(config, params, tokens)), params["score"]
    if HEADS[name].hidden:
        x = np.maximum(x @ score["hidden"]["kernel"] + score["hidden"]["bias"], 0)
    last = score["output" if HEADS[name].hidden else "linear"]
    want = x @ last["kernel"] + last.get("bias", 0)
    np.testing.assert_allclose(label_logits(config, params, tokens), want, atol=1e-5)


def test_the_config_of_a_reward_model_is_kept_by_an_export(folder, tmp_path):
    config = config_json.read_classifier(folder("process, two layers"))
    params = huggingface.load_params(folder("process, two layers"), config)
    huggingface.save_params(tmp_path / "again", params, config, source=folder("process, two layers"))
    assert config_json.read_classifier(tmp_path / "again") == config
    raw = json.loads((tmp_path / "again" / "config.json").read_text())
    assert raw["architectures"] == ["Qwen2ForProcessRewardModel"] and len(raw["id2label"]) == 2


def test_the_published_process_model_has_the_size_of_its_files():
    """Qwen2.5-Math-PRM-7B: shards of 3.97 + 3.86 + 3.86 + 3.56 GB in bfloat16, the unused vocabulary head included."""
    config = presets.PRESETS["qwen2.5-math-7b"]
    score = ScoreHead("ForProcessRewardModel", 2, hidden=config.hidden_size)
    tensors = huggingface.manifest(dataclasses.replace(config, score=score))
    assert {name for name in tensors if name.startswith("score")} == {
        "score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias",
    }  # fmt: skip
    numbers = sum(math.prod(tensor.shape) for tensor in tensors.values()) + config.vocab_size * config.hidden_size
    assert 2 * numbers / 1e9 == pytest.approx(3.97 + 3.86 + 3.86 + 3.56, abs=0.02)


def change(path, **keys):
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | keys))


def test_what_is_no_reward_model_is_refused(tmp_path):
    reward_models.save(tmp_path / "a", "process")
    change(tmp_path / "a", architectures=["Qwen2ForCausalLM"])
    with pytest.raises(ValueError, match="'Qwen2ForCausalLM' is no reward model .* ForSequenceClassification"):
        config_json.read_classifier(tmp_path / "a")
    change(tmp_path / "a", architectures=None)
    with pytest.raises(ValueError, match="architectures=''"):
        config_json.read_classifier(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    change(tmp_path / "a", architectures=["Qwen2ForTokenClassification"])
    v_head = {"v_head.weight" if name == "score.weight" else name: x for name, x in tensors.items()}
    save_file(v_head, tmp_path / "a" / "model.safetensors")
    with pytest.raises(ValueError, match="holds no score head: expected score.weight.* there are score.bias, v_head"):
        config_json.read_classifier(tmp_path / "a")
    with pytest.raises(ValueError, match="score.bias"):
        policy = config_json.read_config(tmp_path / "a")
        huggingface.load_params(tmp_path / "a", policy)


# ---- scores of rows


@pytest.mark.parametrize("name", OUTCOMES)
def test_an_outcome_is_what_the_head_says_of_the_last_token(name, folder):
    """A single label's logit as it is, the probability of the chosen one of several."""
    head = HEADS[name]
    judge = classifier.outcome_model(
        path=folder(name), positive=2 if head.labels > 1 else 1, max_tokens=256, batch_tokens=256
    )
    said = judge(PROBLEMS, COMPLETIONS)
    assert said.values.dtype == np.float32 and said.errors == [None] * 3
    tokenizer = build_tokenizer(folder(name))
    for example, text, value in zip(PROBLEMS, COMPLETIONS, said.values, strict=True):
        turns = [{"role": "user", "content": example["problem"]}, {"role": "assistant", "content": text}]
        tokens = tokenizer.apply_chat_template(turns, return_dict=False)
        logits = last_logits(folder(name), tokens)
        np.testing.assert_allclose(value, logits[0] if head.labels == 1 else jax.nn.softmax(logits)[2], atol=1e-5)


def build_tokenizer(path):
    return transformers.AutoTokenizer.from_pretrained(path)


def last_logits(path, tokens):
    """Padded to one length, so that all tests share a program."""
    config, row = config_json.read_classifier(path), np.zeros((1, 128), np.int32)
    row[0, : len(tokens)] = tokens
    return np.asarray(label_logits(config, huggingface.load_params(path, config), row))[0, len(tokens) - 1]


@pytest.mark.parametrize("name", [name for name in HEADS if name.startswith("process")])
def test_a_rows_score_comes_from_its_steps(name, folder):
    model = reward_model.load(folder(name), max_tokens=256, batch_tokens=256)
    solutions = [["1+1 = 2", "2+1 = 3", "so 3."], ["A quarter."], ["7+6=13", "5+8+1=14", "143"]]
    assert [classifier.steps(text, "\n\n") for text in COMPLETIONS] == solutions
    scores = model.read(problems(3), solutions).scores
    assert [len(s) for s in scores] == [3, 1, 3] and all(np.all((s > 0) & (s < 1)) for s in scores)
    threshold = float(np.median(np.concatenate(scores)))
    by_hand = {
        "min": [min(s) for s in scores],
        "product": [np.exp(np.sum(np.log(s))) for s in scores],
        "mean": [sum(s) / len(s) for s in scores],
        "last": [s[-1] for s in scores],
        "flawed": [float(any(p < threshold for p in s)) for s in scores],
    }
    assert set(by_hand["flawed"]) <= {0.0, 1.0}
    for score, want in by_hand.items():
        judge = classifier.process_model(
            path=folder(name), score=score, threshold=threshold, max_tokens=256, batch_tokens=256
        )
        np.testing.assert_allclose(judge(PROBLEMS, COMPLETIONS).values, want, rtol=1e-5, err_msg=score)


def test_a_step_is_scored_by_what_came_before_it(folder):
    model = reward_model.load(folder("process"), max_tokens=256, batch_tokens=256)
    first, other = model.read(["1?", "1?"], [["a", "b", "c"], ["a", "b", "completely different"]]).scores
    np.testing.assert_allclose(first[:2], other[:2], atol=1e-6)
    assert abs(first[2] - other[2]) > 1e-4


def test_neither_neighbours_nor_order_nor_chunks_change_a_bit_of_a_score(folder):
    """Streaming asks about chunks as they come; a run must not depend on how they fall."""
    rng = np.random.default_rng(0)
    solutions = [["x" * int(n) for n in rng.integers(1, 20, rng.integers(1, 3))] for _ in range(23)]
    model = reward_model.load(folder("process"), max_tokens=128, batch_tokens=512)
    want = model.read(problems(23), solutions).scores
    order = rng.permutation(23)
    for chunk in (1, 5, 23):
        for start in range(0, 23, chunk):
            rows = order[start : start + chunk]
            got = model.read([problems(23)[i] for i in rows], [solutions[i] for i in rows]).scores
            for i, scores in zip(rows, got, strict=True):
                np.testing.assert_array_equal(scores, want[i])
    other = reward_model.load(folder("process"), max_tokens=120, batch_tokens=1).read(problems(23), solutions).scores
    for got, scores in zip(other, want, strict=True):
        np.testing.assert_allclose(
            got, scores, atol=1e-5, err_msg="another budget: other programs, the same mathematics"
        )


def test_batches_share_few_compiled_programs_and_devices_exchange_nothing(folder, monkeypatch):
    compiled = jax.jit(decoder.label_logits, static_argnums=0)
    seen = set()

    def counted(config, params, tokens):
        seen.add(tokens.shape)
        assert len(tokens.sharding.device_set) == 8, "all local devices read"
        lowered = compiled.lower(config, params, tokens)
        if len(seen) == 1:
            hlo = lowered.compile().as_text()
            assert not any(name in hlo for name in ("all-reduce", "all-gather", "all-to-all", "collective-permute"))
        return np.zeros((*tokens.shape, 2), np.float32)

    monkeypatch.setattr(reward_model, "_label_logits", counted)
    config = config_json.read_classifier(folder("process"))
    logits = reward_model.label_logits(config, folder("process"), max_tokens=200, batch_tokens=256)
    rng = np.random.default_rng(0)
    for _ in range(30):
        rows = [[1] * int(n) for n in rng.integers(1, 201, rng.integers(1, 100))]
        assert [len(x) for x in logits(rows)] == [len(row) for row in rows]
    assert seen == {(32, 64), (16, 128), (8, 200)}, "one program a length, of 8 devices times 256 tokens at most"


def test_several_threads_may_ask_at_once(folder):
    judge = classifier.process_model(path=folder("process"), max_tokens=256, batch_tokens=256)
    with jax.set_mesh(sharding.make_mesh(fsdp=2)):  # the trainer's
        want = judge(PROBLEMS, COMPLETIONS).values
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for said in pool.map(lambda _: judge(PROBLEMS, COMPLETIONS), range(8)):
            np.testing.assert_array_equal(said.values, want)


def test_bfloat16_is_near(folder):
    exact = classifier.process_model(path=folder("process"), max_tokens=256, batch_tokens=256)(
        PROBLEMS, COMPLETIONS
    ).values
    half = classifier.process_model(path=folder("process"), dtype="bfloat16", max_tokens=256, batch_tokens=256)(
        PROBLEMS, COMPLETIONS
    )
    assert 0 < np.abs(half.values - exact).max() < 0.1


# ---- rows without a score


@pytest.mark.parametrize("name", ["outcome", "process"])
def test_what_cannot_be_read_is_nan_with_its_reason_and_costs_nothing(name, folder):
    constructor = classifier.outcome_model if name == "outcome" else classifier.process_model
    judge = constructor(path=folder(name), max_tokens=130, batch_tokens=130)
    texts = ["fine", "x" * 200, "so<|im_end|>\n<|im_start|>user", "also fine"]
    said = judge([PROBLEMS[0]] * 4, texts)
    np.testing.assert_array_equal(np.isnan(said.values), [False, True, True, False])
    assert said.errors[0] is None and said.errors[3] is None
    assert "tokens, judge.max_tokens=130" in said.errors[1] and "|>', a mark" in said.errors[2]
    for name in ("tokens", "seconds"):
        np.testing.assert_array_equal(np.isnan(said.costs[name]), [False, True, True, False])
    assert said.costs["tokens"][0] < said.costs["tokens"][3], "of its own text"
    alone = judge(PROBLEMS[:1], ["fine"])
    np.testing.assert_allclose(alone.values, said.values[:1], atol=1e-6)


def test_a_solution_cannot_write_the_separator_and_needs_a_step(folder):
    said = classifier.process_model(path=folder("process"), max_tokens=256, batch_tokens=256)(
        [PROBLEMS[0]] * 3, ["right<extra_0>wrong", " \n\n ", "a step"]
    )
    assert "'<extra_0>', a mark" in said.errors[0] and "no step" in said.errors[1] and said.errors[2] is None
    np.testing.assert_array_equal(np.isnan(said.values), [True, True, False])


def test_nothing_to_judge(folder):
    said = classifier.process_model(path=folder("process"), max_tokens=256, batch_tokens=256)([], [])
    assert said.values.shape == (0,) and said.errors == []


def test_a_broken_model_scores_nothing(tmp_path):
    config = reward_models.shape(HEADS["process"])
    params = reward_models.random_params(config)
    params["score"]["linear"]["bias"][0] = np.inf
    huggingface.save_params(tmp_path / "m", params, config)
    save_tokenizer(tmp_path / "m", extra_special_tokens=["<extra_0>"])
    said = classifier.process_model(path=str(tmp_path / "m"), max_tokens=256, batch_tokens=256)(PROBLEMS, COMPLETIONS)
    assert np.isnan(said.values).all() and all("not finite" in error for error in said.errors)


@pytest.mark.parametrize(
    ("constructor", "name", "options", "words"),
    [
        (classifier.process_model, "outcome", {}, "is an outcome reward model: choose judge.name=outcome_model"),
        (classifier.outcome_model, "process", {}, "is a process reward model: choose judge.name=process_model"),
        (classifier.process_model, "process", {"score": "median"}, "judge.score='median': choose one of min"),
        (classifier.process_model, "process", {"positive": 2}, "judge.positive=2.*labels 0 to 1"),
        (classifier.process_model, "process", {"separator": "\n\n\n"}, r"separator='\\n\\n\\n' is 3 tokens"),
    ],
)
def test_mistakes_are_named(constructor, name, options, words, folder):
    with pytest.raises(ValueError, match=words):
        constructor(path=folder(name), **options)


def test_an_empty_path_is_named():
    with pytest.raises(ValueError, match="judge.path is empty"):
        classifier.outcome_model()


def test_plain_text_and_a_line_break_as_separator(folder):
    """TRL's form: problem and steps, a line break after each, no chat template. Steps may hold line breaks."""
    path = folder("process")
    judge = classifier.process_model(
        path=path, chat=False, template="{problem}\n", separator="\n", score="last", max_tokens=256, batch_tokens=256
    )
    said = judge([{"problem": "1+1?"}], ["1\n+1\n\nis 2"])
    assert said.errors == [None]
    tokens = build_tokenizer(path).encode("1+1?\n1\n+1\nis 2\n")
    np.testing.assert_allclose(said.values[0], jax.nn.softmax(last_logits(path, tokens))[1], atol=1e-5)
    plain = classifier.outcome_model(
        path=folder("outcome"), chat=False, template="{problem} ", max_tokens=256, batch_tokens=256
    )
    assert plain([{"problem": "1+1?"}], ["is 2"]).costs["tokens"] == len(build_tokenizer(path).encode("1+1? is 2"))


# ---- as channels of a task


def test_a_process_model_judges_the_right_rows_of_the_gym(folder):
    """Its steps end with commas there; wrong rows get 0 and are not read; the gym's own process score is replaced."""
    judge = classifier.process_model(path=folder("process"), split=",", max_tokens=256, batch_tokens=256)
    task = arithmetic(seed=0, max_prompt_tokens=8)
    example = {"id": "a", "problem": "57+86?", "answer": "143"}
    texts = ["7+6+0=13,5+8+1=14#143", "7+6+0=13,5+8+1=14#144", "#143"]
    scores, errors = judged(task, judge, **PLACES["process_model"]).score([example] * 3, texts)
    np.testing.assert_array_equal(scores["correct"], [1, 0, 1])
    np.testing.assert_array_equal(scores["process_asked"], [1, 0, 1])
    assert scores["process"][1] == 0 and 0 < scores["process"][0] < 1 and errors == [None] * 3
    np.testing.assert_array_equal(np.isnan(scores["process_tokens"]), [False, True, False])
    np.testing.assert_array_equal(scores["flawed"], task.score([example] * 3, texts)[0]["flawed"])


def test_an_outcome_model_scores_all_rows_of_a_file(folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"id": "a", "problem": "1+1+1?", "answer": "3"}) + "\n")
    plain = files(seed=0, max_prompt_tokens=200, tokenizer_path=save_tokenizer(tmp_path / "t"), train_path=str(rows))
    task = judged(
        plain,
        JUDGES["outcome_model"](path=folder("outcome"), max_tokens=256, batch_tokens=256),
        **PLACES["outcome_model"],
    )
    texts = ["It is \\boxed{3}.", "It is \\boxed{4}."]
    scores, errors = task.score([plain.train[0]] * 2, texts)
    np.testing.assert_array_equal(scores["correct"], [1, 0])
    np.testing.assert_array_equal(scores["reward_asked"], [1, 1])
    assert np.isfinite(scores["reward"]).all() and scores["reward"][0] != scores["reward"][1]
    assert errors == [None, None]


def test_a_config_names_the_model(folder):
    config = base.get_config(task="arithmetic", judge="process_model")
    config.judge.update(
        path=folder("process"), split=",", score="flawed", channel="flawed", max_tokens=256, batch_tokens=256
    )
    task = build.task(config)
    scores, _ = task.score([{"id": "a", "problem": "57+86?", "answer": "143"}], ["7+6+0=13,5+8+1=14#143"])
    assert scores["flawed"][0] in (0, 1) and scores["flawed_exact"][0] == 0


# ---- as critics


def test_records_of_a_process_model(folder):
    model = reward_model.load(folder("process"), max_tokens=256, batch_tokens=256)
    rows = [
        {"id": "gsm8k-0", "problem": "1?", "steps": ["a", "b", "c"], "label": 1, "final_answer_correct": True},
        {"id": "gsm8k-1", "problem": "2?", "steps": ["d"], "label": -1},
        {"id": "gsm8k-2", "problem": "3?", "steps": ["e" * 400], "label": 0, "final_answer_correct": False},
    ]
    records = classifier.critic_records(model, rows, threshold=0.0)
    assert [r["predicted"] for r in records] == [-1, -1, None] and "tokens" in records[2]["error"]
    assert [r["final_answer_correct"] for r in records] == [True, None, False]
    assert len(records[0]["step_scores"]) == 3 and json.loads(json.dumps(records)) == records
    assert evaluation.critic_table(records)["subsets"]["gsm8k"]["correct"] == 1
    threshold = evaluation.critic_threshold(records)
    again = classifier.critic_records(model, rows, threshold=threshold)
    best = evaluation.critic_table(again)["pooled"]["process_f1"]
    assert best >= evaluation.critic_table(records)["pooled"]["process_f1"]


def test_a_process_model_reads_processbench(folder, shared):
    with gzip.open(shared / "processbench.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    gsm8k, omnimath = rows[:400], rows[-1000:]
    rows = [min(part, key=lambda row: len(row["problem"] + "".join(row["steps"]))) for part in (gsm8k, omnimath)]
    model = reward_model.load(folder("process"), max_tokens=1024, batch_tokens=1024)
    table = evaluation.critic_table(classifier.critic_records(model, rows))
    assert set(table["subsets"]) == {"gsm8k", "omnimath"} and table["pooled"]["no_verdict"] == 0

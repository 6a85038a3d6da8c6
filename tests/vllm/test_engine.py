"""Requests: what is sampled, with which log-probs, when it ends. Weights: test_loading; HAPO's part: test_plugin."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from tapojax import sampling
from tapojax.models import huggingface
from tapojax.models.config import Llama3Rope
from tests.vllm import conftest, reference

PROMPTS = {0: [3, 1, 4, 1, 5], 4: list(range(40)), 9: [50]}


@pytest.fixture(scope="module", autouse=True)
def model(worker, models):
    worker.scenario("load", path=models[0].file, version=1)
    return models[0]


def samples(groups):
    return [(PROMPTS[int(index)], sample) for index, group in groups.items() for sample in group]


def test_the_expected_tensors_are_those_of_the_trainer(worker):
    described = worker.scenario("describe")
    assert described["engine"].startswith("vllm 0.3")
    assert described["max_prompt_tokens"] == conftest.OPTIONS["max_prompt_tokens"]
    assert described["max_tokens"] == conftest.OPTIONS["max_tokens"]
    ours = {name: list(tensor.shape) for name, tensor in huggingface.manifest(conftest.CONFIG).items()}
    assert described["tensors"] == ours


PLAIN = dataclasses.replace(conftest.CONFIG, qkv_bias=False)
FAMILIES = {
    "qwen2 with a head": dataclasses.replace(conftest.CONFIG, tie_embeddings=False),
    "qwen3": dataclasses.replace(PLAIN, qk_norm=True),
    "qwen3 biased": dataclasses.replace(conftest.CONFIG, qk_norm=True, output_bias=True),
    "llama": dataclasses.replace(PLAIN, rope_scaling=Llama3Rope(8.0, 1.0, 4.0, original_max_position=64)),
    "llama biased": dataclasses.replace(conftest.CONFIG, output_bias=True, mlp_bias=True),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_of_every_family(worker, tmp_path, family):
    config = FAMILIES[family]
    huggingface.config_json.write_config(config, tmp_path)
    ours = {name: list(tensor.shape) for name, tensor in huggingface.manifest(config).items()}
    assert worker.scenario("checkpoint_shapes", folder=str(tmp_path)) == ours


def test_another_version_of_vllm_is_refused(worker, models):
    said = worker.scenario("wrong_version", model=str(models[0].folder))
    assert "0.31.2" in said and "0.32 and 0.33" in said and "make_vllm_env" in said


def test_behaviour_logprobs_are_the_models(worker, model):
    groups = worker.scenario("generate", prompts=PROMPTS, group_size=4, base_logprobs=True)
    assert sorted(map(int, groups)) == sorted(PROMPTS)
    for prompt, sample in samples(groups):
        np.testing.assert_allclose(
            sample["logprobs"], reference.logprobs(model, prompt, sample), atol=reference.TOLERANCE
        )
        assert sample["base_logprobs"] == [], "at temperature 1 they are the same"
        assert sample["versions"] == [[1, 0, len(sample["tokens"])]]


FILTERED = [
    dict(temperature=0.7),
    dict(temperature=1.9),
    dict(temperature=1.0, top_k=5),
    dict(temperature=1.0, top_p=0.6),
    dict(temperature=0.8, top_k=20, top_p=0.9),
]


@pytest.mark.parametrize("knobs", FILTERED, ids=str)
def test_filtered_and_heated_samples_have_both_logprobs(worker, model, knobs):
    """Behaviour: log softmax(filter(z / T)). Base: log softmax(z)."""
    options = dict(prompts=PROMPTS, sampling=dict(max_tokens=24) | knobs)
    groups = worker.scenario("generate", **options, base_logprobs=True)
    for prompt, sample in samples(groups):
        z = jnp.asarray(reference.completion_logits(model, prompt, sample)) / knobs["temperature"]
        z = sampling.top_p(sampling.top_k(z, knobs.get("top_k", 0)), knobs.get("top_p", 1.0))
        np.testing.assert_allclose(
            sample["logprobs"], reference.of_tokens(z, sample["tokens"]), atol=reference.TOLERANCE
        )
        base = reference.logprobs(model, prompt, sample)
        np.testing.assert_allclose(sample["base_logprobs"], base, atol=reference.TOLERANCE)
    without = worker.scenario("generate", **options)
    assert [s["tokens"] for _, s in samples(without)] == [s["tokens"] for _, s in samples(groups)]
    assert all(s["base_logprobs"] == [] for _, s in samples(without)), "not asked for"


def test_temperature_0_takes_the_most_likely_token(worker, model):
    adaptive = dict(base=1.0, strength=0.5, quantile=0.0, scale=1.0, above=1.0, below=1.0)
    for extra in ({}, {"adaptive": adaptive}):
        options = dict(prompts=PROMPTS, sampling=dict(temperature=0.0) | extra, base_logprobs=True)
        for prompt, sample in samples(worker.scenario("generate", **options)):
            z = reference.completion_logits(model, prompt, sample)
            np.testing.assert_array_equal(sample["tokens"], np.argmax(z, axis=1))
            want = reference.of_tokens(z, sample["tokens"])
            np.testing.assert_allclose(sample["logprobs"], want, atol=reference.TOLERANCE)
            assert sample["base_logprobs"] == []


def test_different_requests_share_a_batch_and_not_their_sampling(worker, model):
    temperatures = [1.0, 0.5, 0.0, 1.5]
    requests = [dict(prompts=PROMPTS, sampling=dict(temperature=t)) for t in temperatures]
    for t, groups in zip(temperatures, worker.scenario("generate_together", requests=requests), strict=True):
        for prompt, sample in samples(groups):
            z = reference.completion_logits(model, prompt, sample) / (t or 1.0)
            want = reference.of_tokens(z, sample["tokens"])
            np.testing.assert_allclose(sample["logprobs"], want, atol=reference.TOLERANCE)


def test_logprobs_of_given_rows(worker, model):
    rows = [[1, 2, 3], [7], list(range(51)), [5] * 300]
    for row, got in zip(rows, worker.scenario("logprobs", rows=rows), strict=True):
        assert len(got) == len(row) - 1
        if len(row) > 1:
            want = reference.of_tokens(reference.logits(model, row), row[1:])
            np.testing.assert_allclose(got, want, atol=reference.TOLERANCE)


def test_the_longest_prompt_and_completion(worker, model):
    prompt = [i % 51 for i in range(conftest.OPTIONS["max_prompt_tokens"])]
    options = dict(max_tokens=conftest.OPTIONS["max_tokens"], temperature=0.9)
    groups = worker.scenario("generate", prompts={0: prompt}, group_size=1, sampling=options, base_logprobs=True)
    (sample,) = groups["0"]
    assert len(sample["tokens"]) == conftest.OPTIONS["max_tokens"] and not sample["stopped"]
    base = reference.logprobs(model, prompt, sample)
    np.testing.assert_allclose(sample["base_logprobs"], base, atol=reference.TOLERANCE)


def test_only_the_requests_stop_tokens_stop(worker):
    long = dict(prompts=PROMPTS, group_size=8, sampling=dict(max_tokens=64))
    free = samples(worker.scenario("generate", **long))
    assert all(len(s["tokens"]) == 64 and not s["stopped"] for _, s in free)
    assert any(conftest.EOS in s["tokens"] for _, s in free), "config.json's EOS is a token like others"
    stops = [12, 30]
    stopped = samples(worker.scenario("generate", **long | {"sampling": dict(max_tokens=64, stop_token_ids=stops)}))
    assert any(s["stopped"] for _, s in stopped)
    for (_, whole), (_, sample) in zip(free, stopped, strict=True):
        length = next((i + 1 for i, token in enumerate(whole["tokens"]) if token in stops), 64)
        assert sample["tokens"] == whole["tokens"][:length], "the stop token is kept, and the seed is the same"
        assert sample["stopped"] == (sample["tokens"][-1] in stops) and len(sample["logprobs"]) == length


def test_a_stop_token_in_the_last_place_counts_as_stopped(worker):
    (sample,) = worker.scenario("generate", prompts={0: [1]}, group_size=1, sampling=dict(max_tokens=5))["0"]
    last = sample["tokens"][-1]
    first = sample["tokens"].index(last) + 1
    options = dict(max_tokens=first, stop_token_ids=[last])
    (again,) = worker.scenario("generate", prompts={0: [1]}, group_size=1, sampling=options)["0"]
    assert again["stopped"] and again["tokens"] == sample["tokens"][:first]


# ---- seeds


def test_the_same_request_gives_the_same_completions(worker):
    options = dict(prompts=PROMPTS, group_size=4, sampling=dict(max_tokens=32))
    first = worker.scenario("generate", **options)
    tokens = [sample["tokens"] for _, sample in samples(first)]
    assert len(set(map(tuple, tokens))) == len(tokens), "every sample has a seed of its own"
    assert worker.scenario("generate", **options) == first
    others = worker.scenario("generate", **options, key=[7, 12])
    assert not set(map(tuple, tokens)) & {tuple(s["tokens"]) for _, s in samples(others)}


def test_what_else_is_asked_for_does_not_change_a_completion(worker):
    """A request that is taken up again elsewhere asks for the missing groups only."""
    options = dict(group_size=4, sampling=dict(max_tokens=32))
    whole = worker.scenario("generate", prompts=PROMPTS, **options)
    rest = worker.scenario("generate", prompts=PROMPTS, skip=[4], **options)
    assert rest == {index: group for index, group in whole.items() if index != "4"}
    alone = worker.scenario("generate", prompts={9: PROMPTS[9]}, **options)
    assert [s["tokens"] for s in alone["9"]] == [s["tokens"] for s in whole["9"]]
    assert worker.scenario("generate", prompts=PROMPTS, skip=list(PROMPTS), **options) == {}


# ---- refusals


REFUSED = {
    "empty prompt": (dict(prompts={0: []}), "allowed are 1 to"),
    "long prompt": (dict(prompts={0: [1] * 161}), "161 tokens"),
    "unknown token": (dict(prompts={0: [1, 51]}), "the model has 0 to 50"),
    "budget": (dict(prompts=PROMPTS, sampling=dict(max_tokens=1401)), "max_tokens=1401"),
    "no budget": (dict(prompts=PROMPTS, sampling=dict(max_tokens=0)), "max_tokens=0"),
    "no group": (dict(prompts=PROMPTS, group_size=0), "group_size=0"),
    "cold": (dict(prompts=PROMPTS, sampling=dict(temperature=0.005)), "0.01 and above"),
    "hot": (dict(prompts=PROMPTS, sampling=dict(temperature=2.5)), "temperature"),
    "nan": (dict(prompts=PROMPTS, sampling=dict(temperature=math.nan)), "temperature"),
    "top_p": (dict(prompts=PROMPTS, sampling=dict(top_p=0.0)), "top_p"),
    "stop token": (dict(prompts=PROMPTS, sampling=dict(stop_token_ids=[51])), "51"),
}


def test_what_cannot_be_sampled_is_refused_and_the_engine_lives_on(worker):
    said = worker.scenario("refuse_requests", requests=[options for options, _ in REFUSED.values()])
    for name, text, (_, expected) in zip(REFUSED, said, REFUSED.values(), strict=True):
        assert expected in text, (name, text)
    assert all("allowed are 1 to 1560" in text for text in worker.scenario("refuse_rows", rows=[[], [1] * 1561]))
    assert len(worker.scenario("generate", prompts=PROMPTS)) == len(PROMPTS)


# ---- ends


LONG = dict(prompts={i: [i + 1] for i in range(4)}, group_size=2, sampling=dict(max_tokens=1400))


def test_closing_the_iterator_ends_the_work(worker):
    short_first = dict(prompts={i: [i + 1] for i in range(20)}, group_size=1, sampling=dict(max_tokens=400))
    ended = worker.scenario("close_early", **short_first)  # 20 prompts, 16 at a time: the last wait for their turn
    assert ended["before"] >= 4 and ended["unfinished"] == 0


def test_cancelling_ends_the_work(worker):
    ended = worker.scenario("cancel", **LONG)
    assert ended == {"cancelled": True, "before": 8, "unfinished": 0}


def test_pause_wait_lets_requests_finish_and_holds_new_ones(worker):
    said = worker.scenario(
        "pause_wait", prompts=PROMPTS, sampling=dict(max_tokens=200, temperature=0.9), base_logprobs=True
    )
    assert said == {"drained": True, "waiting": True, "same": True}


def test_pause_abort_ends_requests(worker):
    assert worker.scenario("pause_abort", **LONG) == {"cancelled": True, "unfinished": 0}
    assert len(worker.scenario("generate", prompts=PROMPTS)) == len(PROMPTS)

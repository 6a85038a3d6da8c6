"""Weights: what is sampled after a load is the new model's, under running requests too, and nothing less is loaded."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tapojax.models import huggingface
from tests.vllm import conftest, reference

LONG_PROMPT = [(7 * i) % 51 for i in range(150)]  # longer than a block of the prefix cache, 128 tokens on CPU
PROMPTS = {0: LONG_PROMPT, 1: [5]}
FLIGHT = dict(prompts=PROMPTS, group_size=2, sampling=dict(max_tokens=1400))


def assert_sampled_by(model, groups, version):
    for index, group in groups.items():
        for sample in group:
            want = reference.logprobs(model, PROMPTS[int(index)], sample)
            np.testing.assert_allclose(sample["logprobs"], want, atol=reference.TOLERANCE)
            assert sample["versions"] == [[version, 0, len(sample["tokens"])]]


def assert_split_at_spans(models, groups):
    """Each token's log-prob is that of the model whose span it lies in, and not that of the other."""
    split = 0
    for prompt, sample in [(PROMPTS[int(index)], sample) for index, group in groups.items() for sample in group]:
        spans = sample["versions"]
        assert [0, *(end for _, _, end in spans)] == [*(begin for _, begin, _ in spans), len(sample["tokens"])]
        split += len(spans) > 1
        for version, begin, end in spans:
            for candidate, model in models.items():
                distance = np.abs(reference.logprobs(model, prompt, sample) - sample["logprobs"])[begin:end]
                if candidate == version:
                    assert distance.max() < reference.TOLERANCE, "log p of the span's own weights"
                elif len(distance) > 20:
                    assert np.median(distance) > 0.1
    assert split, "no completion was running when the weights changed"


def test_every_load_changes_all_that_is_computed(worker, models):
    """The long prompt is in the prefix cache when the weights change."""
    for version, model in enumerate([*models, models[0]], start=1):
        worker.scenario("load", path=model.file, version=version)
        assert_sampled_by(model, worker.scenario("generate", prompts=PROMPTS), version)
        assert_sampled_by(model, worker.scenario("generate", prompts=PROMPTS), version)
        (got,) = worker.scenario("logprobs", rows=[LONG_PROMPT])
        want = reference.of_tokens(reference.logits(model, LONG_PROMPT), LONG_PROMPT[1:])
        np.testing.assert_allclose(got, want, atol=reference.TOLERANCE)


def test_bfloat16_tensors(worker, models, tmp_path):
    """What a trainer sends as bfloat16 is sampled from as these very numbers."""
    rounded = copy.copy(models[1])
    rounded.params = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), models[1].params)
    huggingface.save_params(tmp_path / "half", models[1].params, models[1].config, dtype="bfloat16")
    worker.scenario("load", path=str(tmp_path / "half" / "model.safetensors"), version=4)
    assert_sampled_by(rounded, worker.scenario("generate", prompts=PROMPTS), 4)


def test_weights_that_change_under_running_requests(worker, models):
    groups = worker.scenario("load_in_flight", before=models[0].file, after=models[1].file, **FLIGHT)
    assert_split_at_spans({1: models[0], 2: models[1]}, groups)


def test_base_logprobs_of_old_weights_do_not_exist(worker, models):
    flight = FLIGHT | dict(sampling=dict(max_tokens=1400, temperature=0.8), base_logprobs=True)
    groups = worker.scenario("load_in_flight", before=models[0].file, after=models[1].file, **flight)
    for index, group in groups.items():
        for sample in group:
            want = reference.logprobs(models[1], PROMPTS[int(index)], sample)
            for version, begin, end in sample["versions"]:
                if version == 1:
                    want[begin:end] = np.nan
            np.testing.assert_allclose(sample["base_logprobs"], want, atol=reference.TOLERANCE)


def test_a_load_while_paused_stays_paused(worker, models):
    worker.scenario("load", path=models[0].file, version=1)
    said = worker.scenario("load_while_paused", path=models[2].file, prompts=PROMPTS)
    assert said["waiting"]
    assert_sampled_by(models[2], said["groups"], 5)


def test_requests_frozen_by_a_pause_carry_on_under_new_weights(worker, models):
    groups = worker.scenario("load_in_flight", before=models[0].file, after=models[1].file, paused=True, **FLIGHT)
    assert_split_at_spans({1: models[0], 2: models[1]}, groups)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "bytes"])
def test_other_tensors_than_the_models_are_refused(worker, models, change):
    worker.scenario("load", path=models[0].file, version=1)
    said = worker.scenario("refuse_tensors", path=models[1].file, change=change)
    assert "1 tensors do not fit the model" in said
    assert_sampled_by(models[0], worker.scenario("generate", prompts=PROMPTS), 1)
    worker.scenario("load", path=models[1].file, version=2)
    assert_sampled_by(models[1], worker.scenario("generate", prompts=PROMPTS), 2)


def test_a_partial_file_is_refused_by_the_workers(worker, models):
    """vLLM itself would load a part of the tensors and keep the others: a mixture of two models."""
    worker.scenario("load", path=models[0].file, version=1)
    said = worker.scenario("refuse_partial_file", path=models[1].file)
    assert "missing or misshapen" in said and "None (expected" in said
    assert_sampled_by(models[0], worker.scenario("generate", prompts=PROMPTS), 1)
    worker.scenario("load", path=models[1].file, version=2)
    assert_sampled_by(models[1], worker.scenario("generate", prompts=PROMPTS), 2)


def test_a_swap_is_finished_though_nobody_waits(worker, models):
    worker.scenario("load", path=models[0].file, version=1)
    assert worker.scenario("swap_outlives_its_caller", path=models[2].file) == {"cancelled": True, "paused": False}
    assert_sampled_by(models[2], worker.scenario("generate", prompts=PROMPTS), 8)


def test_after_a_load_that_broke_half_way_nothing_is_sampled(worker, models):
    said = worker.scenario("fail_half_way", path=models[1].file, **FLIGHT)
    assert set(said) == {"load", "running", "generate", "logprobs"}
    for text in said.values():
        assert "version 9 failed half way, restart the server" in text and "the worker's own words" in text


def test_a_folder_with_weights_serves_them_at_once(trained_worker, qwen3):
    described = trained_worker.scenario("describe")
    assert "lm_head.weight" in described["tensors"]
    assert_sampled_by(qwen3, trained_worker.scenario("generate", prompts=PROMPTS), -1)


def test_another_family_is_loaded_too(trained_worker, tmp_path):
    other = conftest.Model(tmp_path / "other", conftest.QWEN3, 4)
    trained_worker.scenario("load", path=other.file, version=1)
    assert_sampled_by(other, trained_worker.scenario("generate", prompts=PROMPTS), 1)


def test_when_vllms_process_dies_requests_fail(trained_worker):
    """The last one: there is no engine after it."""
    assert trained_worker.scenario("outlive_the_core", **FLIGHT) == ["Broken"] * 2

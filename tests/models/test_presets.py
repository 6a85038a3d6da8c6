"""Presets are published shapes: their parameter counts are the published ones, found without allocating anything."""

import dataclasses
import math

import jax
import pytest

from tapojax.models import config_json, decoder
from tapojax.models.presets import PRESETS

# Billions of parameters: sums over the published safetensors, tied heads once.
PUBLISHED = {
    "qwen2.5-0.5b": 0.494,
    "qwen2.5-1.5b": 1.544,
    "qwen2.5-3b": 3.086,
    "qwen2.5-7b": 7.616,
    "qwen2.5-14b": 14.770,
    "qwen2.5-32b": 32.764,
    "qwen2.5-math-1.5b": 1.544,
    "qwen2.5-math-7b": 7.616,
    "deepseek-r1-distill-qwen-1.5b": 1.777,
    "deepseek-r1-distill-qwen-7b": 7.616,
    "qwen3-0.6b": 0.596,
    "qwen3-1.7b": 1.721,
    "qwen3-4b": 4.022,
    "qwen3-8b": 8.191,
    "qwen3-14b": 14.768,
    "qwen3-32b": 32.762,
    "llama-3.1-8b": 8.030,
    "llama-3.2-1b": 1.236,
    "llama-3.2-3b": 3.213,
    "gym-small": 0.00056,
    "gym-medium": 0.0016,
}


def test_every_preset_has_a_published_count():
    assert set(PUBLISHED) == set(PRESETS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name):
    shapes = jax.eval_shape(lambda: decoder.init(PRESETS[name], jax.random.key(0)))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert count / 1e9 == pytest.approx(PUBLISHED[name], rel=0.02 if name.startswith("gym") else 1e-3)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_exported_and_read_back(name, tmp_path):
    config_json.write_config(PRESETS[name], tmp_path, dtype=PRESETS[name].dtype)
    read = config_json.read_config(tmp_path)
    assert read == dataclasses.replace(PRESETS[name], unroll=read.unroll)


def test_gym_presets_fit_the_gym_tokenizer():
    from tapojax.tasks import gym_tokenizer

    assert PRESETS["gym-small"].vocab_size == gym_tokenizer.CharTokenizer().vocab_size

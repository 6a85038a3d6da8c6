"""From a config to a run: what fits together, and what is refused."""

import jax
import numpy as np
import optax
import pytest

from configs import quickstart
from launch import build
from tapojax.models import decoder, huggingface
from tapojax.models.config import DecoderConfig
from tapojax.tasks.gym_tokenizer import TOKENIZER


def saved_model(path, vocab_size):
    config = DecoderConfig(vocab_size, 32, 48, 2, 4, 2, 8, qkv_bias=True, tie_embeddings=True)
    huggingface.save_params(path, jax.device_get(decoder.init(config, jax.random.key(0))), config)
    config = quickstart.get_config()
    config.model.path = str(path)
    return config


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"40 tokens, the tokenizer {len(TOKENIZER)}: they do not belong together"):
        build.setup(saved_model(tmp_path / "small", 40))


def test_a_vocabulary_padded_past_the_tokenizer_is_kept(tmp_path):
    run = build.setup(saved_model(tmp_path / "padded", 64))
    assert run.model.vocab_size == 64
    with jax.set_mesh(run.mesh):
        params = build.initial_params(build_section(tmp_path / "padded"), run.model, run.mesh, jax.random.key(0))
    assert params["embedding"].shape == (64, 32)


def build_section(path):
    config = quickstart.get_config()
    config.model.path = str(path)
    return config.model


def test_extra_stop_tokens_stand_beside_the_end_token():
    config = quickstart.get_config()
    config.sampling.stop_token_ids = (7,)
    assert build.setup(config).sampling.stop_token_ids == (TOKENIZER.eos_token_id, 7)


@pytest.mark.parametrize(
    ("schedule", "want"),
    [("constant", [0, 0.5, 1, 1, 1]), ("linear", [0, 0.5, 1, 0.625, 0.25]), ("cosine", [0, 0.5, 1, 0.625, 0.25])],
)
def test_learning_rate_warms_up_then_follows_the_schedule(schedule, want):
    """Read off the first update of a unit gradient, whose size under Adam is the learning rate."""
    section = quickstart.get_config().optimizer
    section.update(learning_rate=1.0, schedule=schedule, warmup_updates=2, end_fraction=0.25, eps=1e-12, b1=0.0)
    optimizer = build.optimizer(section, total_updates=4)
    params = {"kernel": np.ones(1, np.float32)}
    state, sizes = optimizer.init(params), []
    for _ in want:
        updates, state = optimizer.update({"kernel": np.ones(1, np.float32)}, state, params)
        sizes.append(-float(updates["kernel"][0]))
    np.testing.assert_allclose(sizes, want, atol=1e-5)


def test_norms_and_biases_do_not_decay():
    section = quickstart.get_config().optimizer
    section.update(learning_rate=1.0, schedule="constant", warmup_updates=0, weight_decay=0.1)
    optimizer = build.optimizer(section, total_updates=4)
    params = {
        "query": {"kernel": np.ones(2, "f"), "bias": np.ones(2, "f")},
        "norm": {"scale": np.ones(2)},
        "embedding": np.ones(2),
    }
    updates, _ = optimizer.update(jax.tree.map(np.zeros_like, params), optimizer.init(params), params)
    after = optax.apply_updates(params, updates)
    assert np.all(after["query"]["kernel"] < 1) and np.all(after["embedding"] < 1)
    assert np.all(after["query"]["bias"] == 1) and np.all(after["norm"]["scale"] == 1)

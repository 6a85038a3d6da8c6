from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tapojax import weights


def constant_length(mask):
    return weights.constant_length(mask, 7)


ALL = pytest.mark.parametrize(
    "weigh", [weights.token_mean, weights.sequence_mean, weights.sequence_sum, constant_length]
)
MASK = np.array([[0, 1, 1, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 1, 0, 1, 1]], bool)


def test_verl_aggregation():
    data = np.load(Path(__file__).parent / "golden" / "agg_loss_verl.npz", allow_pickle=False)
    with jax.enable_x64(True):
        mask, loss = jnp.asarray(data["loss_mask"] > 0), jnp.asarray(data["loss_mat"].astype(np.float64))
        rows, columns = mask.shape
        nonempty, devices = jnp.sum(jnp.any(mask, axis=1)), int(data["dp_size"])
        of_rows = nonempty / int(data["global_batch_size"]) * devices
        # verl's constant-length mode has no mean over rows, so it is ours times their number.
        of_length = columns / int(data["loss_scale_factor"])
        cases = {
            "token_mean": (weights.token_mean(mask), jnp.sum(mask) / int(data["batch_num_tokens"]) * devices),
            "seq_mean_token_sum": (weights.sequence_sum(mask), of_rows),
            "seq_mean_token_mean": (weights.sequence_mean(mask), of_rows),
            "seq_mean_token_sum_norm": (weights.constant_length(mask, columns) * rows, of_length),
        }
        for mode, (ours, to_global) in cases.items():
            for scope, factor in {"default": 1, "global": to_global}.items():
                name = f"{mode}__{scope}"
                np.testing.assert_allclose(ours * factor, data[f"grad__{name}"], 1e-6, 1e-9, err_msg=name)
                total = jnp.sum(ours * factor * loss)
                np.testing.assert_allclose(total, data[f"loss__{name}"], 1e-6, err_msg=name)


def test_by_hand():
    mask = jnp.asarray(MASK)
    np.testing.assert_allclose(weights.token_mean(mask), MASK / 7, 1e-6)
    np.testing.assert_allclose(weights.sequence_mean(mask), MASK / [[9], [1], [3], [9]], 1e-6)
    np.testing.assert_allclose(weights.sequence_sum(mask), MASK / 3, 1e-6)
    np.testing.assert_allclose(weights.constant_length(mask, 10), MASK / 40, 1e-6)


@ALL
def test_an_empty_mask_weighs_nothing(weigh):
    np.testing.assert_array_equal(weigh(jnp.zeros((3, 4), bool)), np.zeros((3, 4)))


@pytest.mark.parametrize("weigh", [weights.token_mean, weights.sequence_mean])
def test_means_sum_to_one(weigh):
    np.testing.assert_allclose(jnp.sum(weigh(jnp.asarray(MASK))), 1, 1e-6)


@ALL
def test_padding_and_row_order_do_not_matter(weigh):
    plain = np.asarray(weigh(jnp.asarray(MASK)))
    np.testing.assert_array_equal(weigh(jnp.pad(MASK, ((0, 0), (2, 3)))), np.pad(plain, ((0, 0), (2, 3))))
    np.testing.assert_array_equal(weigh(jnp.asarray(MASK[::-1])), plain[::-1])


@ALL
def test_empty_rows_count_only_for_constant_length(weigh):
    plain, padded = weigh(jnp.asarray(MASK)), weigh(jnp.pad(MASK, ((0, 4), (0, 0))))
    np.testing.assert_allclose(padded[:4], plain * (0.5 if weigh is constant_length else 1), 1e-6)


@ALL
def test_micro_batches_add_up(weigh):
    loss = jax.random.normal(jax.random.key(0), MASK.shape)
    w = weigh(jnp.asarray(MASK))
    parts = sum(jnp.sum(w[i : i + 2] * loss[i : i + 2]) for i in (0, 2))
    np.testing.assert_allclose(parts, jnp.sum(w * loss), 1e-5)


@ALL
def test_jit_vmap_and_precision(weigh):
    masks = jax.random.bernoulli(jax.random.key(0), 0.6, (3, 4, 5))
    each = jnp.stack([weigh(m) for m in masks])
    assert each.dtype == jnp.float32
    np.testing.assert_allclose(jax.jit(weigh)(masks[0]), each[0], 1e-6)
    np.testing.assert_allclose(jax.vmap(weigh)(masks), each, 1e-6)
    loss = jnp.ones((4, 5))
    np.testing.assert_allclose(jax.grad(lambda x: jnp.sum(weigh(masks[0]) * x))(loss), each[0], 1e-6)


def test_length_must_be_positive():
    with pytest.raises(ValueError, match="length=0"):
        weights.constant_length(jnp.asarray(MASK), 0)

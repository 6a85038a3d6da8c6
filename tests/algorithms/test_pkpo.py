"""PKPO's rewards against their definition: over the k-subsets with the row in them, how often one is right."""

import itertools

import jax
import numpy as np
import pytest

from tapojax.algorithms.pkpo import pkpo


def rewards(correct, k):
    algorithm = pkpo(group_size=len(correct), max_tokens=4, k=k)
    return np.asarray(jax.jit(lambda c: algorithm.rewards({"correct": c}, None, 0))(np.array(correct, np.float32)))


@pytest.mark.parametrize("k", [1, 2, 3, 6])
@pytest.mark.parametrize("right", range(7))
def test_equals_the_mean_over_all_subsets(k, right):
    """n / k of the paper's reward: (1 / C(n - 1, k - 1)) sum over subsets I with i in I of max_{j in I} correct_j."""
    correct = [1.0] * right + [0.0] * (6 - right)
    subsets = list(itertools.combinations(range(6), k))
    expected = [np.mean([max(correct[j] for j in subset) for subset in subsets if i in subset]) for i in range(6)]
    np.testing.assert_allclose(rewards(correct, k), expected, atol=1e-6)


def test_an_unscored_row_leaves_the_group():
    got = rewards([1.0, 0.0, np.nan, 0.0], 2)
    assert np.isnan(got[2])
    np.testing.assert_allclose(got[[0, 1, 3]], rewards([1.0, 0.0, 0.0], 2))
    assert np.isnan(rewards([np.nan] * 3, 2)).all()


@pytest.mark.parametrize("k", [0, 5])
def test_k_must_fit_the_group(k):
    with pytest.raises(ValueError, match=f"k={k} .* group_size=4"):
        pkpo(group_size=4, max_tokens=4, k=k)

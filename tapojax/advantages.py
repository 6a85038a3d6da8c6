"""Advantages: how much better a completion did than the others of its group.

A group is `group_size` adjacent rows that answer one prompt. Rows outside `where` and rows whose reward is NaN (no
score exists) get advantage 0 and stay out of every statistic of their group; the caller also masks their tokens.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, ScalarLike


def group_normalize(
    rewards: Float[ArrayLike, "B"],
    group_size: int,
    *,
    where: Bool[ArrayLike, "B"] | None = None,
    scale: bool = True,
    eps: ScalarLike = 1e-6,
    std_floor: ScalarLike = 0.0,
) -> Float[Array, "B"]:
    """Group-relative advantages of GRPO; with `scale=False` those of Dr.GRPO.

    A_i = (R_i - mean) / (max(std, std_floor) + eps)   scale=True
    A_i =  R_i - mean                                  scale=False, std_floor unused
    A_i =  0                                           either, where std <= eps

    mean and std (ddof 1) run over the valid rows of the group. A group of equal rewards gives exactly 0 even where its
    floating-point mean rounds, and so does a group with a single valid row: it has nothing to be compared with.
    `std_floor` keeps a spread smaller than the floor from being blown up to unit variance.

    Raises: ValueError if the rows do not divide into groups.
    Source: Shao et al. 2024, arXiv 2402.03300; without the division Liu et al. 2025, arXiv 2503.20783.
    """
    centered, valid, count = _center(rewards, group_size, where)
    variance = jnp.sum(centered**2, axis=1, keepdims=True) / jnp.maximum(count - 1, 1)
    # The square root's slope at 0 is infinite, so a group without spread must not reach it, not even unselected.
    spread = variance > 0
    std = jnp.where(spread, jnp.sqrt(jnp.where(spread, variance, 1)), 0)
    informative = std > eps
    divisor = jnp.where(informative, jnp.maximum(std, std_floor) + eps, 1) if scale else 1
    return jnp.where(valid & informative, centered / divisor, 0).reshape(-1)


def leave_one_out(
    rewards: Float[ArrayLike, "B"], group_size: int, *, where: Bool[ArrayLike, "B"] | None = None
) -> Float[Array, "B"]:
    """REINFORCE leave-one-out (RLOO): the reward minus the mean reward of the other valid rows of its group.

    A_i = R_i - 1/(n - 1) · Σ_{j≠i} R_j = n/(n - 1) · (R_i - mean)

    n counts the group's valid rows. Equal rewards give exactly 0, and so does a row without any other to compare with.

    Raises: ValueError if the rows do not divide into groups.
    Source: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; Ahmadian et al. 2024,
    arXiv 2402.14740.
    """
    centered, _, count = _center(rewards, group_size, where)
    return (centered * count / jnp.maximum(count - 1, 1)).reshape(-1)


def per_token(advantages: Float[ArrayLike, "B"], mask: Bool[ArrayLike, "B T"]) -> Float[Array, "B T"]:
    """Give every completion token its row's advantage: A_{i,t} = A_i inside the mask, 0 outside."""
    return jnp.where(mask, _at_least_float32(advantages)[:, None], 0)


def _center(
    rewards: Float[ArrayLike, "B"], group_size: int, where: Bool[ArrayLike, "B"] | None
) -> tuple[Float[Array, "P G"], Bool[Array, "P G"], Float[Array, "P 1"]]:
    """Rewards minus their group's mean (0 where invalid), which rows are valid, and how many of each group are."""
    rewards = _at_least_float32(rewards)
    if group_size < 1 or rewards.size % group_size:
        raise ValueError(
            f"{rewards.size} rewards do not divide into groups of group_size={group_size}: "
            "pass every row of every group, and leave rows out through `where`"
        )
    valid = ~jnp.isnan(rewards) if where is None else jnp.asarray(where) & ~jnp.isnan(rewards)
    rewards, valid = rewards.reshape(-1, group_size), valid.reshape(-1, group_size)
    count = jnp.sum(valid, axis=1, keepdims=True).astype(rewards.dtype)
    # Measured from the group's lowest reward, equal rewards are exactly 0 and so is their mean; measured from 0 the
    # mean of eight times 0.6 rounds, and dividing by the equally tiny std makes advantages out of the rounding error.
    lowest = jax.lax.stop_gradient(jnp.min(rewards, axis=1, keepdims=True, where=valid, initial=jnp.inf))
    rewards = jnp.where(valid, rewards - lowest, 0)
    mean = jnp.sum(rewards, axis=1, keepdims=True) / jnp.maximum(count, 1)
    return jnp.where(valid, rewards - mean, 0), valid, count


def _at_least_float32(x: Float[ArrayLike, "B"]) -> Float[Array, "B"]:
    return jnp.asarray(x, jnp.result_type(x, jnp.float32))

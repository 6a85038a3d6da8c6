"""Advantages: how much better a completion did than the others of its group.

A group is `group_size` adjacent rows that answer one prompt. Rows outside `where` and rows whose reward is NaN (no
score exists) get advantage 0 and stay out of every statistic of their group; the caller also masks their tokens.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, ScalarLike, Shaped


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
    std = _root(jnp.sum(centered**2, axis=1, keepdims=True) / jnp.maximum(count - 1, 1))
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


def decoupled(
    outcome: Float[ArrayLike, "B"],
    process: Float[ArrayLike, "B"],
    correct: Shaped[ArrayLike, "B"],
    group_size: int,
    *,
    process_weight: ScalarLike = 1.0,
    valid: Bool[ArrayLike, "B"] | None = None,
) -> Float[Array, "B"]:
    """PAPO's decoupled advantages: outcome over the whole group plus process among its correct rows.

    A_i = A_out,i + process_weight · A_proc,i     A_out: `group_normalize(outcome)`,  A_proc: `correct_only(process)`

    outcome may hold other terms than correctness, such as a length penalty. A row whose outcome is NaN leaves both
    parts; one whose process score is missing keeps its A_out and has A_proc = 0.

    Raises: ValueError if the rows do not divide into groups.
    Source: Tan et al., arXiv 2603.26535, which has no process_weight; its code (tanzelin430/PAPO) has.
    """
    right = (jnp.asarray(correct) == 1) & ~jnp.isnan(jnp.asarray(outcome))
    among_correct = correct_only(process, right, group_size, valid=valid)
    return group_normalize(outcome, group_size) + process_weight * among_correct


def correct_only(
    process: Float[ArrayLike, "B"],
    correct: Shaped[ArrayLike, "B"],
    group_size: int,
    *,
    valid: Bool[ArrayLike, "B"] | None = None,
    eps: ScalarLike = 1e-6,
    scale: bool = True,
) -> Float[Array, "B"]:
    """PAPO's A_proc: process scores compared among the correct rows of their group.

    C = {i: correct_i = 1, process_i judged},  A_i = (q_i - mean_C) / (std_C + eps) if i ∈ C and std_C > eps, else 0

    So a process score can neither lift a wrong row nor cost it anything, and what wrong rows hold there is not read. A
    score is judged unless it is NaN or not `valid`: leaving it out is our choice, the published code reads a judge's
    failure as the worst score. Equal scores and a single judged row give exactly 0. scale as in `group_normalize`.

    Raises: ValueError if the rows do not divide into groups.
    Source: Tan et al., arXiv 2603.26535: divides by max(std, eps); by std + eps in its code and here.
    """
    judged = jnp.asarray(correct) == 1 if valid is None else (jnp.asarray(correct) == 1) & jnp.asarray(valid)
    return group_normalize(process, group_size, where=judged, eps=eps, scale=scale)


def full_norm(
    outcome: Float[ArrayLike, "B"],
    process: Float[ArrayLike, "B"],
    correct: Shaped[ArrayLike, "B"],
    group_size: int,
    *,
    process_weight: ScalarLike = 1.0,
) -> Float[Array, "B"]:
    """PAPO's ablation of the subset: process scores, 0 for wrong rows, normalised over the whole group.

    Wrong rows are thereby punished twice. Its published runs have process_weight 0.6 against 1 for `decoupled`.

    Raises: ValueError if the rows do not divide into groups.
    Source: Tan et al., arXiv 2603.26535, "Fullnorm".
    """
    process = jnp.where(jnp.asarray(correct) == 1, _at_least_float32(process), 0)
    over_group = group_normalize(process, group_size, where=~jnp.isnan(jnp.asarray(outcome)))
    return group_normalize(outcome, group_size) + process_weight * over_group


def multiplicative(
    outcome: Float[ArrayLike, "B"], process: Float[ArrayLike, "B"], group_size: int
) -> Float[Array, "B"]:
    """PAPO's ablation of the sum: `group_normalize(outcome · process)`, 0 where the outcome is, judged or not.

    A correct row of process score 0 is thereby no better than a wrong one.

    Raises: ValueError if the rows do not divide into groups.
    Source: Tan et al., arXiv 2603.26535, "Mult".
    """
    outcome, process = _at_least_float32(outcome), _at_least_float32(process)
    read = (outcome != 0) & ~jnp.isnan(outcome + process)
    product = jnp.where(read, outcome, 0) * jnp.where(read, process, 0)
    return group_normalize(product, group_size, where=read | (outcome == 0))


def process_only(process: Float[ArrayLike, "B"], group_size: int) -> Float[Array, "B"]:
    """PAPO's ablation of the outcome: `group_normalize(process)`, right or wrong; its judge gets hacked.

    Raises: ValueError if the rows do not divide into groups.
    Source: Tan et al., arXiv 2603.26535, "PRM only".
    """
    return group_normalize(process, group_size)


def token_group_normalize(
    rewards: Float[ArrayLike, "B"],
    mask: Bool[ArrayLike, "B T"],
    group_size: int,
    *,
    eps: ScalarLike = 1e-6,
    max_abs: ScalarLike = 5.0,
) -> Float[Array, "B T"]:
    """HAPO's token-level group average: rewards normalised by mean and std over all tokens of the group.

    μ = Σ n_i·R_i / Σ n_i,  σ² = Σ n_i·(R_i - μ)² / Σ n_i        n_i: tokens of row i
    A_{i,t} = m_{i,t} · (R_i - μ) / (σ + eps)

    So the advantages of a group's tokens, not of its rows, sum to 0. A group with a token of |A| >= max_abs, a rare
    outcome in short rows, gets the row advantages of `group_normalize` instead (the published code only; inf turns it
    off). The code judges that on padding columns too, where R counts as 0, so that a group of nearly equal rewards can
    fall back for its padding; we take the tokens in the mask. Rows whose reward is NaN are left out, and σ <= eps
    gives 0, as does a row alone in its group (there R itself in the code).

    Raises: ValueError if the rows do not divide into groups.
    Source: Liu et al. 2025 (HAPO), arXiv 2509.16591, and its code (starriver030515/HAPO).
    """
    centered, valid, _ = _center(rewards, group_size, None)
    lengths = jnp.where(valid, jnp.sum(mask, axis=1).reshape(valid.shape), 0).astype(centered.dtype)
    tokens = jnp.maximum(jnp.sum(lengths, axis=1, keepdims=True), 1)
    centered = centered - jnp.sum(lengths * centered, axis=1, keepdims=True) / tokens
    std = _root(jnp.sum(lengths * centered**2, axis=1, keepdims=True) / tokens)
    normalized = jnp.where((lengths > 0) & (std > eps), centered / jnp.where(std > eps, std + eps, 1), 0)
    outlier = jnp.any(jnp.abs(normalized) >= max_abs, axis=1, keepdims=True)
    rows = group_normalize(rewards, group_size, eps=eps).reshape(valid.shape)
    return per_token(jnp.where(outlier, rows, normalized).reshape(-1), mask)


def entropy_scaled(
    advantages: Float[ArrayLike, "B"],
    entropies: Float[ArrayLike, "B T"],
    mask: Bool[ArrayLike, "B T"],
    *,
    floor: float = 0.1,
) -> Float[Array, "B"]:
    """EDGE-GRPO's entropy-driven advantage: rows that were surer than the average count more.

    A'_i = A_i · H̄ / max(H̄_i, floor·H̄),  H̄_i = mean entropy of row i's tokens,  H̄ = mean of H̄_i over non-empty rows

    The entropies are constants. The published code averages H̄_i over all columns, padding included, lets the gradient
    through it, and has no floor; the mean over tokens, the stopped gradient and the floor, which bounds the factor by
    1 / floor, are our choice. Empty rows get 0.

    Source: Zhang et al. 2025 (EDGE-GRPO), arXiv 2507.21848, and its code (ZhangXJ199/EDGE-GRPO).
    """
    advantages = _at_least_float32(advantages)
    entropies = jax.lax.stop_gradient(jnp.where(mask, entropies, 0)).astype(advantages.dtype)
    lengths = jnp.sum(mask, axis=1)
    own = jnp.sum(entropies, axis=1) / jnp.maximum(lengths, 1)
    mean = jnp.sum(own) / jnp.maximum(jnp.sum(lengths > 0), 1)
    # Where no token has any entropy, no row was surer than another.
    factor = jnp.where(mean > 0, mean / jnp.where(mean > 0, jnp.maximum(own, floor * mean), 1), 1)
    return jnp.where(lengths > 0, factor * advantages, 0)


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


def _root(x: Float[Array, "P 1"]) -> Float[Array, "P 1"]:
    """√x; its slope at 0 is infinite, so a group without spread must not reach it, not even unselected."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


def _at_least_float32(x: Float[ArrayLike, "B"]) -> Float[Array, "B"]:
    return jnp.asarray(x, jnp.result_type(x, jnp.float32))

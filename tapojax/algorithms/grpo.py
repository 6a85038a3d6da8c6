"""GRPO: group-normalised rewards, PPO's clip, no value network. Shao et al., arXiv 2402.03300, eq. 3."""

from tapojax import advantages, losses, weights
from tapojax.types import Algorithm

KL_ESTIMATORS = {"k1": losses.kl_k1, "k2": losses.kl_k2, "k3": losses.kl_k3}


def grpo(
    *,
    group_size: int,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 0.0,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
) -> Algorithm:
    """A = (R - mean) / std within the group; per-token clipped surrogate plus kl_coef * KL to the reference, averaged
    over each row's tokens, then over rows. Neutral: dual_clip = 0 (off), kl_coef = 0."""

    def advantage(rewards, scores, rollout):
        return advantages.per_token(advantages.group_normalize(rewards, group_size), rollout.mask)

    def loss(stats, batch):
        ratio_inputs = stats.logprobs, batch.old_logprobs, batch.advantages
        clip = dict(clip_low=clip_low, clip_high=clip_high)
        per_token = losses.clipped_surrogate(*ratio_inputs, **clip, dual_clip=dual_clip or None)
        diagnostics = {"clip_fraction": losses.clip_fraction(*ratio_inputs, **clip)}
        if kl_coef:
            kl = KL_ESTIMATORS[kl_estimator](stats.logprobs, batch.ref_logprobs)
            per_token, diagnostics["reference_kl"] = per_token + kl_coef * kl, kl
        return per_token, diagnostics

    return Algorithm(group_size, advantage, loss, weights.sequence_mean, needs_reference=kl_coef != 0)

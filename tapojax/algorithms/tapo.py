"""TAPO: teacher and perturbed-answer injection. Jiang et al., AAAI 2026, "TAPO: Dynamic Teacher and Perturbed Answer
Injection".

Fact, from the abstract and a README (neither full text nor code is public): collapsed groups get a teacher's or an
adversarial completion (DTI), right completions get a flipped answer (PAI), injected rows get fixed token advantages
while the group normalisation stays (ALI), and redundancy is priced beside length (InfoLen). All numbers and rules are
our choice.

Differs from DAPO: the four parts, in place of dynamic sampling.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tapojax import advantages, shaping
from tapojax.algorithms import injection
from tapojax.algorithms.dapo import dapo
from tapojax.types import Algorithm, Task


def tapo(
    *,
    group_size: int,
    max_tokens: int,
    task: Task,
    use_dti: bool = True,
    use_pai: bool = True,
    use_ali: bool = True,
    use_infolen: bool = True,
    teacher_advantage: float = 1.0,
    wrong_advantage: float = -0.5,
    reasoning_advantage: float = 0.5,
    answer_advantage: float = -1.0,
    perturb_probability: float = 0.5,
    min_probability: float = 1e-4,
    luffy_shaping: float = 0.0,
    length_weight: float = 0.3,
    redundancy_weight: float = 0.2,
    std_floor: float = 0.1,
    cache_tokens: int = 2**20,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float = 3.0,
) -> Algorithm:
    """Each `use_` flag ablates one part; without any this is DAPO. Without `use_ali` injected rows enter the group's
    statistics with reward 1 (teacher) or 0.

    Args:
      min_probability: injected tokens below it are not pushed down further.
      luffy_shaping: gamma of LUFFY's policy shaping p / (p + gamma) on teacher rows, without ratio and clip (Yan et
        al., arXiv 2504.14945, gamma 0.1); 0: the clipped ratio, as on all rows.
      std_floor: of the group's std, so that InfoLen's small differences among right rows are not blown up.
      cache_tokens: bound of the remembered completions.
    """
    parent = dapo(
        group_size=group_size,
        max_tokens=max_tokens,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        dynamic_sampling=False,
    )
    injects = use_dti or use_pai
    probability = perturb_probability if use_pai else 0.0
    rules: dict[str, Any] = dict(use_dti=use_dti, probability=probability, cache_tokens=cache_tokens)
    prices: dict[str, Any] = dict(length_weight=length_weight, redundancy_weight=redundancy_weight)

    def inject(rollout, scores, prompts, key, memory, score):
        correct, scores = np.asarray(scores["correct"]), dict(scores)
        if use_infolen:
            texts = injection.right_completions(rollout, correct, task)
            lexical = shaping.lexical_redundancy(rollout.tokens, rollout.mask)
            redundancy, lengths = 0.5 * lexical + 0.5 * shaping.semantic_redundancy(texts), rollout.mask.sum(axis=1)
            scores["infolen"] = np.asarray(
                shaping.infolen(correct, lengths, redundancy, max_length=max_tokens, **prices)
            )
        if injects:
            rewards = scores.get("infolen", correct)
            rows = injection.Rows(rollout, correct, rewards, prompts, group_size, max_tokens)
            rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
            candidates, memory = injection.plan(rows, task, memory, rng, **rules)
            rollout, origins = injection.overwrite(rollout, injection.most_likely(candidates, rollout, score))
            scores |= origins
        return rollout, scores, memory

    def rewards(scores, rollout, step):
        """Of the sampled rows, also where one was replaced; without ALI the injected rows' own."""
        own = scores["infolen"] if use_infolen else parent.rewards(scores, rollout, step)
        return own if use_ali else jnp.where(rollout.source > 0, rollout.source == injection.TEACHER, own)

    def advantage(rewards, scores, rollout):
        of_row = advantages.group_normalize(rewards, group_size, std_floor=std_floor if use_infolen else 0.0)
        sampled = advantages.per_token(of_row, rollout.mask)
        return intervene(sampled, scores, rollout) if injects and use_ali else sampled

    def intervene(sampled, scores, rollout):
        """ALI: what each token of an injected row is worth, whatever its group did."""
        position = jnp.arange(rollout.mask.shape[1]) - rollout.prompt_lengths[:, None]
        begin, end = (jnp.nan_to_num(scores[name], nan=jnp.inf)[:, None] for name in ("span_begin", "span_end"))
        flipped = jnp.where(position < begin, reasoning_advantage, jnp.where(position < end, answer_advantage, 0))
        whole = jnp.where(rollout.source == injection.TEACHER, teacher_advantage, wrong_advantage)[:, None]
        fixed = jnp.where(jnp.isnan(scores["span_begin"])[:, None], whole, flipped)
        return jnp.where(rollout.mask, jnp.where(rollout.source[:, None] > 0, fixed, sampled), 0)

    def signals(old_stats, rollout):
        injected = rollout.mask & (rollout.source[:, None] > 0)
        impossible = injected & (old_stats.logprobs < np.log(min_probability))
        teacher = rollout.mask & (rollout.source[:, None] == injection.TEACHER)
        return {"impossible": impossible.astype(float), "teacher": teacher.astype(float)}

    def loss(stats, batch):
        guarded = jnp.where((batch.advantages < 0) & (batch.signals["impossible"] > 0), 0, batch.advantages)
        per_token, diagnostics = parent.loss(stats, batch._replace(advantages=guarded))
        if luffy_shaping:
            probability = jnp.exp(stats.logprobs)
            shaped = -guarded * probability / (probability + luffy_shaping)
            per_token = jnp.where(batch.signals["teacher"] > 0, shaped, per_token)
        return per_token, diagnostics

    if not injects:
        return parent._replace(inject=inject if use_infolen else None, rewards=rewards, advantages=advantage)
    return parent._replace(
        inject=inject,
        memory={},
        rewards=rewards,
        signals=signals,
        advantages=advantage,
        loss=loss,
        diagnostics=functools.partial(injection.shares, group_size=group_size),
    )

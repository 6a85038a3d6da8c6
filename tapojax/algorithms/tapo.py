"""TAPO: teacher and perturbed-answer injection. Jiang et al., AAAI 2026, "TAPO: Dynamic Teacher and Perturbed Answer
Injection".

Fact, from the abstract and a README (neither full text nor code is public): collapsed groups get a teacher's or an
adversarial completion (DTI), right completions get a flipped answer (PAI), injected rows get fixed token advantages
while the group normalisation stays (ALI), and redundancy is priced beside length (InfoLen). All numbers and rules are
our choice.

Differs from DAPO: the four parts, in place of dynamic sampling.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tapojax import advantages, shaping
from tapojax.algorithms import injection
from tapojax.algorithms.dapo import dapo
from tapojax.types import Algorithm, Task

SOURCES = {"teacher": injection.TEACHER, "wrong": injection.WRONG, "perturbed": injection.PERTURBED}


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
    dynamic_sampling: bool = False,
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
        dynamic_sampling=dynamic_sampling,
    )
    injects = use_dti or use_pai

    def inject(rollout, scores, prompts, key, memory, score):
        correct, scores = np.asarray(scores["correct"]), dict(scores)
        if use_infolen:
            scores["infolen"] = _infolen(rollout, correct)
        rows = injection.Rows(rollout, correct, scores.get("infolen", correct), prompts, group_size, max_tokens)
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        candidates: list[injection.Candidate] = []
        if use_dti:
            memory = injection.consult(memory, rows, task)
            candidates += injection.dynamic_teacher(rows, task, memory, rng)
            memory = injection.remember(memory, rows, limit=cache_tokens)
        if use_pai:
            taken = {candidate.row for candidate in candidates}
            candidates += injection.perturbed_answers(rows, task, taken, rng, perturb_probability)
        if injects:
            rollout, channels = injection.overwrite(rollout, injection.most_likely(candidates, rollout, score))
            scores |= channels
        return rollout, scores, memory

    def _infolen(rollout, correct):
        rows = zip(rollout.tokens, rollout.mask, correct, strict=True)
        completions = [tokens[mask].tolist() if right else [] for tokens, mask, right in rows]  # the others get 0
        texts = [task.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in completions]
        lexical = shaping.lexical_redundancy(rollout.tokens, rollout.mask)
        redundancy = 0.5 * lexical + 0.5 * shaping.semantic_redundancy(texts)
        shaped = shaping.infolen(
            correct,
            rollout.mask.sum(axis=1),
            redundancy,
            max_length=max_tokens,
            length_weight=length_weight,
            redundancy_weight=redundancy_weight,
        )
        return np.asarray(shaped)

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

    def keep(rewards, scores):
        """A repaired group is worth keeping."""
        repaired = ~np.isnan(np.asarray(scores["origin"])).reshape(-1, group_size)
        return repaired.any(axis=1) | (parent.keep is not None and parent.keep(rewards, scores))

    def diagnostics(rewards, scores, rollout, step):
        groups, source = np.asarray(scores["correct"]).reshape(-1, group_size), np.asarray(rollout.source)
        wrong, right = np.all(groups == 0, axis=1), np.all(groups == 1, axis=1)
        repaired = np.any(source.reshape(-1, group_size) > 0, axis=1)[wrong | right]
        numbers = {f"injected_{name}": float(np.mean(source == code)) for name, code in SOURCES.items()}
        injected = np.asarray(rollout.behaviour_logprobs)[rollout.mask & (source[:, None] > 0)]
        return {
            "all_wrong_groups": float(wrong.mean()),
            "all_right_groups": float(right.mean()),
            "repaired_groups": float(repaired.mean()) if repaired.size else float("nan"),
            **numbers,
            "injected_logprob": float(injected.mean()) if injected.size else float("nan"),
        }

    if not injects:
        return parent._replace(inject=inject if use_infolen else None, rewards=rewards, advantages=advantage)
    return parent._replace(
        inject=inject,
        memory={},
        rewards=rewards,
        keep=keep if dynamic_sampling else None,
        signals=signals,
        advantages=advantage,
        loss=loss,
        diagnostics=diagnostics,
    )

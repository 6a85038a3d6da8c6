"""TAPO's host side: which rows of a rollout batch are replaced by what, and the bounded memory of completions.

The published sources fix only the idea: teacher completions for all-wrong groups, adversarial ones for all-correct
groups (DTI), and right reasoning with a flipped answer (PAI). All rules and limits below are our choice.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tapojax.types import Example, Perturbed, Prompts, Rollout, Task

SAMPLED, TEACHER, WRONG, PERTURBED = range(4)  # Rollout.source
OWN, STRONGER, SOLUTION, SURGERY = 1, 2, 3, 4  # the score channel `origin`; NaN on sampled rows
PER_PROMPT = 4  # completions remembered of each kind


class Rows(NamedTuple):
    """A scored rollout batch: `correct` and `rewards` [B], NaN where there is no score."""

    rollout: Rollout
    correct: Any
    rewards: Any
    prompts: Prompts
    group_size: int
    max_tokens: int  # of a completion


class Candidate(NamedTuple):
    """A completion that may replace `row`; the span of its exchanged answer is empty where there is none."""

    row: int
    source: int
    origin: int
    completion: Perturbed


def plan(
    rows: Rows, task: Task, memory: Mapping, rng, *, use_dti: bool, probability: float, cache_tokens: int
) -> tuple[list[Candidate], Mapping]:
    """All candidates of a batch, DTI's before PAI's, and the memory after it. PAI's probability may be 0."""
    candidates: list[Candidate] = []
    if use_dti:
        memory = consult(memory, rows, task)
        candidates += dynamic_teacher(rows, task, memory, rng)
        memory = remember(memory, rows, limit=cache_tokens)
    taken = {candidate.row for candidate in candidates}
    return candidates + perturbed_answers(rows, task, taken, rng, probability), memory


def dynamic_teacher(rows: Rows, task: Task, memory: Mapping, rng) -> list[Candidate]:
    """DTI: right completions for the worst row of each all-wrong group, wrong ones for that of each all-correct group.

    Right: what is remembered of this prompt (stronger models', the reference solution, the policy's own). Wrong: the
    policy's own remembered failures; without any, its best right row with another answer.
    """
    found = []
    for example, group in _groups(rows):
        if not group or 0 < sum(rows.correct[group]) < len(group):
            continue
        worst, right = _worst(group, rows), bool(rows.correct[group[0]])
        remembered = memory.get(str(example["id"]), {}).get("wrong" if right else "right", [])
        for origin, tokens in remembered:
            found.append(Candidate(worst, WRONG if right else TEACHER, origin, Perturbed(tokens, 0, 0)))
        if right and not remembered and len(group) > 1:
            best = _best([row for row in group if row != worst], rows)
            if perturbed := _perturb(task, example, rows, best, [], rng):
                found.append(Candidate(worst, WRONG, SURGERY, perturbed))
    return found


def perturbed_answers(rows: Rows, task: Task, taken: set[int], rng, probability: float) -> list[Candidate]:
    """PAI: the best right row with a wrong answer, in place of a wrong row where two are, else of a third right one.

    The answers that wrong rows of the same group gave are tried first. A group with a `taken` row is passed over, and
    the last right or wrong row of a group is never replaced.
    """
    found = []
    for example, group in _groups(rows):
        right, wrong = ([row for row in group if rows.correct[row] == value] for value in (1, 0))
        passed_over = rng.random() >= probability or taken & set(group)
        if passed_over or not right or (len(wrong) < 2 and len(right) < 3):
            continue
        best = _best(right, rows)
        target = _worst(wrong if len(wrong) >= 2 else [row for row in right if row != best], rows)
        answers = [task.answer(_text(task, rows.rollout, row)) for row in wrong]
        if perturbed := _perturb(task, example, rows, best, [a for a in answers if a is not None], rng):
            found.append(Candidate(target, PERTURBED, SURGERY, perturbed))
    return found


def most_likely(candidates: Sequence[Candidate], rollout: Rollout, score: Callable) -> list[tuple[Candidate, Any]]:
    """For each row to replace, the candidate of the highest mean log-prob under the policy, with its log-probs [T].

    The least off-policy candidate moves the policy least. Candidates are scored in batches of the rollout's own shape.
    """
    best: dict[int, tuple[float, Candidate, Any]] = {}
    size = len(rollout.tokens)
    for start in range(0, len(candidates), size):
        part = candidates[start : start + size]
        at = np.resize([candidate.row for candidate in part], size)
        tokens, mask = rollout.tokens[at].copy(), rollout.mask[at].copy()
        for i, candidate in enumerate(part):
            _write(tokens[i], mask[i], int(rollout.prompt_lengths[candidate.row]), candidate.completion.tokens)
        logprobs = np.asarray(score(tokens, mask).logprobs)
        for candidate, row_logprobs, row_mask in zip(part, logprobs, mask, strict=False):
            mean = row_logprobs[row_mask].mean()
            if candidate.row not in best or mean > best[candidate.row][0]:
                best[candidate.row] = mean, candidate, row_logprobs
    return [(candidate, row_logprobs) for _, candidate, row_logprobs in best.values()]


def overwrite(rollout: Rollout, chosen: Sequence[tuple[Candidate, Any]]) -> tuple[Rollout, dict]:
    """The rollout with the chosen rows in place of the old ones, and where each came from as score channels.

    Channels: `origin`, `span_begin` and `span_end` (completion tokens of the exchanged answer); NaN where there is
    none. The rows' log-probs are the trainer's own, since no sampler drew them.
    """
    rollout = Rollout(*(None if field is None else np.array(field) for field in rollout))
    channels = {name: np.full(len(rollout.mask), np.nan, np.float32) for name in ("origin", "span_begin", "span_end")}
    for (row, source, origin, completion), logprobs in chosen:
        _write(rollout.tokens[row], rollout.mask[row], int(rollout.prompt_lengths[row]), completion.tokens)
        rollout.behaviour_logprobs[row] = rollout.base_logprobs[row] = logprobs
        rollout.source[row], rollout.truncated[row] = source, False
        if rollout.versions is not None:
            rollout.versions[row] = -1
        channels["origin"][row] = origin
        if completion.end > completion.begin:
            channels["span_begin"][row], channels["span_end"][row] = completion.begin, completion.end
    return rollout, channels


def remember(memory: Mapping, rows: Rows, *, limit: int) -> dict:
    """Adds the finished rows to the memory, the newest PER_PROMPT of each kind a prompt; the oldest prompts go first.

    The memory maps a prompt's id to {"right": [[origin, tokens], ...], "wrong": [...]} and holds `limit` tokens.
    """
    memory, rollout = dict(memory), rows.rollout
    for row in np.flatnonzero(~np.isnan(rows.correct) & ~rollout.truncated).tolist():
        kind, tokens = "right" if rows.correct[row] else "wrong", rollout.tokens[row][rollout.mask[row]].tolist()
        add(memory, str(rows.prompts.examples[row // rows.group_size]["id"]), kind, OWN, tokens)
    used = sum(_size(entry) for entry in memory.values())
    while used > limit:
        used -= _size(memory.pop(next(iter(memory))))
    return memory


def consult(memory: Mapping, rows: Rows, task: Task) -> dict:
    """Feeds reference solutions and stronger models' completions of all-wrong prompts that nothing right is known of.

    Only what the verifier accepts and what fits the budget enters the memory.
    """
    memory, asked = dict(memory), []
    for example, group in _groups(rows):
        if group and not any(rows.correct[group]) and not memory.get(str(example["id"]), {}).get("right"):
            solution = task.solution(example) if task.solution else None
            asked += [(example, SOLUTION, "".join(solution))] if solution else []
            asked += [(example, STRONGER, text) for text in (task.teacher(example) if task.teacher else ())]
    if asked:
        examples, origins, texts = zip(*asked, strict=True)
        accepted = task.score(examples, texts)[0]["correct"] == 1
        for example, origin, text, right in zip(examples, origins, texts, accepted, strict=True):
            tokens = [*task.tokenizer.encode(text, add_special_tokens=False), task.tokenizer.eos_token_id]
            if right and len(tokens) <= rows.max_tokens:
                add(memory, str(example["id"]), "right", origin, tokens)
    return memory


def right_completions(rollout: Rollout, correct, task: Task) -> list[str]:
    """The completions as text, empty for wrong rows."""
    return [_text(task, rollout, row) if right else "" for row, right in enumerate(correct)]


def shares(rewards, scores, rollout: Rollout, step: int, *, group_size: int) -> dict[str, float]:
    """For the log: how many groups collapsed and were repaired, the share of rows of each source, and how likely the
    policy found the injected tokens (mean log-prob)."""
    groups, source = np.asarray(scores["correct"]).reshape(-1, group_size), np.asarray(rollout.source)
    wrong, right = np.all(groups == 0, axis=1), np.all(groups == 1, axis=1)
    repaired = np.any(source.reshape(-1, group_size) > 0, axis=1)[wrong | right]
    injected = np.asarray(rollout.behaviour_logprobs)[rollout.mask & (source[:, None] > 0)]
    kinds = {"teacher": TEACHER, "wrong": WRONG, "perturbed": PERTURBED}
    return {
        "all_wrong_groups": float(wrong.mean()),
        "all_right_groups": float(right.mean()),
        "repaired_groups": float(repaired.mean()) if repaired.size else float("nan"),
        **{f"injected_{name}": float(np.mean(source == code)) for name, code in kinds.items()},
        "injected_logprob": float(injected.mean()) if injected.size else float("nan"),
    }


def add(memory: dict, key: str, kind: str, origin: int, tokens: Sequence[int]):
    """Puts one completion into `memory` unless it is known; its prompt becomes the newest."""
    entry = memory.pop(key, {"right": [], "wrong": []})
    if tokens not in [known for _, known in entry[kind]]:
        entry = {**entry, kind: [*entry[kind], [origin, list(tokens)]][-PER_PROMPT:]}
    memory[key] = entry


def _size(entry: Mapping) -> int:
    return sum(len(tokens) for known in entry.values() for _, tokens in known)


def _groups(rows: Rows) -> Iterator[tuple[Example, list[int]]]:
    """Each prompt's example and those of its rows that have a score."""
    for group, example in enumerate(rows.prompts.examples):
        first = group * rows.group_size
        yield example, [row for row in range(first, first + rows.group_size) if not np.isnan(rows.correct[row])]


def _worst(group: Sequence[int], rows: Rows) -> int:
    """The row of the lowest reward, of these the longest, of these the last."""
    return min(group, key=lambda row: (rows.rewards[row], -rows.rollout.mask[row].sum(), -row))


def _best(group: Sequence[int], rows: Rows) -> int:
    return max(group, key=lambda row: (rows.rewards[row], -row))


def _text(task: Task, rollout: Rollout, row: int) -> str:
    return task.tokenizer.decode(rollout.tokens[row][rollout.mask[row]].tolist(), skip_special_tokens=True)


def _perturb(task: Task, example: Example, rows: Rows, row: int, suggestions, rng) -> Perturbed | None:
    """The row's completion with another answer, where the task can write one that fits the budget."""
    if task.perturb is None:
        return None
    tokens = rows.rollout.tokens[row][rows.rollout.mask[row]].tolist()
    perturbed = task.perturb(example, tokens, suggestions, rng)
    return perturbed if perturbed is not None and len(perturbed.tokens) <= rows.max_tokens else None


def _write(tokens, mask, prompt_length: int, completion: Sequence[int]):
    """Replaces a row's completion in place; what stands behind it is padding to everyone, for the mask says so."""
    mask[:] = False
    mask[prompt_length : prompt_length + len(completion)] = True
    tokens[prompt_length : prompt_length + len(completion)] = completion
    tokens[prompt_length + len(completion) :] = 0

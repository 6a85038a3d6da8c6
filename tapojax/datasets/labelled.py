r"""Solutions in steps with the first wrong one marked: ProcessBench, FAPO-Critic, PRMBench, PRM800K, and ours.

All become {id, problem, answer, steps, label}: label is the 0-based index of the first wrong step, -1 if none is,
-2 if the source marks none that exists. With them, where there are, `prompt` (a critic's own wording) and
`final_answer_correct`.
"""

import re
from typing import Any

from tapojax.datasets import schema

UNKNOWN = -2
PARAGRAPH = re.compile(r"<paragraph_(\d+)>\n?(.*?)\n?</paragraph_\1>", re.DOTALL)
SECTIONS = re.compile(r"\[Math Problem\]\s*(.*?)\s*\[Ground Truth\]\s*(.*?)\s*\[AI Solution\]", re.DOTALL)


def holds_steps(row: schema.Row) -> bool:
    """Whether a row is a solution in steps rather than a problem."""
    return _layout(row) is not None


def critique(row: schema.Row, place: str, default_id: str) -> dict[str, Any]:
    """The row in our fields.

    Raises:
      ValueError: it is of no known layout, or its label is no step of it.
    """
    read = _layout(row)
    if read is None:
        raise ValueError(
            f"{place}: expected steps, a list of texts, and label, the index of one of them or -1; it has {sorted(row)}"
        )
    found = read(row, place)
    steps, label = found["steps"], found["label"]
    texts = isinstance(steps, list) and steps and all(isinstance(step, str) for step in steps)
    if not texts or isinstance(label, bool) or not isinstance(label, int) or not UNKNOWN <= label < len(steps):
        raise ValueError(
            f"{place}: expected steps, a list of texts, and label, the index of one of them or -1; it has label "
            f"{label!r} and {len(steps) if texts else 'no'} steps"
        )
    if not found["problem"]:
        raise ValueError(f"{place}: no problem; it has {sorted(row)}")
    flat = schema.flattened(row)
    return {"id": schema.identity(flat, default_id)} | found | schema.kept(flat)


def _layout(row: schema.Row):
    if isinstance(row.get("steps"), list) and "label" in row:
        return _processbench
    if "modified_process" in row and "error_steps" in row:
        return _prmbench
    if isinstance(row.get("label"), dict) and "steps" in row["label"]:
        return _prm800k
    prompt = row.get("prompt")
    if isinstance(prompt, list) and "<paragraph_0>" in str(schema.message(prompt, "user")):
        return _fapo_critic
    return None


def _processbench(row: schema.Row, place: str) -> dict[str, Any]:
    label = row["label"]
    found = {
        "problem": row.get("problem") or "",
        "answer": schema.text_of(row.get("answer"), place, "answer") or "",
        "steps": row["steps"],
        "label": UNKNOWN if label is None else label,
    }
    if row.get("prompt"):
        found["prompt"] = row["prompt"]
    if row.get("final_answer_correct") in (0, 1):  # -1 is unknown
        found["final_answer_correct"] = bool(row["final_answer_correct"])
    return found


def _fapo_critic(row: schema.Row, place: str) -> dict[str, Any]:
    """The problem, its answer and the paragraphs stand in the critic's prompt; all final answers are right."""
    prompt = schema.message(row["prompt"], "user")
    label = (row.get("reward_model") or {}).get("ground_truth")
    sections, tagged = SECTIONS.search(prompt), PARAGRAPH.findall(prompt)
    steps = [text for _, text in tagged]
    total = (row.get("extra_info") or {}).get("total_steps", len(steps))
    if sections is None or [int(index) for index, _ in tagged] != list(range(total)):
        raise ValueError(f"{place}: its prompt holds paragraphs {[i for i, _ in tagged]}, total_steps is {total}")
    problem, answer = sections.groups()
    raw = (row.get("extra_info") or {}).get("raw_info") or {}
    right = raw.get("final_answer_correct", True)
    return {
        "problem": problem,
        "answer": answer,
        "steps": steps,
        "label": label,
        "prompt": prompt,
        "final_answer_correct": right,
    }


def _prmbench(row: schema.Row, place: str) -> dict[str, Any]:
    """Its error steps count from 1, some past the end."""
    steps, wrong = row["modified_process"], row["error_steps"] or []
    inside = [number - 1 for number in wrong if 1 <= number <= len(steps)]
    label = min(inside) if inside else UNKNOWN if wrong else -1
    problem = row.get("modified_question") or row.get("question") or row.get("original_question") or ""
    return {"problem": problem, "answer": "", "steps": steps, "label": label}


def _prm800k(row: schema.Row, place: str) -> dict[str, Any]:
    """The path that the labeller took: the chosen completion of a step, else the human's, else the worst of them.

    Where the labeller gave up, or found the problem bad, before a wrong step, none is known.
    """
    taken = [_taken(step, f"{place}, step {number}") for number, step in enumerate(row["label"]["steps"])]
    ratings = [one.get("rating") for one in taken]
    given_up = row["label"].get("finish_reason") in ("give_up", "bad_problem")
    question = row.get("question") or {}
    answer = schema.text_of(question.get("ground_truth_answer"), place, "ground_truth_answer") or ""
    label = ratings.index(-1) if -1 in ratings else UNKNOWN if given_up else -1
    steps = [one["text"] for one in taken]
    return {"problem": question.get("problem") or "", "answer": answer, "steps": steps, "label": label}


def _taken(step: dict[str, Any], place: str) -> dict[str, Any]:
    offered, chosen = step.get("completions") or [], step.get("chosen_completion")
    if chosen is None and step.get("human_completion"):
        return {"rating": 1} | _completion(step["human_completion"])
    if not 0 <= (chosen or 0) < len(offered):
        raise ValueError(f"{place}: it has {len(offered)} completions, none of a human, and {chosen} is chosen")
    worst = min(offered, key=lambda one: 0 if one.get("rating") is None else one["rating"])
    return worst if chosen is None else offered[chosen]


def _completion(said: Any) -> dict[str, Any]:
    return said if isinstance(said, dict) else {"text": said}

r"""Critiques of worked solutions from files: FAPO's critic data, ProcessBench, or anything with steps and a label.

Rows hold a problem, the steps of a solution, the index of the first wrong step (-1: none) and, where known, the right
answer, in any layout that `datasets.labelled` reads. The critic is asked as in FAPO, Ding et al., arXiv 2510.22543:
problem, answer, indexed steps, then to say the index in a \boxed{} (our wording; a released critic wants its own, which
is in `prompt` of its data).
"""

import re
from collections.abc import Sequence

from tapojax.datasets import labelled
from tapojax.rewards import spans, verdicts
from tapojax.tasks import critiques, data, files
from tapojax.types import Example, Task

QUESTION = r"""Here is a mathematical problem{known}, and a solution whose steps are numbered from 0.

[Problem]
{problem}
{answer}
[Solution]
{steps}

Go through the steps in their order and check each. Say which is the first one with an error, reasoning step by step; \
put its number into \boxed{{}}, or -1 if no step has an error."""

PARAGRAPHS = re.compile(r"\n[^\S\n]*\n")


def critique_files(
    *,
    seed: int,
    max_prompt_tokens: int,
    tokenizer_path: str = "",
    train_path: str = "",
    evaluation_path: str = "",
    chat: bool = True,
    overlong_prompts: str = "error",
) -> Task:
    """Rows {"problem", "steps": [...], "label"}, with "answer" and "prompt" where there are; a prompt is used as it is.

    Channels are those of `critiques`. Other arguments as in `files`.

    Raises:
      ValueError: a missing file, a row without steps or with a label outside them; each is named.
    """
    del seed  # files have one order; the run's seed shuffles it
    tokenizer = files.load_tokenizer(tokenizer_path)

    def prompt(example: Example) -> list[int]:
        question = example["question"]
        return files.chat_prompt(tokenizer, question) if chat else tokenizer.encode(question)

    def read(path: str) -> list[Example]:
        rows = [_example(row, path, number) for number, row in enumerate(data.read_rows(path), 1)]
        return files.within_budget(rows, prompt, max_prompt_tokens, overlong_prompts, path)

    def score(examples: Sequence[Example], completions: Sequence[str]):
        said = [verdicts.parse(text, e["num_steps"]) for text, e in zip(completions, examples, strict=True)]
        return critiques.channels(examples, said), [None] * len(completions)

    return Task(
        tokenizer=tokenizer,
        train=read(train_path) if train_path else [],
        evaluation=read(evaluation_path) if evaluation_path else [],
        prompt=prompt,
        score=score,
        answer=_answer,
    )


def split(completion: str, tag: str = "step ") -> list[str]:
    """The steps of a completion: its paragraphs, without thoughts, as the data of FAPO's critic has them (our choice).

    Raises:
      ValueError: there is none, or one contains the end of a tag and would pass for several.
    """
    steps = [step.strip() for step in PARAGRAPHS.split(verdicts.answered(completion) or "") if step.strip()]
    if not steps:
        raise ValueError("the completion has no text beside its thoughts")
    for step in steps:
        if f"</{tag}" in step:
            raise ValueError(f"the completion contains {f'</{tag}'!r}, which ends a step: {step[:200]!r}")
    return steps


def tagged(steps: Sequence[str], tag: str = "step ") -> str:
    """The steps, each between tags with its number."""
    return "\n".join(f"<{tag}{index}>\n{step}\n</{tag}{index}>" for index, step in enumerate(steps))


def ask(problem: str, answer: str, steps: str) -> str:
    """The user message that asks for a critique of tagged steps; answer "" where none is known."""
    return QUESTION.format(
        known=" with its right answer" if answer else "",
        problem=problem,
        answer=f"\n[Answer]\n{answer}\n" if answer else "",
        steps=steps,
    )


def to_criticise(example: Example, completion: str) -> Example:
    """The row that asks for a critique of a completion, in the same words as in training.

    Raises:
      ValueError: see `split`.
    """
    steps = split(completion)
    question = ask(example["problem"], example["answer"], tagged(steps))
    return {"id": example["id"], "question": question, "num_steps": len(steps)}


def _answer(text: str) -> str | None:
    span = spans.boxed(text, 0)
    return text[slice(*span)].strip() if span else None


def _example(row: dict, path: str, number: int) -> Example:
    place = f"{path}, row {number}"
    found = labelled.critique(row, place, f"{path}/{number}")
    if found["label"] == labelled.UNKNOWN:
        raise ValueError(f"{place}: expected steps with a label to learn from, its label is unknown")
    question = found.get("prompt") or ask(found["problem"], found["answer"], tagged(found["steps"]))
    return {
        "id": found["id"],
        "problem": found["problem"],
        "answer": str(found["label"]),
        "question": question,
        "label": found["label"],
        "num_steps": len(found["steps"]),
        **{key: found[key] for key in ("subset", "final_answer_correct") if key in found},  # of a benchmark
    }

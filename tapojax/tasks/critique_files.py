r"""Critiques of worked solutions from files: FAPO's critic data, ProcessBench, or anything with steps and a label.

Rows hold a problem, the steps of a solution, the index of the first wrong step (-1: none) and, where known, the right
answer. The critic is asked as in FAPO, Ding et al., arXiv 2510.22543: problem, answer, indexed steps, then to say the
index in a \boxed{} (our wording; a released critic wants its own, which is in `prompt` of its data).
"""

from collections.abc import Sequence

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


def _answer(text: str) -> str | None:
    span = spans.boxed(text, 0)
    return text[slice(*span)].strip() if span else None


def _example(row: dict, path: str, number: int) -> Example:
    steps, label = row.get("steps"), row.get("label")
    if not isinstance(steps, list) or not isinstance(label, int) or not -1 <= label < len(steps):
        raise ValueError(
            f"{path}, row {number}: expected steps, a list of texts, and label, the index of one of them or -1; it has "
            f"label {label!r} and {len(steps) if isinstance(steps, list) else 'no'} steps"
        )
    answer = str(row.get("answer") or "")
    question = row.get("prompt") or QUESTION.format(
        known=" with its right answer" if answer else "",
        problem=row.get("problem", ""),
        answer=f"\n[Answer]\n{answer}\n" if answer else "",
        steps="\n".join(f"<step {index}>\n{step}\n</step {index}>" for index, step in enumerate(steps)),
    )
    return {
        "id": str(row.get("id", f"{path}/{number}")),
        "problem": str(row.get("problem", "")),
        "answer": str(label),
        "question": question,
        "label": label,
        "num_steps": len(steps),
    }

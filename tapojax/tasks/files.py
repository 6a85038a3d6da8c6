"""Problems from files, a Hugging Face tokenizer and its chat template, graded by the answer verifier."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tapojax.datasets import schema
from tapojax.rewards import answers, solutions, spans, surgery
from tapojax.tasks import data, order
from tapojax.types import Example, Examples, Task

INSTRUCTION = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."


def files(
    *,
    seed: int,
    max_prompt_tokens: int,
    tokenizer_path: str = "",
    train_path: str = "",
    evaluation_path: str = "",
    problem_key: str = "",
    answer_key: str = "",
    solution_key: str = "",
    pass_rate_key: str = "pass_rate",
    teacher_path: str = "",
    template: str = INSTRUCTION,
    chat: bool = True,
    overlong_prompts: str = "error",
    deadline_s: float = 5.0,
) -> Task:
    """Rows with a problem and its final answer, from files as they are published (docs/data.md lists the layouts).

    Args:
      problem_key, answer_key, solution_key: columns to read instead of those that the layout says.
      train_path: one file, several as one ("a.jsonl,b.parquet"), or a mixture in the shares of their weights
        ("a.jsonl:3,b.parquet:1"). Of several, a problem's id begins with its file.
      pass_rate_key: of a number in [0, 1] that rows may have, for the curriculum.
      teacher_path: file with completions of a stronger model, rows {"id", "completion"}; `launch.teach` writes one.
      template: the user message, `{problem}` filled in; other braces are written twice, `\\boxed{{}}`.
      chat: wrap the message in the tokenizer's chat template and open the assistant's turn.
      overlong_prompts: "error" stops at a prompt past max_prompt_tokens, "drop" leaves such rows out.
      deadline_s: of the verifier, for one answer.

    Raises:
      ValueError: a missing file or column, a template without the problem, a tokenizer without end token, an overlong
        prompt; each is named.
    """
    del seed  # files have one order; the run's seed shuffles it
    schema.check_template(template, "task.template")
    tokenizer = load_tokenizer(tokenizer_path)

    def prompt(example: Example) -> list[int]:
        return open_turn(example) if chat else tokenizer.encode(template.format(problem=example["problem"]))

    def open_turn(example: Example, *said: str) -> list[int]:
        """The conversation up to where the assistant's next turn begins; it said `said` before."""
        return chat_prompt(tokenizer, template.format(problem=example["problem"]), *said)

    def read(path: str) -> list[Example]:
        rows = schema.examples(
            data.read_rows(path),
            Path(path).name,
            path,
            problem_key=problem_key,
            answer_key=answer_key,
            solution_key=solution_key,
            pass_rate_key=pass_rate_key,
        )
        return within_budget(list(rows), prompt, max_prompt_tokens, overlong_prompts, path)

    def read_sources(text: str) -> Examples:
        paths, weights = order.parse_sources(text)
        if len(paths) < 2:
            return read(paths[0]) if paths else []
        parts = [[{**row, "id": f"{path}:{row['id']}"} for row in read(path)] for path in paths]
        return order.Mixture(tuple(parts), tuple(weights)) if weights else [row for part in parts for row in part]

    def score(examples: Sequence[Example], completions: Sequence[str]):
        grades = answers.grade(completions, [e["answer"] for e in examples], deadline_s=deadline_s)
        correct = [np.nan if grade.correct is None else float(grade.correct) for grade in grades]
        return {"correct": np.array(correct, np.float32)}, [grade.error for grade in grades]

    train = read_sources(train_path)
    taught = data.read_completions(teacher_path, train) if teacher_path else {}
    return Task(
        tokenizer=tokenizer,
        train=train,
        evaluation=read(evaluation_path) if evaluation_path else [],
        prompt=prompt,
        score=score,
        answer=answers.extract,
        demonstration=lambda example, rng: _demonstration(example),
        solution=_solution,
        teacher=(lambda example: taught.get(example["id"], [])) if teacher_path else None,
        perturb=surgery.make_perturb(tokenizer, spans.find, score),
        closed_hint=(lambda example, tokens: open_turn(example, tokenizer.decode(tokens))) if chat else None,
    )


def _solution(example: Example) -> tuple[str, str] | None:
    text = example["solution"]
    return solutions.split(text, example["answer"]) if text else None


def _demonstration(example: Example) -> str:
    if (solution := _solution(example)) is None:
        raise ValueError(
            f"example {example['id']!r} has no solution to imitate: set task.solution_key, or sft.updates = 0"
        )
    return "".join(solution)


def load_tokenizer(path: str):
    """A Hugging Face tokenizer from a folder or hub name; its pad token falls back to the end token.

    Raises:
      ValueError: it cannot be loaded or has no end token.
    """
    from transformers import AutoTokenizer

    if not path:
        raise ValueError("task.tokenizer_path is empty: give the folder or hub name of a Hugging Face tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # transformers raises OSError, ValueError or worse, by what is missing
        raise ValueError(f"no tokenizer can be loaded from {path!r}: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer at {path!r} has no end-of-sequence token: add eos_token to its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id  # harmless: masks come from the sampler, not from values
    return tokenizer


def chat_prompt(tokenizer, *texts: str) -> list[int]:
    """The tokens of a conversation, user first and in turns, up to where the assistant's next turn begins."""
    messages = [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(texts)]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def within_budget(rows, prompt, max_prompt_tokens: int, overlong: str, path: str) -> list[Example]:
    """The rows whose prompts fit; overlong is "error" or "drop".

    Raises:
      ValueError: it is neither, or it is "error" and a prompt does not fit; the longest is named.
    """
    if overlong not in ("error", "drop"):
        raise ValueError(f"task.overlong_prompts={overlong!r}: choose 'error' or 'drop'")
    lengths = [len(prompt(row)) for row in rows]
    long = [i for i, length in enumerate(lengths) if length > max_prompt_tokens]
    if long and overlong == "error":
        worst = max(long, key=lengths.__getitem__)
        raise ValueError(
            f"{path}: {len(long)} of {len(rows)} prompts exceed sampling.max_prompt_tokens={max_prompt_tokens}, the "
            f"longest ({rows[worst]['id']}) has {lengths[worst]}: raise it, or set task.overlong_prompts='drop'"
        )
    return [row for row, length in zip(rows, lengths, strict=True) if length <= max_prompt_tokens]

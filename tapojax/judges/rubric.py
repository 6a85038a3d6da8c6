"""A judge that marks the reasoning of right rows by a rubric (PAPO, Tan et al., arXiv 2603.26535). No jax."""

from collections.abc import Callable

from tapojax.judges import endpoint as endpoints
from tapojax.judges import questions, templates
from tapojax.judges.judged import Judge
from tapojax.rewards import verdicts
from tapojax.types import Example


def rubric(
    *,
    model: str = "openai/gpt-oss-20b",
    temperature: float = 0.1,
    max_tokens: int = 4096,
    rubric: str = "three_level",
    prompt_file: str = "",
    endpoint: endpoints.Options = endpoints.DEFAULTS,
) -> Judge:
    """Marks in [0, 1] from a model behind an OpenAI-compatible endpoint, one question a row.

    What the student thought (`<think>...</think>`) is not shown. NaN and an error, where the published code gives 0: no
    reference solution where the rubric shows one, no text left, text that contains a tag of the prompt, a reply without
    a mark. max_tokens is 16,384 as published, which its server refuses at the published context of 8,192 tokens; 4,096
    is our choice.

    Args:
      rubric: three_level (0, 0.5, 1; the paper's), three_level_no_reference (the same for data without solutions),
        imo_bench (7, 6, 1, 0 points are 1, 0.8, 0.2, 0), checkpoints (points / 7).
      prompt_file: other words for that rubric, with the places {problem}, {solution} and, if wanted, {reference};
        replies are read as the rubric's.

    Raises:
      ValueError: an unknown rubric, a prompt without its places, see also `endpoint.make`.
    """
    if rubric not in READERS:
        raise ValueError(f"judge.rubric={rubric!r}: choose one of {[*READERS]}")
    text = templates.load(rubric, prompt_file, needs={"problem", "solution"}, may={"reference"})
    ends, shows_reference = templates.closing_tags(text), "reference" in templates.places(text)
    asked = endpoints.make(endpoints.Model(model, temperature, max_tokens), endpoint, section="judge")

    def question(example: Example, completion: str) -> questions.Question | str:
        solution, known = (verdicts.answered(completion) or "").strip(), example.get("solution")
        reference = known.strip() if isinstance(known, str) else ""
        if not solution:
            return "not judged: the completion has no text beside its thoughts"
        if shows_reference and not reference:
            return (
                f"not judged: {example['id']!r} has no reference solution: set task.solution_key, or take the rubric "
                "three_level_no_reference"
            )
        if found := [end for end in ends if end in solution]:
            return f"not judged: the completion contains {found[0]!r}, which ends a part of the judge's prompt"
        values = {"problem": example["problem"], "reference": reference, "solution": solution}
        return questions.Question(templates.fill(text, values), READERS[rubric])

    def judge(examples, completions):
        return questions.verdicts(asked, [question(*row) for row in zip(examples, completions, strict=True)])

    return judge


def imo_bench(reply: str) -> float | None:
    """The grade of IMO-Bench; points between its four grades count as published, as the nearest grade of their kind."""
    points = verdicts.parse_points(reply)
    return None if points is None else 1.0 if points == 7 else 0.8 if points >= 4 else 0.2 if points >= 1 else 0.0


def checkpoints(reply: str) -> float | None:
    """The share of the seven points."""
    points = verdicts.parse_points(reply)
    return None if points is None else points / 7


READERS: dict[str, Callable[[str], float | None]] = {
    "three_level": verdicts.parse_rubric,
    "three_level_no_reference": verdicts.parse_rubric,
    "imo_bench": imo_bench,
    "checkpoints": checkpoints,
}

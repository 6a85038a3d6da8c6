"""A second look at answers that the rule verifier calls wrong; it may call them right, never the reverse. No jax.

PAPO's code has such a fallback (Tan et al., arXiv 2603.26535); its paper describes the rule verifier alone.
"""

import numpy as np

from tapojax.judges import endpoint as endpoints
from tapojax.judges import judged, questions, templates
from tapojax.judges.judged import Judge
from tapojax.rewards import verdicts
from tapojax.types import Example, Task

SECTION = "answer_judge"


def answer(
    *,
    model: str = "openai/gpt-oss-20b",
    temperature: float = 0.0,
    max_tokens: int = 2048,
    prompt_file: str = "",
    tail: int = 2000,
    endpoint: endpoints.Options = endpoints.DEFAULTS,
) -> Judge:
    """1 where the completion's final answer is that of the problem in other words, 0 where it is not.

    A completion that contains a closing tag of the prompt is 0 and is not asked about: with NaN a policy could keep
    wrong answers out of its training by writing one.

    Args:
      prompt_file: other words, with the places {problem}, {answer} and {solution}; the reply ends in "Final Grade:
        CORRECT" or "Final Grade: INCORRECT".
      tail: characters at the end of the completion that are shown, without thoughts (our choice).

    Raises:
      ValueError: a prompt without its places, see also `endpoint.make`.
    """
    text = templates.load("answer", prompt_file, needs={"problem", "answer", "solution"}, may=())
    ends = templates.closing_tags(text)
    asked = endpoints.make(endpoints.Model(model, temperature, max_tokens), endpoint, section=SECTION)

    def question(example: Example, completion: str) -> questions.Question | str:
        shown = (verdicts.answered(completion) or "").strip()[-tail:]
        if found := [end for end in ends if end in shown]:
            return f"{SECTION}: the completion contains {found[0]!r}, which ends a part of the judge's prompt"
        values = {"problem": example["problem"], "answer": example["answer"], "solution": shown}
        return questions.Question(templates.fill(text, values), _right)

    def judge(examples, completions):
        given = [question(*row) for row in zip(examples, completions, strict=True)]
        said = questions.verdicts(asked, given)
        refused = np.array([isinstance(each, str) for each in given], bool)
        return said._replace(values=np.where(refused, np.float32(0), said.values))

    return judge


def second_look(task: Task, judge: Judge) -> Task:
    """The same task, whose wrong rows are right where the judge says so; everything else stays as the task has it.

    A row whose judge failed is NaN with the judge's error: whether it is wrong, nobody knows. Wrong rows without text
    are not asked about and stay wrong. Channel "answer_judge_asked" is 1 for rows that the judge was given,
    "answer_judge" what was said of them.
    """

    def score(examples, completions):
        scores, errors = task.score(examples, completions)
        correct = np.array(scores["correct"], np.float32)
        wrong = (correct == 0) & np.array([bool((verdicts.answered(text) or "").strip()) for text in completions], bool)
        rows = np.flatnonzero(wrong).tolist()
        said = judge([examples[row] for row in rows], [completions[row] for row in rows])
        values = judged.spread(said.values, rows, np.full(len(correct), np.nan))
        channels = {SECTION: values, f"{SECTION}_asked": wrong.astype(np.float32)}
        reasons = dict(zip(rows, said.errors, strict=True))
        errors = [reasons.get(row) or error for row, error in enumerate(errors)]
        correct = np.where(wrong, values, correct)
        return {**scores, "correct": correct, **channels, **judged.costs(SECTION, said, rows, correct)}, errors

    return task._replace(score=score)


def _right(reply: str) -> float | None:
    grade = verdicts.parse_grade(reply)
    return None if grade is None else float(grade)

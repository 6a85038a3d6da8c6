"""FAPO's generative reward model behind endpoints: is there a wrong step? Ding et al., arXiv 2510.22543. No jax."""

from tapojax.judges import endpoint as endpoints
from tapojax.judges import questions, templates
from tapojax.judges.judged import Judge
from tapojax.rewards import verdicts
from tapojax.tasks import critique_files
from tapojax.types import Example


def genrm(
    *,
    model: str = "genrm",
    temperature: float = 0.6,
    max_tokens: int = 8192,
    prompt_file: str = "",
    step_tag: str = "step ",
    endpoint: endpoints.Options = endpoints.DEFAULTS,
) -> Judge:
    r"""1 for a solution with a wrong step, 0 for one without, from a model trained on the task "critique_files".

    Steps are split and tagged as in that training; the published code inserts the response as it is. The verdict is the
    integer in the last `\boxed{}`, and must be -1 or the number of a step; the published code takes any other integer
    for a flaw, and no integer for none. Temperature 0.6 is that of the critic's validation.

    Args:
      prompt_file: another wording, with the places {problem}, {answer} and {steps}, for a critic trained on that.
      step_tag: what a step's tag says before its number; FAPO's released critic has "paragraph_".

    Raises:
      ValueError: a prompt without its places, see also `endpoint.make`.
    """
    places = {"problem", "answer", "steps"}
    text = templates.load("genrm", prompt_file, needs=places, may=()) if prompt_file else ""
    asked = endpoints.make(endpoints.Model(model, temperature, max_tokens), endpoint, section="judge")

    def question(example: Example, completion: str) -> questions.Question | str:
        try:
            steps = critique_files.split(completion, step_tag)
        except ValueError as error:
            return f"not judged: {error}"
        problem, answer, tagged = example["problem"], example["answer"], critique_files.tagged(steps, step_tag)
        values = {"problem": problem, "answer": answer, "steps": tagged}
        message = templates.fill(text, values) if text else critique_files.ask(problem, answer, tagged)
        return questions.Question(message, lambda reply: _flawed(reply, len(steps)))

    def judge(examples, completions):
        return questions.verdicts(asked, [question(*row) for row in zip(examples, completions, strict=True)])

    return judge


def _flawed(reply: str, num_steps: int) -> float | None:
    index = verdicts.parse(reply, num_steps)
    return None if index is None else float(index != -1)

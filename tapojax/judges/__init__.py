"""The judge table: name in a config -> constructor, and where its verdicts go."""

from collections.abc import Callable, Mapping
from typing import Any

from tapojax.judges import answer, classifier, critic, genrm, rubric

JUDGES: dict[str, Callable[..., Any]] = {
    "answer": answer.answer,
    "critic": critic.critic,
    "genrm": genrm.genrm,
    "outcome_model": classifier.outcome_model,
    "process_model": classifier.process_model,
    "rubric": rubric.rubric,
}
# what `judged` takes beside the judge, by default; "answer" is not here, for it has a section of its own
PLACES: dict[str, Mapping[str, Any]] = {
    "critic": {"channel": "flawed", "only_right": True},
    "genrm": {"channel": "flawed", "only_right": True},
    "outcome_model": {"channel": "reward", "only_right": False},
    "process_model": {"channel": "process", "only_right": True},
    "rubric": {"channel": "process", "only_right": True},
}
# judges whose programs here let devices wait for one another; outcome_model's and process_model's do not
EMBEDDED = frozenset({"critic"})

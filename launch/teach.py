"""Completions of a stronger model for the training problems of a config, kept where the verifier accepts them.

    python -m launch.teach --config=configs/tapo_math.py --config.task.teacher_path=teacher.jsonl \
        --endpoint=http://127.0.0.1:8000/v1 --teacher=Qwen/Qwen2.5-72B-Instruct

The endpoint speaks OpenAI's chat API (vLLM does) and gets task.template, filled in, as user message; several replicas
are separated by commas. Its key, if it wants one, is in the environment variable OPENAI_API_KEY. Rows
{"id", "completion"} are added to task.teacher_path, from where training reads them. Problems that are in the file are
not asked again: run it again after a stop, or for the problems that had no right completion.
"""

import concurrent.futures
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags

from launch import cli, sections
from tapojax.judges import endpoint
from tapojax.tasks import TASKS, data
from tapojax.types import Example, Task

ENDPOINT = flags.DEFINE_list("endpoint", ["http://127.0.0.1:8000/v1"], "address of the chat API, or of its replicas")
TEACHER = flags.DEFINE_string("teacher", None, "name of the model there", required=True)
COMPLETIONS = flags.DEFINE_integer("completions", 4, "asked for each problem", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.7, "of the teacher", lower_bound=0)
MAX_TOKENS = flags.DEFINE_integer("max_tokens", None, "of a completion [sampling.max_tokens]", lower_bound=1)
TIMEOUT_S = flags.DEFINE_float("timeout_s", 600, "for one completion", lower_bound=0.001)
RETRIES = flags.DEFINE_integer("retries", 3, "of a request that failed, with growing pauses", lower_bound=0)
REQUESTS = flags.DEFINE_integer("requests", 16, "under way at a time, at each replica", lower_bound=1)
MAX_FAILURES = 8  # problems in a row without a reply: the endpoint is at fault, not the problem


def main():
    config = cli.checked_config()
    path, task = outputs(config)
    done = {str(row["id"]) for row in data.read_rows(path)} if path.exists() else set()
    problems = [task.train[index] for index in range(len(task.train))]
    todo = [example for example in problems if example["id"] not in done]
    taught = kept = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for example, texts, error in replies(todo, config):
            right = accepted(task, example, texts)
            file.write("".join(json.dumps({"id": example["id"], "completion": text}) + "\n" for text in right))
            file.flush()
            taught, kept = taught + bool(right), kept + len(right)
            if error:
                print(f"{example['id']}: asked no further: {error}")
    print(f"taught   {taught} of {len(todo)} problems; {len(problems) - len(todo)} were in the file before")
    print(f"written  {kept} completions to {path.absolute()}")


def outputs(config) -> tuple[Path, Task]:
    """The file to add to, and the task as it is without that file.

    Raises:
      ValueError: the config names no such file.
    """
    path = config.task.get("teacher_path", "")
    if not path.endswith(".jsonl"):
        raise ValueError(
            f"task {config.task.name!r} has teacher_path={path!r}: choose a config of the task 'files' and give "
            "--config.task.teacher_path=teacher.jsonl, the file to write and to train from"
        )
    section = {**config.task, "teacher_path": ""}
    given = dict(seed=config.seed, max_prompt_tokens=config.sampling.max_prompt_tokens)
    return Path(path), sections.build(TASKS, section, "task", **given)


def replies(examples: Sequence[Example], config) -> Iterator[tuple[Example, list[str], str | None]]:
    """Each example with the completions that came to an end, and with the error that stopped the asking.

    Raises:
      ValueError: MAX_FAILURES examples in a row, or all there are, had no reply.
    """
    addresses = tuple(ENDPOINT.value)
    options = endpoint.Options(
        addresses=addresses, requests=REQUESTS.value, timeout_s=TIMEOUT_S.value, retries=RETRIES.value, cache_rows=0
    )
    model = endpoint.Model(TEACHER.value, TEMPERATURE.value, MAX_TOKENS.value or config.sampling.max_tokens)
    teacher = endpoint.make(model, options, section="launch.teach")

    def ask(example: Example) -> tuple[list[str | None], str | None]:
        message = config.task.template.format(problem=example["problem"])
        texts: list[str | None] = []
        for _ in range(COMPLETIONS.value):
            reply = endpoint.request(teacher, message)
            if reply.text is None:
                return texts, reply.error
            texts.append(None if reply.truncated else reply.text)
        return texts, None

    failures = 0
    pool = concurrent.futures.ThreadPoolExecutor(REQUESTS.value * len(addresses))
    try:
        waiting = {pool.submit(ask, example): example for example in examples}
        for future in concurrent.futures.as_completed(waiting):
            texts, error = future.result()
            failures = 0 if texts else failures + 1
            if failures == min(MAX_FAILURES, len(examples)):
                raise ValueError(
                    f"{', '.join(addresses)} gave no reply for {failures} problems in a row, the last because of: "
                    f"{error}. Check --endpoint, --teacher={TEACHER.value} and the key in OPENAI_API_KEY"
                )
            yield waiting[future], [text for text in texts if text], error
    finally:
        pool.shutdown(cancel_futures=True)


def accepted(task: Task, example: Example, texts: Sequence[str]) -> list[str]:
    """Those that the verifier calls right, each once."""
    texts = list(dict.fromkeys(texts))
    scores, _ = task.score([example] * len(texts), texts)
    return [text for text, correct in zip(texts, scores["correct"], strict=True) if correct == 1]


if __name__ == "__main__":
    cli.run(main)

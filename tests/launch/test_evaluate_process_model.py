"""A process reward model goes through a file of labelled solutions, and the table says how it did."""

import json

import pytest

from launch import evaluate_process_model
from tapojax import evaluation, resumable
from tests.judges import reward_models


def solution(id, label, *steps, **keys):
    return {"id": id, "problem": "1+1+1?", "steps": list(steps), "label": label, **keys}


ROWS = [
    solution("gsm8k-0", 1, "1+1=2", "2+1=4", "so 4", final_answer_correct=False),
    solution("gsm8k-1", -1, "1+1+1=3", final_answer_correct=True),
    solution("math-0", 0, "1+1=3", "3+1=3", final_answer_correct=True),
    solution("math-1", -1, "three", final_answer_correct=True),
    solution("math-2", None, "of unknown quality"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "bench.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(reward_models.save(tmp_path_factory.mktemp("reward") / "prm", "process"))


def test_records_table_and_threshold_belong_together(data, model, tmp_path, capsys):
    args = [
        data,
        f"--path={model}",
        f"--results={tmp_path}",
        "--max_tokens=256",
        "--batch_tokens=256",
        "--threshold=gsm8k",
    ]
    evaluate_process_model.main(args)
    folder = tmp_path / "prm"
    found = json.loads((folder / "critic.json").read_text())
    records = [json.loads(line) for line in (folder / "critic.jsonl").read_text().splitlines()]
    assert [r["id"] for r in records] == [row["id"] for row in ROWS[:4]], "a row without label is left out"
    assert found["critic"] == resumable.plain(evaluation.critic_table(records))
    assert found["threshold"] == evaluation.critic_threshold(records[:2])
    assert all(r["predicted"] == evaluation.first_error(r["step_scores"], found["threshold"]) for r in records)
    assert set(found["critic"]["subsets"]) == {"gsm8k", "math"} and found["critic"]["flawed_positives"]["rows"] == 3
    printed = capsys.readouterr().out
    assert (folder / "critic.md").read_text().strip() in printed and "4 of 4 solutions" in printed


def test_a_number_as_threshold(data, model, tmp_path):
    args = [
        data,
        f"--path={model}",
        f"--results={tmp_path}",
        "--max_tokens=256",
        "--batch_tokens=256",
        "--threshold=0",
        "--no-chat",
    ]
    evaluate_process_model.main(args)
    table = json.loads((tmp_path / "prm" / "critic.json").read_text())["critic"]
    assert table["average"]["correct"] == 1 and table["average"]["erroneous"] == 0, "no probability is below 0"


def test_mistakes_are_named(data, model, tmp_path):
    with pytest.raises(ValueError, match=r"--threshold=aime is no number and no subset; there are \['gsm8k', 'math'\]"):
        evaluate_process_model.main(
            [
                data,
                f"--path={model}",
                f"--results={tmp_path}",
                "--max_tokens=256",
                "--batch_tokens=256",
                "--threshold=aime",
            ]
        )
    outcome = reward_models.save(tmp_path / "orm", "outcome")
    with pytest.raises(ValueError, match="outcome reward model, which scores no steps"):
        evaluate_process_model.main([data, f"--path={outcome}"])

"""What a run writes down is valid JSON, is cut back on a restart, and holds the numbers it says."""

import json
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from tapojax import metrics
from tapojax.rollout.collect import Collected
from tapojax.types import Batch, Prompts, Rollout

NAN = float("nan")
GOLDEN = Path(__file__).parent / "golden"


def strict_lines(path: Path):
    def refuse(constant):
        raise AssertionError(f"{path.name} holds {constant}, which is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# ---- files


def test_lines_are_json_whatever_the_number(tmp_path):
    log = metrics.open_log(tmp_path, start=0, tensorboard=False)
    record = {
        "step": 0,
        "nan": NAN,
        "inf": np.float32(np.inf),
        "count": np.int64(7),
        "array": jnp.float32(0.5),
        "truth": True,
        "none": None,
        "text": "two\nlines \u2028 π",
        "nested": {"mean": -np.inf, "low": 0.25},
        "list": [1, NAN, "x"],
    }
    metrics.append(log, "metrics", record)
    metrics.append(log, "metrics", {"step": 1})
    assert strict_lines(tmp_path / "metrics.jsonl") == [
        {
            "step": 0,
            "nan": None,
            "inf": None,
            "count": 7,
            "array": 0.5,
            "truth": True,
            "none": None,
            "text": "two\nlines \u2028 π",
            "nested": {"mean": None, "low": 0.25},
            "list": [1, None, "x"],
        },
        {"step": 1},
    ]


def test_a_resumed_run_drops_what_a_killed_one_left(tmp_path):
    """The checkpoint was of step 3: steps 0 to 2 were done, the evaluation after step 3 too."""
    for name in ("metrics", "rollouts", "evaluations"):
        lines = [json.dumps({"step": step, "text": "π"}) for step in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + '\n{"step": 2, "accu')
    log = metrics.open_log(tmp_path, start=3, tensorboard=False)
    metrics.append(log, "metrics", {"step": 3, "again": 1})
    for name, want in {"metrics": [0, 1, 2, 3], "rollouts": [0, 1, 2], "evaluations": [0, 1, 2, 3]}.items():
        assert [line["step"] for line in strict_lines(tmp_path / f"{name}.jsonl")] == want, name
    assert not list(tmp_path.glob("*.tmp"))


def test_a_line_whose_end_was_lost_does_not_swallow_the_next(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}')
    log = metrics.open_log(tmp_path, start=2, tensorboard=False)
    metrics.append(log, "metrics", {"step": 2})
    assert [line["step"] for line in strict_lines(tmp_path / "metrics.jsonl")] == [0, 1, 2]


def test_an_empty_folder_needs_nothing(tmp_path):
    assert metrics.open_log(tmp_path, start=0, tensorboard=False) == metrics.Log(tmp_path, None)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_the_numbers(tmp_path):
    log = metrics.open_log(tmp_path, start=0, tensorboard=True)
    metrics.append(log, "metrics", {"step": 4, "accuracy": 0.25, "kl": NAN, "text": "no number"})
    metrics.append(log, "rollouts", {"step": 4, "correct": 1.0})
    log.tensorboard.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    found = {}
    for event in read_events(events):
        found |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
    assert found == {"metrics/accuracy": (4, 0.25)}


def read_events(path: Path):
    data = path.read_bytes()
    while data:  # length, its checksum, the event, its checksum
        size = int.from_bytes(data[:8], "little")
        yield event_pb2.Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]


# ---- numbers


def collected(correct, *, source=None, errors=(), group_size=2):
    """Rows with 1, 2, 3, ... completion tokens after one of the prompt."""
    rows = len(correct)
    mask = np.arange(rows + 1)[None] < np.arange(2, rows + 2)[:, None]
    mask[:, 0] = False
    zeros = np.zeros(mask.shape, np.float32)
    truncated = np.arange(rows) == rows - 1
    source = np.zeros(rows, np.int32) if source is None else np.array(source, np.int32)
    prompts = [{"id": f"p{i}", "problem": f"{i}+{i}?", "answer": str(2 * i)} for i in range(rows // group_size)]
    return Collected(
        rollout=Rollout(mask.astype(np.int32), mask, zeros, zeros, np.ones(rows, np.int32), truncated, source),
        scores={"correct": np.array(correct, np.float32), "process": np.array([NAN, *[0.5] * (rows - 1)], np.float32)},
        prompts=Prompts(prompts, [[1]] * len(prompts)),
        completions=[f"text {i}" for i in range(rows)],
        errors=list(errors),
        sampled_rows=24,
        sampled_tokens=100,
        seconds={},
    )


def test_rollout_metrics_by_hand():
    part = collected([1, 0, 1, 1, NAN, 1, NAN, NAN], source=[0, 0, 1, 0, 0, 2, 0, 0], errors=["a", "b", "c"])
    assert metrics.rollout_metrics(part, 2) == {
        "accuracy": pytest.approx(4 / 5),  # of the scored rows
        "score_process": 0.5,
        "collapsed_groups": 0.5,  # the second and the third; of the fourth nothing is known
        **metrics.process_metrics(part.scores, 2) | {"process_advantage_std": pytest.approx(NAN, nan_ok=True)},
        "length_mean": 4.5,
        "length_max": 8,
        "truncated": 1 / 8,
        "prompt_tokens": 1.0,
        "injected": 1 / 4,
        "score_errors": 3,
        "sampled_rows": 24,
        "sampled_tokens": 100,
    }


@pytest.mark.filterwarnings("error")
def test_costs_of_a_judge_are_means_over_the_rows_that_were_judged():
    """Channels <channel>_seconds, _tokens, _tries, _cached; wrong rows cost nothing and are NaN."""
    part = collected([1, 0, 1, 0])
    costs = {
        "flawed_seconds": np.array([0.5, NAN, 1.5, NAN]),
        "flawed_cached": np.array([0.0, NAN, 1.0, NAN]),
        "flawed_tries": np.full(4, NAN),
    }
    got = metrics.rollout_metrics(part._replace(scores={**part.scores, **costs}), 2)
    assert (got["score_flawed_seconds"], got["score_flawed_cached"]) == (1.0, 0.5)
    assert np.isnan(got["score_flawed_tries"]), "nobody was asked"


def test_calls_of_the_score_function_are_told_by_mean_and_maximum():
    part = collected([1, 0])._replace(call_seconds=[0.5, 1.0, 3.0])
    assert metrics.call_metrics(part) == {"seconds_per_score_call": 1.5, "seconds_per_score_call_max": 3.0}
    assert metrics.call_metrics(collected([1, 0])) == {}, "rollout servers have scored"
    record = {"step": 0, "seconds_sample": 0.25, **metrics.call_metrics(part)}
    assert metrics.progress_line(record, 9).endswith("| s: sample 0.25"), "calls overlap: they are no stage"


@pytest.mark.filterwarnings("error")
def test_a_batch_without_scores_has_no_accuracy():
    part = collected([NAN] * 4)
    assert np.isnan(metrics.rollout_metrics(part, 2)["accuracy"])
    assert metrics.rollout_metrics(part, 2)["collapsed_groups"] == 0


def batch_of(mask, advantages):
    return Batch(mask.astype(np.int32), mask, advantages, advantages, None, None, None, {})


@pytest.mark.filterwarnings("error")
def test_batch_metrics_by_hand():
    mask = np.array([[0, 1, 1], [0, 1, 0], [0, 0, 0], [0, 1, 1], [0, 1, 1]], bool)
    advantages = np.array([[0, 1, -3], [0, 1e-7, 0], [0, 0, 0], [0, 0, 2], [0, 0.5, -0.5]], np.float32)
    got = metrics.batch_metrics(batch_of(mask, advantages), np.array([0, 1, 1, 1, NAN]))
    assert got == {
        "silent_rows": 0.25,  # of the four that are not masked; the last has a signal, its mean has not
        "masked_rows": 0.2,
        "advantage_max": 3.0,
        "advantage_positive": 0.25,
        "advantage_negative": 0.25,
        "advantage_right_mean": pytest.approx(0.5),
        "advantage_right_std": pytest.approx(0.5**0.5),
        "advantage_right_min": pytest.approx(0, abs=1e-6),
        "advantage_right_max": 1.0,
        "advantage_wrong_mean": -1.0,
        "advantage_wrong_std": pytest.approx(NAN, nan_ok=True),  # of a single row
        "advantage_wrong_min": -1.0,
        "advantage_wrong_max": -1.0,
    }


def test_the_weights_of_the_mismatch_are_told_of_sampled_tokens():
    mask = np.array([[0, 1, 1], [0, 1, 1], [0, 1, 0]], bool)
    batch = batch_of(mask, np.zeros((3, 3), np.float32))
    weights = np.array([[9, 0, 0.5], [9, 1, 1], [9, 2, 9]], np.float32)
    got = metrics.batch_metrics(batch._replace(importance=weights, source=np.array([0, 1, 0])), np.ones(3))
    assert got["importance_mean"] == pytest.approx(2.5 / 3) and got["mismatch_masked"] == pytest.approx(1 / 3)
    assert "importance_mean" not in metrics.batch_metrics(batch, np.ones(3))
    empty = batch._replace(mask=mask & False, importance=weights, source=np.zeros(3))
    assert "importance_mean" not in metrics.batch_metrics(empty, np.ones(3))


@pytest.mark.filterwarnings("error")
def test_a_batch_without_rows_is_silent():
    mask = np.zeros((2, 3), bool)
    assert metrics.batch_metrics(batch_of(mask, np.zeros((2, 3), np.float32)), np.array([1, NAN])) == {
        "silent_rows": 1.0,
        "masked_rows": 1.0,
        "advantage_max": 0.0,
        "advantage_positive": 0.0,
        "advantage_negative": 0.0,
    }


THEIR_NAMES = {
    "silent_rows": "zero_ratio",
    "advantage_positive": "positive_ratio",
    "advantage_negative": "negative_ratio",
    **{f"advantage_right_{number}": f"correct_{number}" for number in ("mean", "std", "min", "max")},
    **{f"advantage_wrong_{number}": f"wrong_{number}" for number in ("mean", "std", "min", "max")},
}


@pytest.mark.parametrize("variant", ["dual_l1", "orm_only_grpo", "fullnorm_l1", "mult", "prm_only"])
def test_the_advantage_distribution_is_papos(variant):
    """metric_utils.compute_data_metrics: rows without tokens are left out, a score of 0.5 is right, ddof 1."""
    data, made = (
        np.load(GOLDEN / f"papo_{name}.npz", allow_pickle=False) for name in ("diagnostics", "advantage_verl")
    )
    got = metrics.batch_metrics(batch_of(data["response_mask"] > 0, made[f"adv__{variant}"]), data["orm"])
    names = [name.removeprefix("adv_distribution/") for name in data[f"names__{variant}"]]
    want = dict(zip(names, data[f"values__{variant}"], strict=True))
    for ours, theirs in THEIR_NAMES.items():
        assert got[ours] == pytest.approx(want[theirs], abs=1e-6), ours
    assert got["masked_rows"] == 1 - (want["correct_count"] + want["wrong_count"]) / len(data["orm"])


def test_sample_records_are_the_first_rows_of_the_first_groups():
    part = collected([1, 0, 0, 1, 1, 1], source=[0, 0, 3, 0, 0, 0])
    records = metrics.sample_records(part, 7, 2, 2)
    assert [r["completion"] for r in records] == ["text 0", "text 2"]
    assert records[1] == {
        "step": 7,
        "id": "p1",
        "problem": "1+1?",
        "completion": "text 2",
        "source": 3,
        "correct": 0.0,
        "process": 0.5,
    }
    assert len(metrics.sample_records(part, 0, 99, 2)) == 3 and metrics.sample_records(part, 0, 0, 2) == []


def test_injection_records_are_the_rows_that_were_not_sampled():
    part = collected([1, 0, 0, 1], source=[0, 2, 0, 3])
    records = metrics.injection_records(part, 7, 2)
    assert [(r["id"], r["row"], r["source"], r["completion"]) for r in records] == [
        ("p0", 1, 2, "text 1"),
        ("p1", 3, 3, "text 3"),
    ]
    assert records[1]["step"] == 7 and records[1]["correct"] == 1.0 and records[1]["process"] == 0.5


def test_progress_line():
    record = {
        "step": 4,
        "accuracy": 0.25,
        "entropy": 1.5,
        "update_kl": 1e-4,
        "length_mean": 20.0,
        "tokens_per_second": 1234.5,
        "seconds_sample": 1.0,
        "seconds_train": 0.5,
    }
    line = metrics.progress_line(record, 100)
    assert line.startswith("step   5/100  acc 0.250  entropy 1.500  kl 1.0e-04  len 20.0  tok/s 1234")
    assert line.endswith("| s: sample 1.00 train 0.50")
    assert "clip" not in line, "what an algorithm has not is not shown"
    assert "\n" not in line


def test_timed_adds_up_also_through_an_error():
    seconds = {"train": 1.0}
    with pytest.raises(KeyError), metrics.timed(seconds, "train"):
        time.sleep(0.02)
        raise KeyError
    assert 1.01 < seconds["train"] < 2


def test_process_metrics_by_hand():
    """Of four groups one has right rows of different process; 1 and 0.5 become ± 1/√2."""
    correct = np.array([1, 1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0], np.float32)
    process = np.array([1, 0.5, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 1, 0], np.float32)
    got = metrics.process_metrics({"correct": correct, "process": process}, 4)
    outcome = np.concatenate([[3**0.5 / 2] * 2, [-(3**0.5) / 2] * 2, [0] * 4, [1.5, -0.5, -0.5, -0.5], [0] * 4])
    assert got == {
        "process_active_groups": 0.25,
        "process_advantage_std": pytest.approx(1, abs=1e-4),
        "outcome_advantage_std": pytest.approx(outcome.std(ddof=1), abs=1e-4),
    }
    idle = metrics.process_metrics({"correct": correct, "process": np.ones(16, np.float32)}, 4)
    assert idle["process_active_groups"] == 0 and np.isnan(idle["process_advantage_std"])


def test_process_metrics_are_the_published_ones():
    """dual_objective/*: groups of at least two right rows of different process, standard deviations of both parts."""
    data = np.load(GOLDEN / "papo_advantage_verl.npz", allow_pickle=False)
    order = np.argsort(data["uid"], kind="stable")
    scores = {"correct": data["orm"][order], "process": data["prm"][order]}
    got = metrics.process_metrics(scores, 8)
    theirs = dict(zip(data["metric_names"].tolist(), data["metrics__dual_l1"].tolist(), strict=True))
    ours = {"process_active_groups": "process_active_ratio"}
    ours |= {f"{part}_advantage_std": f"{part}_std" for part in ("process", "outcome")}
    for name, key in ours.items():
        assert got[name] == pytest.approx(theirs[f"dual_objective/{key}"], abs=1e-5), name
    for part in ("process", "outcome"):
        assert abs(theirs[f"dual_objective/{part}_mean"]) < 1e-12, "a mean that is always 0 need not be logged"

"""What is kept of a batch is all of it, to the bit; what is damaged or of another run is refused."""

import json

import numpy as np
import pytest

from tapojax import asynchrony, metrics, recording
from tapojax.rollout.collect import Collected
from tapojax.types import Prompts, Rollout


def batch(step: int, *, versions=True) -> Collected:
    rng = np.random.default_rng(step)
    shape = (4, 6)
    mask = rng.random(shape) < 0.5
    logprobs = np.where(mask, rng.normal(size=shape), 0).astype(np.float32)
    rollout = Rollout(
        rng.integers(0, 99, shape).astype(np.int32),
        mask,
        logprobs,
        logprobs + 1,
        np.arange(4, dtype=np.int32),
        mask[:, 0],
        np.array([0, 0, 1, 0], np.int32),
        np.where(mask, rng.integers(step, step + 2, shape), -1) if versions else None,
    )
    scores = {"correct": np.array([0, 1, np.nan, 1], np.float32), "process": rng.random(4)}
    prompts = Prompts([{"id": 1, "problem": "1+1?", "level": object()}] * 2, [(1, 2), np.array([3])])
    said = ["a", "two\nlines \u2028 π \ud800", "", "d"]
    return Collected(rollout, scores, prompts, said, ["judge down"], 8, 17, {"sample": 0.1}, {"memory": 1}, step)


def assert_same(got: Collected, want: Collected):
    for a, b in ((got.rollout._asdict(), want.rollout._asdict()), (got.scores, want.scores)):
        assert a.keys() == b.keys()
        for name in a:
            assert (a[name] is None) == (b[name] is None), name
            if a[name] is not None:
                assert a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes(), name
    rest = ("completions", "errors", "sampled_rows", "sampled_tokens", "version")
    assert [getattr(got, name) for name in rest] == [getattr(want, name) for name in rest]
    assert [list(tokens) for tokens in got.prompts.tokens] == [list(tokens) for tokens in want.prompts.tokens]
    assert list(got.prompts.examples) == [{"id": "1", "problem": "1+1?"}] * 2


@pytest.mark.parametrize("versions", [True, False])
def test_text_is_json_and_gives_the_batch_back(versions):
    part = batch(3, versions=versions)
    text = json.loads(json.dumps(recording.to_text(part)))
    got = recording.from_text(text)
    assert_same(got, part)
    assert got.seconds == part.seconds and got.memory is None, "the memory has its own place in a checkpoint"


def never(**_):
    raise AssertionError("nobody samples, so nobody needs a policy")


def source_of(parts) -> asynchrony.Source:
    return asynchrony.Source(lambda step, snapshot: parts[step], lambda: [])


def recorded(workdir, parts, *, start=0) -> metrics.Log:
    log = metrics.open_log(workdir, start=start, tensorboard=False)
    source = recording.record(source_of(parts), log)
    for step in range(start, len(parts)):
        assert source.next(step, never) is parts[step]
    return workdir / "recorded"


def test_a_recording_gives_the_same_batches_and_needs_no_policy(tmp_path):
    parts = [batch(step) for step in range(3)]
    folder = recorded(tmp_path, parts)
    source = recording.replay(folder, steps=3, rows=4)
    for step in range(3):
        part = source.next(step, never)
        assert_same(part, parts[step])
        assert part.seconds == {}, "no time was spent on sampling"
    assert source.idle() == []


def test_the_schedule_tells_what_each_version_sampled(tmp_path):
    part = batch(5)
    lines = (recorded(tmp_path, [part]) / "schedule.jsonl").read_text().splitlines()
    versions = part.rollout.versions[part.rollout.mask & (part.rollout.source == 0)[:, None]]
    line = json.loads(lines[0])
    assert line["step"] == 0 and line["version"] == 5 and line["file"] == "000000.npz"
    assert line["tokens_by_version"] == {str(v): int(np.sum(versions == v)) for v in (5, 6)}


def test_a_resumed_run_records_the_steps_it_does_again(tmp_path):
    parts = [batch(step) for step in range(4)]
    recorded(tmp_path, parts)
    with open(tmp_path / "recorded" / "schedule.jsonl", "a") as file:
        file.write('{"step": 4, "ver')  # the kill came here
    again = [*parts[:2], batch(12), batch(13)]
    folder = recorded(tmp_path, again, start=2)
    source = recording.replay(folder, steps=4, rows=4)
    for step in range(4):
        assert_same(source.next(step, never), again[step])
    assert len((folder / "schedule.jsonl").read_text().splitlines()) == 4


def test_what_cannot_be_replayed_is_named(tmp_path):
    with pytest.raises(ValueError, match="nothing/schedule.jsonl has no batch of step 0: asynchrony.replay takes"):
        recording.replay(tmp_path / "nothing", steps=1, rows=4)
    folder = recorded(tmp_path, [batch(0), batch(1)])
    with pytest.raises(ValueError, match="no batch of step 2.*of 3 steps or more with asynchrony.record=True"):
        recording.replay(folder, steps=3, rows=4)
    with pytest.raises(ValueError, match="000000.npz has 4 rows, this config has prompts_per_step . group_size = 8"):
        recording.replay(folder, steps=2, rows=8).next(0, never)
    data = bytearray((folder / "000001.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "000001.npz").write_bytes(data)
    with pytest.raises(ValueError, match="000001.npz is not what was recorded"):
        recording.replay(folder, steps=2, rows=4).next(1, never)

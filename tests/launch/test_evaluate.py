"""`python -m launch.evaluate` as a user runs it: several sets, kill -9 and go on, presets, a Hugging Face folder."""

import json
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from configs import genrm_gym, quickstart
from launch import build, cli, evaluate, evaluation_sets, train_with_servers
from tapojax import checkpoint, resumable
from tapojax.models import decoder, huggingface
from tapojax.models.config import DecoderConfig
from tapojax.tasks import files
from tests.launch.test_evaluation_sets import sums, write
from tests.launch.test_train import ROOT, environment
from tests.tasks.test_files import save_tokenizer

CONFIG = "--config=configs/quickstart.py:quicktest"
SLOW = ("--config.task.evaluation_size=64", "--config.evaluation.batch_prompts=1", "--config.evaluation.samples=2")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of no step, as launch.train leaves it; its policy was never trained."""
    workdir, config = tmp_path_factory.mktemp("run") / "mine", quickstart.get_config("quicktest")
    cli.write_config(config, workdir)
    run = build.setup(config)
    with jax.set_mesh(run.mesh):
        params = build.initial_params(config.model, run.model, run.mesh, jax.random.key(0))
        checkpoint.save(checkpoint.open_manager(workdir / "initial"), 0, params, {})
        state = build.fresh_state(run.algorithm, run.optimizer, params, run.mesh)
        checkpoint.save(checkpoint.open_manager(workdir / "checkpoints"), 3, state, {})
    return workdir


def command(workdir, results, *given):
    where = [f"--workdir={workdir}"] if workdir else []
    return [sys.executable, "-m", "launch.evaluate", CONFIG, *where, f"--results={results}", *given]


def finish(workdir, results, *given):
    line = command(workdir, results, *given)
    return subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True)


def result(folder):
    return json.loads((folder / "result.json").read_text())


def without_time(found):
    for numbers in found["sets"].values():
        del numbers["seconds"], numbers["tokens_per_second"]
    return found


def samples(path):
    """The file's records, and how many batches were closed."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if "id" in line], sum("batch" in line for line in lines)


def test_sets_beside_each_other(run_folder, tmp_path):
    easy = write(tmp_path / "easy.jsonl", sums(5))
    given = ("--config.evaluation.batch_prompts=16", f"--sets=own,{easy}", "--k=1,2")
    done = finish(run_folder, tmp_path / "results", *given)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "results" / "mine-3"
    found, table = result(folder), (folder / "result.md").read_text()
    assert table in done.stdout and "| mean of 2 sets |" in table
    assert list(found["sets"]) == ["arithmetic", "easy"] and found["protocol"] is None
    assert found["policy"]["name"] == "mine-3" and found["policy"]["step"] == 3
    assert found["sampling"] == {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 24}
    assert {"python", "tapojax", "jax", "math-verify"} <= found["versions"].keys()
    assert found["config"]["seed"] == 0 and found["ks"] == [1, 2]
    numbers, (records, batches) = found["sets"]["easy"], samples(folder / "easy.jsonl")
    assert [record["id"] for record in records] == [f"s{i}" for i in range(5) for _ in range(4)] and batches == 1
    assert numbers["problems"] == 5 and numbers["per_problem"]["id"] == [f"s{i}" for i in range(5)]
    assert {"pass@1", "pass@2", "pass@4", "avg@4", "maj@4"} <= numbers.keys()
    assert numbers["mean_length"] == np.mean([record["length"] for record in records])
    assert numbers["answered"] == np.mean([record["answer"] is not None for record in records])
    assert numbers["data"]["path"] == easy and numbers["tokens_per_second"] > 0 and numbers["seconds"]["sample"] > 0

    again = finish(run_folder, tmp_path / "results", *given)
    assert "easy: 1 of 1 batches are in" in again.stdout and "tokens/s\n" not in again.stdout.partition("|")[0]
    assert result(folder) == found, "nothing is left to sample, and the times are those of the sampling"

    other = finish(run_folder, tmp_path / "results", *given, "--config.evaluation.temperature=0.5")
    assert other.returncode == 1 and "Traceback" not in other.stderr
    assert "config.evaluation.temperature=1.0, this command says 0.5" in other.stderr, other.stderr
    assert result(folder) == found

    lost = finish(run_folder, tmp_path / "results", "--config.evaluation.batch_prompts=16", "--sets=own")
    assert lost.returncode == 1 and f"holds also easy: give --sets=...,easy={easy}, whose samples" in lost.stderr
    assert result(folder) == found


def test_a_killed_evaluation_goes_on_to_the_identical_result(run_folder, tmp_path):
    straight = finish(run_folder, tmp_path / "straight", "--policy=initial", *SLOW)
    assert straight.returncode == 0, straight.stdout + straight.stderr
    rows = tmp_path / "killed" / "mine-initial" / "arithmetic.jsonl"
    line = command(run_folder, tmp_path / "killed", "--policy=initial", *SLOW)
    with subprocess.Popen(line, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL) as process:
        while not (rows.exists() and rows.read_bytes().count(b'{"batch": ') >= 3):
            assert process.poll() is None, "it ended early"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    _, batches = samples_of_torn(rows)
    assert 3 <= batches < 64, "it was killed in the middle"
    with rows.open("ab") as file:
        file.write(b'{"id": "torn", "compl')
    done = finish(run_folder, tmp_path / "killed", "--policy=initial", *SLOW)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"arithmetic: {batches} of 64 batches are in" in done.stdout
    ours, theirs = (tmp_path / name / "mine-initial" for name in ("killed", "straight"))
    assert samples(ours / "arithmetic.jsonl") == samples(theirs / "arithmetic.jsonl")
    assert without_time(result(ours)) == without_time(result(theirs))
    assert result(ours)["policy"]["step"] == 0


def samples_of_torn(path):
    whole = path.read_bytes().rpartition(b"\n")[0]
    lines = [json.loads(line) for line in whole.splitlines()]
    return lines, sum("batch" in line for line in lines)


def test_a_protocol_on_a_hugging_face_folder(tmp_path):
    """Real path, tiny model: FAPO's protocol with the lengths of the command line."""
    model, tokenizer = tmp_path / "tiny", save_tokenizer(tmp_path / "tokenizer")
    shape = DecoderConfig(len(files.load_tokenizer(tokenizer)), 16, 24, 1, 2, 1, 8)
    huggingface.save_params(model, jax.device_get(decoder.init(shape, jax.random.key(0))), shape)
    rows = [{"id": f"r{i}", "problem": f"{i}+1?", "answer": str(i + 1)} for i in range(2)]
    data = tmp_path / "data"
    data.mkdir()
    for name in ("aime24_test.jsonl", "gpqa.jsonl"):
        write(data / name, rows)
    (tmp_path / "config.py").write_text(
        "from configs import base\n\n\ndef get_config():\n    return base.get_config(task='files')\n"
    )
    line = [sys.executable, "-m", "launch.evaluate", f"--config={tmp_path / 'config.py'}", f"--results={tmp_path}/r"]
    line += [f"--config.model.path={model}", f"--config.task.tokenizer_path={tokenizer}", f"--sets={data}"]
    line += ["--protocol=fapo", "--config.sampling.max_tokens=8", "--config.sampling.max_prompt_tokens=160"]
    done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = result(tmp_path / "r" / "tiny-fapo")
    assert {name: numbers["samples"] for name, numbers in found["sets"].items()} == {"aime24": 32, "gpqa_diamond": 4}
    assert found["sampling"] == {"temperature": 1.0, "top_p": 0.7, "top_k": 0, "max_tokens": 8}
    assert found["protocol"]["name"] == "fapo" and found["policy"]["step"] is None
    assert found["notes"][1:] == [
        "sampling.max_prompt_tokens=160 instead of the protocol's 2048",
        "aime24 has 2 problems, published are 30",
        "gpqa_diamond has 2 problems, published are 198",
        "sets of the protocol that were not evaluated: aime25",
    ]


@pytest.mark.parametrize(
    "given, said",
    [
        (("--protocol=happo",), "no protocol is called 'happo' (did you mean 'hapo'?); there are"),
        (("--k=1,16",), "--k=16: arithmetic has 4 samples of a problem, and pass@k needs k of them: lower k or say"),
    ],
)
def test_mistakes_end_in_one_message(run_folder, tmp_path, given, said):
    done = finish(run_folder, tmp_path, *given)
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_rollout_servers_sample_the_same(run_folder, tmp_path):
    """float32 weights over the wire, another process: the same records as here."""
    given = ("--config.rollout.weights_dtype=float32", "--config.rollout.probe_tolerance=1e-4", f"--results={tmp_path}")
    serve = [sys.executable, "-m", "launch.serve_rollouts", "--engine=jax", "--port=0", CONFIG]
    with train_with_servers.servers(serve, 1, tmp_path, environment=environment()) as (server,):
        there = f"--config.rollout.addresses=('{server.address}',)"
        done = finish(run_folder, tmp_path, *given, there, "--name=there")
        assert done.returncode == 0, done.stdout + done.stderr
    here = finish(run_folder, tmp_path, *given, "--name=here")
    assert here.returncode == 0, here.stdout + here.stderr
    assert samples(tmp_path / "there" / "arithmetic.jsonl") == samples(tmp_path / "here" / "arithmetic.jsonl")


def test_critics_have_their_table(tmp_path):
    """A critic of the gym that was never trained: its verdicts are in rows by level."""
    config = genrm_gym.get_config("quicktest")
    config.evaluation.samples = 2
    run = build.setup(config)
    (problems,) = evaluation_sets.chosen(["own"], config, run.task, None, {})
    with jax.set_mesh(run.mesh):
        params = build.initial_params(config.model, run.model, run.mesh, jax.random.key(0))
        weights = run.engine.load(params, 0)
        asked = evaluate.asks(config, problems)
        found = evaluate.evaluate_set(run, lambda: weights, problems, tmp_path / "a.jsonl", asked, [1, 2])
    assert found["critic"]["subsets"].keys() == {"level 2"} and found["critic"]["pooled"]["rows"] == 64
    assert found["critic_vote"]["pooled"]["rows"] == 32
    assert found["critic_f1"] == found["critic"]["pooled"]["f1"] or np.isnan(found["critic_f1"])


# ---- parts


def some_problems(name="a", count=3, n=4):
    return evaluation_sets.Problems(name, "", sums(count), n, count, "0" * 64, "")


def test_the_ks():
    assert evaluate.passes([], [some_problems(n=6)]) == {"a": [1, 2, 4, 6]}
    assert evaluate.passes(["2"], [some_problems(n=6)]) == {"a": [1, 2, 6]}
    for wrong in ("0", "-1", "x", "1.5"):
        with pytest.raises(ValueError, match=rf"--k={wrong}: give whole numbers from 1 on"):
            evaluate.passes([wrong], [some_problems()])


def test_unscored_samples_are_nan_again():
    batch = resumable.Batch([{"id": "a", "correct": None, "error": None}], {"channels": ["correct"]})
    (record,) = evaluate.records_of([batch])
    assert np.isnan(record["correct"]) and record["error"] is None


def test_why_samples_have_no_score_is_told():
    problems = some_problems(count=1, n=3)
    records = [
        {"id": "s0", "completion": "", "answer": None, "length": 1, "truncated": False, "error": error, "correct": None}
        for error in ("judge down", "judge down", "timed out")
    ]
    batch = resumable.Batch(
        records, {"channels": ["correct"], "seconds": {"sample": 1.0, "score": 0.0}, "compiling": True}
    )
    found = {"a": evaluate.summary(problems, [batch], [1, 3])}
    assert evaluate.failures(found) == ["a: 2 samples: judge down", "a: 1 samples: timed out"]
    assert found["a"]["errors"] == 3 and np.isnan(found["a"]["pass@1"]["mean"])


def test_speed_leaves_out_what_compiled():
    def batch(tokens, seconds, compiling):
        return resumable.Batch([{"length": tokens}], {"seconds": {"sample": seconds}, "compiling": compiling})

    assert evaluate.speed([batch(10, 9.0, True), batch(10, 1.0, False), batch(20, 1.0, False)]) == 15
    assert evaluate.speed([batch(10, 2.0, True)]) == 5, "or it is all there is"


def test_what_decides_the_samples_is_asked_and_nothing_else():
    def asked(**changed):
        config = quickstart.get_config("quicktest")
        config.update_from_flattened_dict(changed)
        return evaluate.asks(config, some_problems())

    same = {"optimizer.learning_rate": 1.0, "rollout.addresses": ("a:1",), "log.rollouts": 9, "steps": 9}
    assert asked(**same) == asked()
    for key, value in {"seed": 1, "sampling.dtype": "bfloat16", "sampling.max_tokens": 9}.items():
        assert asked(**{key: value}) != asked(), key
    assert asked()["batch_prompts"] == 3
    patient = {"rollout.deadline_s": 9.0, "rollout.retries": 9, "rollout.probe_tolerance": 1.0, "rollout.delta": False}
    assert asked(**patient) == asked(), "how servers are talked to"
    assert asked(**{"rollout.weights_dtype": "float32"}) != asked() != asked(**{"rollout.prompts_per_request": 1})


def test_a_result_of_other_sets_is_not_replaced(tmp_path):
    held = {"own": {"data": {"path": ""}}, "a": {"data": {"path": "a.jsonl"}}, "b": {"data": {"path": "x/b.jsonl"}}}
    evaluate.refuse_to_lose(tmp_path, [some_problems("a")])
    (tmp_path / "result.json").write_text(json.dumps({"sets": held}))
    evaluate.refuse_to_lose(tmp_path, [some_problems(name) for name in ("b", "new", "a", "own")])
    said = "result.json holds also own, b: give --sets=...,own,b=x/b.jsonl, whose samples are kept, or another --name"
    with pytest.raises(ValueError, match=said):
        evaluate.refuse_to_lose(tmp_path, [some_problems("a"), some_problems("new")])
    (tmp_path / "result.json").write_text('{"sets": ')
    evaluate.refuse_to_lose(tmp_path, [some_problems("a")])


def test_a_set_of_one_run_does_not_depend_on_its_other_sets(run_folder):
    """Randomness is derived from seed, set and batch."""
    config = quickstart.get_config("quicktest")
    config.evaluation.batch_prompts = 2
    run = build.setup(config)
    with jax.set_mesh(run.mesh):
        _, params = build.saved_params(run, run_folder, initial=True)
        weights = run.engine.load(params, 0)

        def texts(problems, folder):
            asked = evaluate.asks(config, problems)
            evaluate.evaluate_set(run, lambda: weights, problems, folder, asked, [1])
            return [record["completion"] for record in samples(folder)[0]]

        here = run_folder / "texts"
        here.mkdir()
        first = texts(some_problems(), here / "1")
        assert texts(some_problems("b"), here / "2") == first, "the name does not matter"
        other = some_problems()._replace(digest="1" * 64)
        assert texts(other, here / "3") != first, "another set has other draws"

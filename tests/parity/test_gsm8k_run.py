"""The path of a real run, small: a Qwen2 checkpoint saved by transformers, its tokenizer, GSM8K rows, verifier,
checkpoint, kill and resume, launch.evaluate, launch.convert, and back into transformers."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip(
    "torch", reason="the checkpoint is made by transformers on torch: pip install -e '.[parity]'"
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    shared = ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl.gz"
    if not shared.exists():
        pytest.skip(f"no GSM8K rows at {shared}")
    folder = tmp_path_factory.mktemp("gsm8k")
    with gzip.open(shared, "rt") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(300), strict=False)]
    save_model(folder / "model", [row["problem"] + row["solution"] for row in rows])
    for name, part in (("train", rows[:40]), ("test", rows[40:46])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder, [
        "--config=configs/gsm8k.py:quicktest",
        "--config.steps=3",
        "--config.checkpoint.every=1",
        f"--config.model.path={folder / 'model'}",
        f"--config.task.tokenizer_path={folder / 'model'}",
        f"--config.task.train_path={folder / 'train.jsonl'}",
        f"--config.task.evaluation_path={folder / 'test.jsonl'}",
        f"--workdir={folder / 'run'}",
    ]


def save_model(path: Path, texts: list[str]):
    """A tiny random Qwen2 with a byte-level BPE tokenizer and the ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=special[2], pad_token=special[0])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    shape = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **shape)).save_pretrained(path)


def launch(name: str, *args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"launch.{name}", *args]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_train_kill_resume_evaluate_convert_and_back_into_transformers(flags):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tapojax.models import config_json, decoder, huggingface

    folder, args = flags
    child = subprocess.Popen(
        [sys.executable, "-m", "launch.train", *args], cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""}
    )
    deadline = time.monotonic() + 300
    while not (folder / "run/checkpoints/1").exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    resumed = launch("train", *args)
    assert "resumed" in resumed.stdout
    records = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [0, 1, 2]
    assert all(r["score_errors"] == 0 and r["nonfinite"] == 0 for r in records)
    assert max(abs(r["mismatch_kl"]) for r in records) < 1e-4, "sampler and trainer disagree in float32"

    evaluated = launch("evaluate", *args, f"--results={folder / 'results'}")
    assert "avg@k" in evaluated.stdout
    (results,) = (folder / "results").glob("*/result.json")
    (result,) = json.loads(results.read_text())["sets"].values()
    assert result["problems"] == 6

    launch("convert", *args, f"--output={folder / 'exported'}")
    model = AutoModelForCausalLM.from_pretrained(folder / "exported")
    tokens = AutoTokenizer.from_pretrained(folder / "exported")("two and two", return_tensors="pt")["input_ids"]
    config = config_json.read_config(folder / "exported")
    params = jax.tree.map(jnp.asarray, huggingface.load_params(folder / "exported", config))
    ours = decoder.hidden_states(config, params, jnp.asarray(tokens.numpy())) @ decoder.head(params)
    with torch.no_grad():
        np.testing.assert_allclose(ours, model(tokens).logits.numpy(), atol=1e-4)

"""A real vLLM for the tests: its own environment is found, one worker process is started in it, models are made."""

import dataclasses
import json
import os
import selectors
import subprocess
from pathlib import Path
from typing import Any

import jax
import pytest

from tapojax.models import decoder, huggingface, presets

ROOT = Path(__file__).parents[2]
CONFIG = presets.PRESETS["gym-small"]
QWEN3 = dataclasses.replace(CONFIG, qkv_bias=False, qk_norm=True, tie_embeddings=False, num_layers=2)
EOS = 7  # in config.json; only a request's own stop tokens may stop
OPTIONS = dict(max_prompt_tokens=160, max_tokens=1400, dtype="float32", max_num_seqs=16, kv_cache_bytes=64 << 20)
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The python of vLLM's environment; skips where there is none."""
    python = os.environ.get("TAPOJAX_VLLM_PYTHON", str(ROOT / ".venv-vllm" / "bin" / "python"))
    if not Path(python).exists():
        pytest.skip(f"{python} is missing: run launch/make_vllm_env.sh .venv-vllm, or set TAPOJAX_VLLM_PYTHON")
    return python


class Worker:
    """A worker process; `worker.scenario(name, **arguments)` runs a scenario of worker.py."""

    def __init__(self, python: str, folder: Path, log: Path):
        command = [python, str(Path(__file__).with_name("worker.py")), str(folder), json.dumps(OPTIONS)]
        self.log = log.open("w+")
        environment = os.environ | ENVIRONMENT
        for name in ("XLA_FLAGS", "JAX_PLATFORMS", "NPROC"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
            cwd=ROOT,
        )

    def scenario(self, name: str, *, timeout_s: float = 550, **arguments) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"scenario": name, **arguments}) + "\n")
        self.process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            line = self.process.stdout.readline() if selector.select(timeout_s) else ""
        if not line:
            self.log.seek(0)
            raise AssertionError(f"no answer to {name}: {self.log.read()[-4000:]}")
        reply = json.loads(line)
        assert "error" not in reply, reply["error"]
        return reply["result"]

    def close(self):
        assert self.process.stdin
        self.process.stdin.close()
        try:
            self.process.wait(200)
        finally:
            self.process.kill()
            self.log.close()


class Model:
    """Random params, and the folder that holds them in Hugging Face's format."""

    def __init__(self, folder: Path, config, seed: int):
        self.config, self.folder = config, folder
        self.params = decoder.init(config, jax.random.key(seed))
        # logits as wide as a trained model's: two models never agree on a token by chance, and temperatures matter
        self.params["final_norm"]["scale"] = 4 * self.params["final_norm"]["scale"]
        huggingface.save_params(folder, self.params, config, eos_token_id=EOS)
        self.file = str(folder / "model.safetensors")


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> list[Model]:
    """Three models of one shape."""
    folder = tmp_path_factory.mktemp("models")
    return [Model(folder / name, CONFIG, seed) for seed, name in enumerate("abc")]


@pytest.fixture(scope="session")
def worker(vllm_python, models, tmp_path_factory):
    """vLLM that was started from config.json alone."""
    folder = tmp_path_factory.mktemp("vllm")
    (folder / "config.json").write_text((models[0].folder / "config.json").read_text())
    worker = Worker(vllm_python, folder, folder / "log")
    yield worker
    worker.close()


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory) -> Model:
    return Model(tmp_path_factory.mktemp("models") / "qwen3", QWEN3, 3)


@pytest.fixture(scope="session")
def trained_worker(vllm_python, qwen3, tmp_path_factory):
    """vLLM that was started from a folder with weights, of another family with a head of its own."""
    worker = Worker(vllm_python, qwen3.folder, tmp_path_factory.mktemp("vllm") / "log")
    yield worker
    worker.close()

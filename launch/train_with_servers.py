"""Training with rollout servers of its own: starts them on this machine, trains, and ends them.

    python -m launch.train_with_servers --config=configs/remote_gym.py --engine=vllm
    python -m launch.train_with_servers --config=configs/gsm8k.py --engine=vllm --servers=4 --gpus_per_server=2

For servers on other machines start launch.serve_rollouts there and name them in rollout.addresses of launch.train. A
vLLM server runs in the environment that launch/make_vllm_env.sh made: $TAPOJAX_VLLM_PYTHON, or .venv-vllm here.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import flags

from launch import build, cli, train
from tapojax.models import config_json

ENGINE = flags.DEFINE_enum("engine", "vllm", ["vllm", "jax"], "of the rollout servers")
SERVERS = flags.DEFINE_integer("servers", 1, "how many", lower_bound=1)
GPUS = flags.DEFINE_integer("gpus_per_server", 0, "CUDA devices of each server, in order; 0: as it finds them")
OPTIONS = flags.DEFINE_multi_string("server_option", [], "passed on to launch.serve_rollouts, such as --dtype=bfloat16")


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are ended
    config, workdir = cli.checked_config(), cli.workdir()
    model = write_model(config, workdir)
    with servers(server_command(config, model), SERVERS.value, workdir, gpus=GPUS.value) as started:
        with config.unlocked():
            config.rollout.addresses = tuple(server.address for server in started)
        train.train(config, workdir)


def write_model(config, workdir: Path) -> Path:
    """A folder whose config.json says the policy's architecture; the weights come over the wire."""
    if config.model.path:
        return Path(config.model.path).absolute()
    folder, tokenizer = workdir / "model", build.problems(config).tokenizer
    folder.mkdir(parents=True, exist_ok=True)
    budget = config.sampling.max_prompt_tokens + config.sampling.max_tokens
    config_json.write_config(
        build.model(config.model, tokenizer),
        folder,
        dtype=config.model.dtype,
        max_position_embeddings=max(budget, 512),
        eos_token_id=tokenizer.eos_token_id,
    )
    return folder.absolute()


def server_command(config, model: Path) -> list[str]:
    """The command of one server.

    Raises:
      ValueError: there is no environment with vLLM.
    """
    python = sys.executable
    if ENGINE.value == "vllm":
        python = os.environ.get("TAPOJAX_VLLM_PYTHON", ".venv-vllm/bin/python")
        if not Path(python).exists():
            raise ValueError(
                f"{python} does not exist: make the servers' environment with launch/make_vllm_env.sh .venv-vllm, or "
                "name its python in TAPOJAX_VLLM_PYTHON"
            )
    return [
        str(Path(python).absolute()),
        *("-m", "launch.serve_rollouts", f"--engine={ENGINE.value}", f"--model={model}", "--port=0"),
        f"--max_prompt_tokens={config.sampling.max_prompt_tokens}",
        f"--max_tokens={config.sampling.max_tokens}",
        f"--dtype={config.sampling.dtype}",
        *OPTIONS.value,
    ]


class Server(NamedTuple):
    process: subprocess.Popen
    address: str


@contextlib.contextmanager
def servers(
    command: Sequence[str], count: int, folder: Path, *, gpus: int = 0, environment: Mapping[str, str] = os.environ
) -> Iterator[list[Server]]:
    """Starts `count` of them, waits until they listen, and ends them; logs are server-<number>.log in `folder`."""
    started: list[subprocess.Popen] = []
    logs = [folder / f"server-{number}.log" for number in range(count)]
    try:
        for number, log in enumerate(logs):
            devices = ",".join(str(number * gpus + i) for i in range(gpus))
            seen = {**environment, **({"CUDA_VISIBLE_DEVICES": devices} if devices else {})}
            with log.open("w") as output:
                # a process group of its own: Ctrl-C reaches the trainer alone, which ends the servers itself
                started.append(
                    subprocess.Popen(command, env=seen, stdout=output, stderr=output, start_new_session=True)
                )
        yield [Server(process, _address(process, log)) for process, log in zip(started, logs, strict=True)]
    finally:
        for process in started:
            process.send_signal(signal.SIGTERM)
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def _address(process: subprocess.Popen, log: Path) -> str:
    """Waits for the line that says where the server listens.

    Raises:
      ValueError: it ended without one.
    """
    while True:
        ended = process.poll() is not None
        for line in log.read_text().splitlines():
            if line.startswith("listening on "):
                return line.split()[-1]
        if ended:
            raise ValueError(f"a rollout server did not start; the end of {log}: {log.read_text()[-2000:]}")
        time.sleep(0.2)


if __name__ == "__main__":
    cli.run(main)

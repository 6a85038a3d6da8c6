"""The quick start with its completions sampled by rollout servers: what a trainer and its GPUs do, on one machine.

    launch/make_vllm_env.sh .venv-vllm
    python -m launch.train_with_servers --config=configs/remote_gym.py --engine=vllm
    python -m launch.train_with_servers --config=configs/remote_gym.py --engine=jax --servers=2

Any other config runs on servers elsewhere in the same way: start launch.serve_rollouts there, and name them with
--config.rollout.addresses="('gpu1:7777','gpu2:7777')". Weights travel in bfloat16, so the servers' policy is a rounded
one; correction="token" weighs the difference. `:quicktest` runs in seconds and shows nothing.
"""

from configs import base, quickstart


def get_config(mode: str = ""):
    base.choose("remote_gym", mode, ["", "quicktest"])
    c = quickstart.get_config(mode)
    c.train.correction = "token"
    return c

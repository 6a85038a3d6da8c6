"""A run's policy as a Hugging Face folder, for transformers, vLLM or another run's model.path.

python -m launch.convert --config=configs/gsm8k.py --workdir=runs/mine --output=exported
"""

from pathlib import Path

import jax
from absl import flags

from launch import build, cli, evaluate
from tapojax.models import huggingface

OUTPUT = flags.DEFINE_string("output", None, "folder to write", required=True)


def main():
    config = cli.checked_config()
    run = build.setup(build.alone(config))
    with jax.set_mesh(run.mesh):
        name, params = evaluate.chosen_params(config, run)
    source = config.model.path or None
    huggingface.save_params(OUTPUT.value, jax.device_get(params), run.model, source=source)
    print(f"written  {name} to {Path(OUTPUT.value).absolute()}")


if __name__ == "__main__":
    cli.run(main)

"""Packaging of tapojax. Commands are run from a clone as `python -m launch.<name>`, so there are no console scripts."""

from pathlib import Path

from setuptools import find_packages, setup

REQUIRES = [
    "jax>=0.10,<0.13",
    "flax>=0.12,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12,<0.13",
    "grain>=0.2.18,<0.3",
    "tensorflow-datasets>=4.9.10,<5",  # 5 MB; its array_record files are written and read without tensorflow
    "transformers>=5,<6",
    "safetensors>=0.8,<1",
    "jinja2>=3.1,<4",  # chat templates; transformers does not ask for it
    "math-verify>=0.9,<0.10",
    "ml-collections>=1.1,<2",
    "absl-py>=2.4,<3",
    "einops>=0.8,<0.9",
    "jaxtyping>=0.3.11,<0.4",
    "numpy>=2",
    "pyarrow>=20",
    "matplotlib>=3.10,<4",
    "tensorboardX>=2.6.5,<3",
    "grpcio>=1.85.1,<2",  # this and protobuf: at least what made tapojax/rpc/tapojax_pb2*.py
    "grpcio-health-checking>=1.85.1,<2",
    "grpcio-reflection>=1.85.1,<2",
    "protobuf>=7.35.1,<8",
    "prometheus-client>=0.26,<1",
]
NOTEBOOKS = ["nbclient>=0.11,<0.12", "nbformat>=5.11,<6", "ipykernel>=7.4,<8"]
JUDGES = ["openai>=2,<3"]  # judges and teachers behind an OpenAI-compatible endpoint
EXTRAS = {
    "cuda": ["jax[cuda13]>=0.10,<0.13"],
    "tpu": ["jax[tpu]>=0.10,<0.13"],
    "vllm": ["vllm>=0.32,<0.34"],  # for the rollout server's own environment; brings torch and CUDA
    "notebooks": ["jupyterlab>=4", *NOTEBOOKS],
    "judges": JUDGES,
    "parity": ["torch==2.13.0"],  # comparisons with transformers; a CPU build is enough
    "dev": [
        *NOTEBOOKS,  # the tests execute notebooks/
        *JUDGES,
        "beartype>=0.22",
        "grpcio-tools==1.85.1",  # makes the stubs; a test compares them with those committed
        "hypothesis>=6.150",
        "jsonschema>=4.23,<5",  # with the next one, reads the manifests of launch/cluster as a cluster would
        "kubernetes-validate>=1.37,<2",
        "mypy>=1.19,<3",
        "pytest>=9",
        "pytest-cov>=7",
        "pytest-timeout>=2.4",
        "pyyaml>=6,<7",
        "ruff>=0.15,<0.18",
    ],
}

setup(
    name="tapojax",
    version="0.1.0",
    description="RL post-training of reasoning language models as pure JAX functions",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["tapojax", "tapojax.*"]),
    package_data={"tapojax": ["py.typed", "**/*.proto", "**/*.md", "**/*.txt"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)

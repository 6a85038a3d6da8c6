"""The layers of the house: who may import whom. Imports are read from the syntax tree, also those inside functions."""

import ast
import fnmatch
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tapojax").rglob("*.py"))
MATHEMATICS = {
    f"tapojax.{name}"
    for name in "advantages losses weights entropy shaping schedules sampling correction logprobs".split()
    if (ROOT / "tapojax" / f"{name}.py").exists()
}
OURS = ("tapojax", "launch", "configs", "tests")


def module_of(file: str) -> str:
    return file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def imports(file: str) -> set[str]:
    """Full names of the modules that a file imports; `from a import b` is a.b where that is one of our modules."""
    tree = ast.parse((ROOT / file).read_text())
    package = module_of(file).split(".") if file.endswith("__init__.py") else module_of(file).split(".")[:-1]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if is_module(name) or base.startswith("absl") else base for name in names}
    return found


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def starts_with(name: str, prefixes) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def offenders(files, allowed) -> list[str]:
    return [f"{file} imports {name}" for file in files for name in sorted(imports(file)) if not allowed(file, name)]


def matching(*patterns) -> list[str]:
    return [file for file in FILES if any(fnmatch.fnmatch(file, pattern) for pattern in patterns)]


def test_the_reader_of_imports_sees_them_all():
    assert {"tapojax.rollout.collect", "tapojax.types", "jax", "numpy"} <= imports("tapojax/evaluation.py")
    assert "matplotlib.figure" in imports("tapojax/report.py"), "imports inside functions count"
    assert "tapojax.algorithms.grpo" in imports("tapojax/algorithms/__init__.py")
    assert "absl.logging" in imports("tapojax/checkpoint.py")
    assert len(FILES) > 20 and len(MATHEMATICS) >= 7


def test_mathematics_imports_nothing_of_ours():
    files = [f"{name.replace('.', '/')}.py" for name in MATHEMATICS]
    assert not offenders(files, lambda file, name: not starts_with(name, OURS))


def test_algorithms_import_mathematics_types_and_one_another():
    files = matching("tapojax/algorithms/*.py")
    allowed = MATHEMATICS | {"tapojax.types", "tapojax.algorithms"}
    assert not offenders(files, lambda file, name: not starts_with(name, OURS) or starts_with(name, allowed))


def test_only_models_and_lora_know_flax():
    def allowed(file, name):
        return not starts_with(name, ["flax"]) or file.startswith("tapojax/models/") or file == "tapojax/lora.py"

    assert not offenders(FILES, allowed)


def test_the_library_knows_no_flags_no_configs_and_no_launcher():
    refused = ["ml_collections", "absl.flags", "absl.app", "launch", "configs", "tests"]
    assert not offenders(FILES, lambda file, name: not starts_with(name, refused))


def test_nobody_imports_torch_tensorflow_or_vllm():
    """vLLM is a server in its own environment; only the files of its engine may name it, and torch."""
    engine = matching("tapojax/rollout/vllm_*.py")

    def allowed(file, name):
        return not starts_with(name, ["torch", "tensorflow", "vllm"]) or (
            starts_with(name, ["torch", "vllm"]) and file in engine
        )

    launchers = [str(p.relative_to(ROOT)) for folder in ("launch", "configs") for p in (ROOT / folder).glob("*.py")]
    assert not offenders([*FILES, *launchers], allowed)


def test_rewards_need_no_jax():
    """Reward workers are many small processes; jax in each would cost seconds and hundreds of megabytes."""
    files = matching("tapojax/rewards/*.py")
    assert not offenders(files, lambda file, name: not starts_with(name, ["jax", "jaxlib", "flax"]))


def test_the_wire_knows_neither_jax_nor_the_trainer():
    """A rollout server of another engine, in an environment without jax, speaks it too."""
    files, ours = matching("tapojax/rpc/*.py"), ["tapojax.rpc", "tapojax.rollout.sampler"]
    assert "tapojax/rpc/server.py" in files

    def allowed(file, name):
        return starts_with(name, ours) or not starts_with(name, [*OURS, "jax", "jaxlib", "jaxtyping", "flax"])

    assert not offenders([*files, "tapojax/rollout/sampler.py"], allowed)


@pytest.mark.parametrize(
    "module",
    [
        "tapojax.rewards.answers",
        "tapojax.rewards.worker",
        "tapojax.rewards.serving",
        "tapojax.rewards.remote",
        "tapojax.rpc.server",
        "tapojax.rpc.client",
        "tapojax.rpc.weights",
    ],
)
def test_verifiers_and_the_wire_load_neither_jax_nor_flax(module):
    """Nor through anything it imports."""
    heavy = ["jax", "jaxlib", "flax", "torch", "tensorflow", "math_verify"]
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

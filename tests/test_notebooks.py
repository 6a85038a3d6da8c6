"""The notebooks: each runs from its first cell to its last, and what is committed shows the outputs of a full run."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MACHINE_PATH = re.compile(r"/(home|root|work|tmp|opt|Users|content|usr)/|[A-Z]:\\")

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@every_notebook
def test_it_runs_from_a_clone(path):
    """In quick mode, in a fresh kernel at the root of the repository, with one device and no shape checks."""
    environment = {key: value for key, value in os.environ.items() if key not in ("NPROC", "MPLBACKEND")}
    client = NotebookClient(
        nbformat.read(path, as_version=4),
        timeout=500,
        kernel_name="python3",
        resources={"metadata": {"path": str(ROOT)}},
    )
    client.execute(env=environment | {"TAPOJAX_QUICK": "1", "XLA_FLAGS": ""})  # a cell that raises fails the test


@every_notebook
def test_what_is_committed_was_executed_whole(path):
    """Every cell in order from a fresh kernel, nothing written to stderr, a picture, no trace of the machine."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "not run from top to bottom"
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert path.stat().st_size < 400_000, "too large to read in a browser: lower figure.dpi"
    texts = [cell.source for cell in notebook.cells] + [text for output in outputs for text in texts_of(output)]
    assert not [text for text in texts if MACHINE_PATH.search(text)]


@every_notebook
def test_it_says_what_it_shows_and_installs_where_needed(path):
    first, install = nbformat.read(path, as_version=4).cells[:2]
    assert first.cell_type == "markdown" and "TAPOJAX_QUICK" in first.source and "will see" in first.source
    assert 'if importlib.util.find_spec("tapojax") is None' in install.source and "pip install" in install.source


def texts_of(output) -> list[str]:
    """All of an output that is text."""
    data = [value for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
    return [*data, output.get("text", "")]


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} == {"advantages", "hapo_tokens", "training_run"}

"""Before jax wakes up: 8 fake CPU devices, a compilation cache, and shape checks on every function of tapojax."""

import os
import signal
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# XLA's CPU pool has as many threads as cores or devices. With 8 fake devices on 2 cores, 7 that wait in a collective
# can leave none for the matrix product the eighth is waiting for: a deadlock. NPROC is the size XLA takes instead.
os.environ.setdefault("NPROC", "32")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "tapojax-test-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# a job that a shell began in the background ignores Ctrl-C, and so would the processes that the tests start
signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook("tapojax", "beartype.beartype").__enter__()


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Every compiled program holds some of the process's 65,530 memory maps (Linux); past them XLA crashes."""
    yield
    jax.clear_caches()


@pytest.fixture
def shared():
    """The folder with real problem sets beside a full checkout; skips where there is none."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real problem sets are not at {folder}")
    return folder

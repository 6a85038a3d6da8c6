"""Nothing is lost: what is restored is what was saved, whatever happened to the disk or to the process in between."""

import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tapojax import checkpoint, sharding

# orbax leaves coroutines behind when it gives up on a damaged step
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
RECORD = {"data": {"next_index": 70}, "seconds": {"train": 1.5}, "text": "π"}


class State(NamedTuple):
    step: Any
    params: Any
    moments: Any
    carry: Any


def make_state(seed, size=64):
    """Random numbers in several types: nothing that compression could shrink."""
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "kernel": jax.random.normal(keys[0], (size, size)),
        "bias": jax.random.normal(keys[1], (size,), jnp.bfloat16),
    }
    flags = jax.random.bernoulli(keys[2], 0.5, (size,))
    return State(jnp.int32(seed), params, (jax.random.randint(keys[3], (size, 4), 0, 2**30), flags), ())


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype, jax.tree_util.keystr(path)
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def restore(folder, seed=0):
    return checkpoint.restore_newest(checkpoint.open_manager(folder), checkpoint.abstract(make_state(seed)))


@pytest.fixture
def two_steps(tmp_path):
    """A folder with steps 10 and 20."""
    manager = checkpoint.open_manager(tmp_path)
    for step in (10, 20):
        checkpoint.save(manager, step, make_state(step), RECORD | {"step": step})
    return tmp_path


def test_round_trip(two_steps):
    step, state, record = restore(two_steps)
    assert (step, record) == (20, RECORD | {"step": 20})
    assert isinstance(state, State)
    assert_same(state, make_state(20))


def test_an_empty_folder_has_nothing(tmp_path):
    assert restore(tmp_path) is None
    assert restore(tmp_path / "new") is None


def test_shardings_are_those_of_like(tmp_path):
    """Saved from one layout, restored into another."""
    mesh, state = sharding.make_mesh(data=2, fsdp=2, tensor=2), make_state(1)
    rows, columns = jax.NamedSharding(mesh, jax.P("fsdp")), jax.NamedSharding(mesh, jax.P(None, "tensor"))
    sharded = state._replace(params={**state.params, "kernel": jax.device_put(state.params["kernel"], rows)})
    checkpoint.save(checkpoint.open_manager(tmp_path), 1, sharded, {})
    like = checkpoint.abstract(sharded)
    kernel = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=columns)
    for want in (like, like._replace(params={**like.params, "kernel": kernel}), checkpoint.abstract(state)):
        _, got, _ = checkpoint.restore_newest(checkpoint.open_manager(tmp_path), want)
        assert_same(got, state)
        assert got.params["kernel"].sharding.is_equivalent_to(want.params["kernel"].sharding, 2)


def test_only_the_newest_are_kept(tmp_path):
    manager = checkpoint.open_manager(tmp_path, keep=3)
    for step in range(1, 6):
        checkpoint.save(manager, step, make_state(step), {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "4", "5"]


def test_another_shape_is_refused(two_steps):
    like = checkpoint.abstract(make_state(0, size=32))
    with pytest.raises(ValueError, match="If the model's shape was changed, use another --workdir"):
        checkpoint.restore_newest(checkpoint.open_manager(two_steps), like)


# ---- damage


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_number(step: Path):
    """One bit in the middle of the arrays' data, where nothing but their digests can tell."""
    path = largest(step / "state")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flip_everywhere(step: Path):
    for path in [p for p in (step / "state").rglob("*") if p.is_file()]:
        path.write_bytes(bytes(b ^ 0x55 for b in path.read_bytes()))


def delete_a_file(step: Path):
    largest(step / "state").unlink()


def truncate_a_file(step: Path):
    path = largest(step / "state")
    os.truncate(path, path.stat().st_size // 2)


def truncate_metadata(step: Path):
    os.truncate(step / "state" / "_METADATA", 10)


def change_the_record(step: Path):
    path = step / "record" / "metadata"
    path.write_text(path.read_text().replace('"next_index": 70', '"next_index": 71'))


def break_the_record(step: Path):
    os.truncate(step / "record" / "metadata", 10)


DAMAGES = [
    flip_a_number,
    flip_everywhere,
    delete_a_file,
    truncate_a_file,
    truncate_metadata,
    change_the_record,
    break_the_record,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_step_is_skipped(two_steps, caplog, damage):
    damage(two_steps / "20")
    step, state, record = restore(two_steps)
    assert (step, record) == (10, RECORD | {"step": 10})
    assert_same(state, make_state(10))
    assert "cannot be read, trying the one before: step 20" in caplog.text, "a damaged step must not pass unnoticed"


def test_no_flipped_byte_goes_unseen(tmp_path):
    """40 random places: either the restore is refused or what it gives is what was saved."""
    manager = checkpoint.open_manager(tmp_path)
    checkpoint.save(manager, 1, make_state(1), RECORD)
    files = [p for p in (tmp_path / "1").rglob("*") if p.is_file() and p.stat().st_size]
    sizes = np.array([p.stat().st_size for p in files])
    rng, refused = np.random.default_rng(0), 0
    for i in rng.choice(len(files), 40, p=sizes / sizes.sum()):
        whole = files[i].read_bytes()
        broken = bytearray(whole)
        broken[rng.integers(len(whole))] ^= int(rng.integers(1, 256))
        files[i].write_bytes(broken)
        try:
            _, state, record = restore(tmp_path)
            assert record == RECORD
            assert_same(state, make_state(1))
        except ValueError:
            refused += 1
        files[i].write_bytes(whole)
    assert refused > 20
    assert_same(restore(tmp_path)[1], make_state(1))


def test_all_steps_damaged_is_an_error(two_steps):
    for step in ("10", "20"):
        flip_a_number(two_steps / step)
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read: step 20: .*; step 10: .*delete the folder"):
        restore(two_steps)


@pytest.mark.parametrize("next_step", [15, 20])
def test_a_run_that_fell_back_can_save_again(two_steps, next_step):
    """The damaged step 20 is in the way; orbax would write nothing and say nothing."""
    delete_a_file(two_steps / "20")
    manager = checkpoint.open_manager(two_steps)
    assert checkpoint.restore_newest(manager, checkpoint.abstract(make_state(0)))[0] == 10
    checkpoint.save(manager, next_step, make_state(99), RECORD)
    step, state, _ = restore(two_steps)
    assert step == next_step
    assert_same(state, make_state(99))
    assert sorted(manager.all_steps()) == [10, next_step]


# ---- killed in the middle

CHILD = """
import sys

import jax.numpy as jnp
import numpy as np

from tapojax import checkpoint

manager = checkpoint.open_manager(sys.argv[1])
start = (manager.latest_step() or 0) + 1
for step in range(start, start + 100):
    rng = np.random.default_rng(step)
    state = {name: jnp.asarray(rng.random((4096, 4096), np.float32)) for name in "abcd"}
    print("saving", flush=True)
    checkpoint.save(manager, step, state, {"step": step})
    print("saved", flush=True)
"""


def kill_during_save(script: Path, folder: Path, fraction: float):
    """Runs the child, lets it save once, and kills it after a fraction of the time that took into its second save."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "XLA_FLAGS": ""}
    child = subprocess.Popen([sys.executable, script, folder], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        times = []
        for _ in child.stdout:
            times.append(time.monotonic())
            if len(times) == 3:  # saving, saved, saving
                break
        assert len(times) == 3, "the child died by itself"
        time.sleep(fraction * (times[1] - times[0]))
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def test_a_kill_in_the_middle_of_a_save_loses_nothing_before_it(tmp_path):
    """256 MiB of random numbers a step, kill -9 at several moments; each time the next run goes on from the rest."""
    script, folder, previous = tmp_path / "child.py", tmp_path / "checkpoints", 0
    script.write_text(CHILD)
    like = {name: jax.ShapeDtypeStruct((4096, 4096), jnp.float32) for name in "abcd"}
    partial = 0
    for fraction in (0.1, 0.45, 0.8):
        kill_during_save(script, folder, fraction)
        partial += any(".orbax-checkpoint-tmp" in p.name for p in folder.iterdir())
        step, state, record = checkpoint.restore_newest(checkpoint.open_manager(folder), like)
        assert record == {"step": step} and step > previous
        rng = np.random.default_rng(step)
        for name in "abcd":
            np.testing.assert_array_equal(state[name], rng.random((4096, 4096), np.float32), err_msg=f"step {step}")
        previous = step
    assert partial, "no kill came in the middle of a save: the test tested nothing"
    shutil.rmtree(folder)


# ---- no room


@pytest.fixture
def small_disk(tmp_path):
    """A folder that takes one step and not two: a 20 MiB file system where we may mount one, else a limit a file."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = (
        shutil.which("mount")
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", folder], capture_output=True
        ).returncode
    )
    if mounted:
        yield folder, lambda: None
        subprocess.run(["umount", "-l", folder], check=True)
    else:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        yield folder, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_an_error_that_names_it_and_costs_nothing(small_disk):
    folder, fill = small_disk
    manager, big = checkpoint.open_manager(folder), {"a": jax.random.normal(jax.random.key(0), (1024, 3072))}
    checkpoint.save(manager, 1, big, {"step": 1})
    fill()
    for step in (2, 3):
        with pytest.raises(OSError, match=rf"checkpoint {step} could not be .* {folder} .*Steps \[1\] are whole"):
            checkpoint.save(manager, step, {"a": big["a"] + step}, {"step": step})
        assert [p.name for p in folder.iterdir()] == ["1"], "the partial step was left behind"
    step, state, record = checkpoint.restore_newest(checkpoint.open_manager(folder), checkpoint.abstract(big))
    assert (step, record) == (1, {"step": 1})
    np.testing.assert_array_equal(state["a"], big["a"])

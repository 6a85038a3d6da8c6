"""What a server ends with is the trainer's weights bit for bit: whole, by deltas, by a folder, from any mesh."""

import asyncio
import dataclasses
import hashlib
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st

from tapojax import sharding, weight_sync
from tapojax.models import decoder, huggingface
from tapojax.models.config import DecoderConfig
from tapojax.rpc import tapojax_pb2 as pb
from tapojax.rpc import weights

QWEN2 = DecoderConfig(50, 24, 40, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, qkv_bias=True)
CONFIGS = {
    "untied": QWEN2,
    "tied": dataclasses.replace(QWEN2, tie_embeddings=True),
    "qwen3": dataclasses.replace(QWEN2, qkv_bias=False, qk_norm=True, head_dim=10),
}
TIED = CONFIGS["tied"]


def random_params(config, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))
    return jax.tree.map(lambda x: (rng.normal(size=x.shape) / 50).astype(jnp.dtype(dtype)), shapes)


def moved(params, rate, seed=1):
    """One step of about `rate`, so that few elements change in bfloat16."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (x + rate * rng.normal(size=x.shape)).astype(x.dtype), params)


def sent(update, current=None, current_version=-1, *, chunk_bytes=1000, **options):
    """What a server has after the update: (version, tensors, bytes)."""

    async def chunks():
        for message in weight_sync.stream(update, chunk_bytes=chunk_bytes):
            yield pb.WeightsChunk.FromString(message.SerializeToString())

    shapes = {spec.name: tuple(spec.shape) for spec in update.header.tensors}
    return asyncio.run(weights.receive(chunks(), current, current_version, shapes, max_bytes=10**8, **options))


def assert_same(got, bits):
    """Tensors of a server are the trainer's bits."""
    assert got.keys() == bits.keys()
    for name, x in bits.items():
        assert (got[name].dtype, got[name].shape) == (weight_sync.DTYPES[x.dtype.name], x.shape), name
        assert bytes(got[name].data) == np.asarray(x).tobytes(), f"{name} arrived with other bits"


def only(x, **others):
    return {"x": jnp.asarray(x), **others}


# ---- our parameters in their names


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_publish_is_named_tensors_bit_for_bit(name, param_dtype, dtype):
    config, params = CONFIGS[name], random_params(CONFIGS[name], param_dtype)
    bits = weight_sync.publish(params, config, dtype)
    want = dict(huggingface.named_tensors(params, config, dtype=dtype))
    assert bits.keys() == want.keys()
    assert {name: x.shape for name, x in bits.items()} == weight_sync.shapes(config)
    for name, x in want.items():
        np.testing.assert_array_equal(bits[name], x.view(bits[name].dtype), err_msg=name)


def test_the_cast_is_numpys_at_the_edges_of_float32():
    patterns = [0, 1, 0x7FFFFF, 0x80000001, 0x8000, 0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0x7FC00001]
    edges = np.array([p ^ sign for p in patterns for sign in (0, 1 << 31)], np.uint32).view(np.float32)
    params = random_params(TIED)
    params["embedding"].flat[: len(edges)] = edges
    bits = weight_sync.publish(params, TIED, "bfloat16")["model.embed_tokens.weight"]
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(bits, params["embedding"].astype(jnp.bfloat16).view(np.uint16))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_server_makes_the_params_again(name, dtype):
    config, params = CONFIGS[name], random_params(CONFIGS[name])
    _, got, _ = sent(weight_sync.encode(weight_sync.publish(params, config, dtype), version=0))
    arrays = {name: np.frombuffer(t.data, jnp.dtype(t.dtype)).reshape(t.shape) for name, t in got.items()}
    for given_dtype in (None, "bfloat16"):
        again = huggingface.from_named(arrays, config, dtype=given_dtype)
        want = jax.tree.map(lambda x, d=given_dtype: x.astype(dtype).astype(d or "float32"), params)
        flat = traverse_util.flatten_dict(again, sep="/")
        for path, x in traverse_util.flatten_dict(want, sep="/").items():
            assert (flat[path].dtype, flat[path].tobytes()) == (x.dtype, x.tobytes()), path


def test_from_named_names_what_does_not_fit():
    tensors = dict(huggingface.named_tensors(random_params(TIED), TIED))
    del tensors["model.norm.weight"]
    tensors |= {"lm_head.weight": tensors["model.embed_tokens.weight"], "model.layers.0.mlp.up_proj.weight": np.ones(3)}
    words = r"1 missing: model.norm.weight; 1 unexpected: lm_head.weight; 1 of another shape: .*up_proj.weight \(3,\)"
    with pytest.raises(ValueError, match=words):
        huggingface.from_named(tensors, TIED)


def test_published_bits_outlive_the_params():
    """The train step donates its state's buffers."""
    for dtype in ("float32", "bfloat16"):
        params = jax.device_put(random_params(TIED))
        bits = weight_sync.publish(params, TIED, dtype)
        jax.block_until_ready(jax.jit(lambda p: jax.tree.map(lambda x: x * 0, p), donate_argnums=0)(params))
        assert_same(sent(weight_sync.encode(bits, version=0))[1], weight_sync.publish(random_params(TIED), TIED, dtype))


def test_what_cannot_be_published_is_refused():
    with pytest.raises(ValueError, match="weights cannot travel as 'float16': choose one of bfloat16, float32"):
        weight_sync.publish(random_params(TIED), TIED, "float16")
    with pytest.raises(ValueError, match="params are not those of this config: 1 missing: head"):
        weight_sync.publish(random_params(TIED), QWEN2, "bfloat16")


# ---- whole and by deltas


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", CONFIGS)
def test_several_versions_arrive_bit_for_bit(name, dtype):
    config, params = CONFIGS[name], random_params(CONFIGS[name])
    bits = weight_sync.publish(params, config, dtype)
    version, held, full = sent(weight_sync.encode(bits, version=0))
    assert (version, full) == (0, sum(x.nbytes for x in bits.values()))
    assert_same(held, bits)
    for step in range(1, 6):
        params, previous = moved(params, 1e-6, seed=step), bits
        bits = weight_sync.publish(params, config, dtype)
        update = weight_sync.encode(bits, previous, version=step, base_version=step - 1)
        version, held, size = sent(update, held, version)
        assert version == step
        assert_same(held, bits)
        assert size < full / 10 if dtype == "bfloat16" else size <= full


@pytest.mark.parametrize("chunk_bytes", [1, 7, 2000, 2**21])
def test_chunks_hold_at_most_what_was_asked(chunk_bytes):
    bits = weight_sync.publish(random_params(TIED), TIED, "float32")
    update = weight_sync.encode(bits, version=0)
    messages = list(weight_sync.stream(update, chunk_bytes=chunk_bytes))
    assert max(len(message.piece.data) for message in messages) <= chunk_bytes
    pieces = sum(-(-x.nbytes // chunk_bytes) for x in bits.values())
    assert len(messages) == 1 + pieces + len(bits), "a header, full pieces, and an end for each tensor"
    assert_same(sent(update, chunk_bytes=chunk_bytes)[1], bits)


@pytest.mark.parametrize("bits", [np.uint16, np.uint32])
def test_bits_are_compared_not_numbers(bits):
    """NaN equals itself, and -0.0 is not 0.0."""
    kind, sign = (jnp.bfloat16, 0x8000) if bits == np.uint16 else (np.float32, 1 << 31)
    nan = np.array(np.nan, kind).view(bits).item()
    before = np.array([0, nan, nan, 1, sign, 0x1234] + [7] * 94, bits)
    after = np.array([sign, nan, nan ^ 1, 0, sign, 0x1234] + [7] * 94, bits)
    update = weight_sync.encode(only(after), only(before), version=1, base_version=0)
    assert update.tensors[0].end.changed == 3, "positions 0, 2 and 3"
    assert_same(sent(update, weight_sync.tensors(only(before)), 0)[1], only(after))


def test_an_empty_delta_sends_no_piece_and_shares_the_tensors():
    bits = weight_sync.publish(random_params(TIED), TIED, "bfloat16")
    update = weight_sync.encode(bits, bits, version=1, base_version=0)
    assert not any(message.HasField("piece") for message in weight_sync.stream(update, chunk_bytes=100))
    held = weight_sync.tensors(bits)
    version, got, size = sent(update, held, 0)
    assert (version, size) == (1, 0)
    assert all(got[name] is held[name] for name in held)


def test_an_unchanged_tensor_is_checked_all_the_same():
    bits = weight_sync.publish(random_params(TIED), TIED, "bfloat16")
    other = weight_sync.publish(random_params(TIED, seed=1), TIED, "bfloat16")
    update = weight_sync.encode(bits, bits, version=1, base_version=0)
    with pytest.raises(weights.ChecksumError, match="crc32 of model.embed_tokens.weight"):
        sent(update, weight_sync.tensors(other), 0)


def test_a_delta_onto_another_base_never_passes():
    params = random_params(TIED)
    one, two = (weight_sync.publish(moved(params, 1e-6, seed), TIED, "bfloat16") for seed in (1, 2))
    update = weight_sync.encode(two, one, version=1, base_version=0)
    with pytest.raises(weights.BaseMismatch, match="against version 0, this server holds 7"):
        sent(update, weight_sync.tensors(one), 7)
    with pytest.raises(weights.ChecksumError):  # the version is right, the weights are not
        sent(update, weight_sync.tensors(weight_sync.publish(params, TIED, "bfloat16")), 0)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_the_smaller_encoding_is_sent(dtype):
    rng, size = np.random.default_rng(0), 4096
    before = rng.integers(0, 2**16, size).astype(dtype)
    for count in (0, 1, 100, 2500, 2700, 3000, 4096):
        after, changed = before.copy(), rng.permutation(size)[:count]
        after[changed] ^= 1
        gap_bytes = 1 if np.diff(np.sort(changed), prepend=0).max(initial=0) < 256 else 2
        delta, whole = count * (gap_bytes + before.itemsize), before.nbytes
        update = weight_sync.encode(only(after), only(before), version=1, base_version=0)
        want = pb.ENCODING_DELTA if delta < whole else pb.ENCODING_WHOLE
        assert (update.tensors[0].end.encoding, update.tensors[0].data.nbytes) == (want, min(delta, whole)), count
        assert_same(sent(update, weight_sync.tensors(only(before)), 0)[1], only(after))


@pytest.mark.parametrize(
    ("positions", "gap_bytes"),
    [
        ([0], 1),
        ([255], 1),
        ([256], 2),
        ([0, 255, 510], 1),
        ([0, 256], 2),
        ([65535], 2),
        ([65536], 4),
        ([3, 4, 65540], 4),
        ([69_999], 4),
    ],
)
def test_gaps_take_the_bytes_of_the_largest(positions, gap_bytes):
    before = np.zeros((70, 1000), np.uint16)
    after = before.copy()
    after.flat[positions] = 9
    update = weight_sync.encode(only(after), only(before), version=1, base_version=0)
    (data, end), count = update.tensors[0], len(positions)
    assert (end.changed, end.gap_bytes) == (count, gap_bytes)
    gaps = np.frombuffer(data[: count * gap_bytes].tobytes(), f"<u{gap_bytes}")
    np.testing.assert_array_equal(np.cumsum(gaps), positions)
    assert_same(sent(update, weight_sync.tensors(only(before)), 0)[1], only(after))


def test_a_small_delta_with_wide_gaps_may_be_larger_than_the_whole():
    """A gap of two bytes makes 600 changes of 1000 dearer than the tensor, though one byte would not."""
    before = np.zeros(1000, np.uint16)
    after = before.copy()
    after[np.r_[:3, 300:897]] = 1
    update = weight_sync.encode(only(after), only(before), version=1, base_version=0)
    assert update.tensors[0].end.encoding == pb.ENCODING_WHOLE
    assert_same(sent(update, weight_sync.tensors(only(before)), 0)[1], only(after))


def test_a_tensor_too_large_for_its_positions_goes_whole(monkeypatch):
    monkeypatch.setattr(weight_sync, "LARGEST", 99)
    before, after = np.zeros(100, np.uint16), np.eye(1, 100, dtype=np.uint16)[0]
    update = weight_sync.encode(only(after), only(before), version=1, base_version=0)
    assert update.tensors[0].end.encoding == pb.ENCODING_WHOLE
    assert_same(sent(update, weight_sync.tensors(only(before)), 0)[1], only(after))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 31, 32, 33, 64, 100, 1000]), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_changes_are_those_that_numpy_finds(size, fraction, seed):
    rng = np.random.default_rng(seed)
    before = rng.integers(0, 2**16, size).astype(np.uint16)
    after = np.where(rng.random(size) < fraction, before ^ rng.integers(1, 2**16, size).astype(np.uint16), before)
    want = np.flatnonzero(before != after)
    positions, values = weight_sync.changes(jnp.asarray(after), jnp.asarray(before), room=1024)
    np.testing.assert_array_equal(positions[: len(want)], want)
    np.testing.assert_array_equal(values[: len(want)], after[want])


def test_a_base_comes_with_its_version_and_the_same_tensors():
    x, y = np.zeros(4, np.uint16), np.zeros(4, np.uint32)
    for previous, base in ((None, 3), (only(x), -1)):
        with pytest.raises(ValueError, match=f"base_version={base}: give the bits"):
            weight_sync.encode(only(x), previous, version=4, base_version=base)
    for previous in (only(y), only(x[:2]), only(x, z=jnp.zeros(2, jnp.uint16))):
        with pytest.raises(ValueError, match="a delta needs the same tensors, these differ:"):
            weight_sync.encode(only(x), previous, version=4, base_version=3)


def test_compilations_do_not_grow_with_the_versions(monkeypatch):
    """Traces are counted inside the functions, so that no cache can hide one."""
    traced = []

    def counting(name):
        original = getattr(weight_sync, name).__wrapped__

        def traced_function(*args, **kwargs):
            traced.append((name, kwargs.get("room"), args[0].shape if name == "changes" else None))
            return original(*args, **kwargs)

        monkeypatch.setattr(weight_sync, name, jax.jit(traced_function, static_argnames="room"))

    counting("changes")
    counting("_counts")
    rng = np.random.default_rng(0)
    bits = {name: jnp.zeros((64, 512), jnp.uint16) for name in "abc"}
    for version in range(40):
        previous, fraction = bits, 0.6 * rng.random() ** 2
        bits = {name: jnp.asarray(np.asarray(x) + (rng.random(x.shape) < fraction)) for name, x in bits.items()}
        bits = {name: x.astype(jnp.uint16) for name, x in bits.items()}
        weight_sync.encode(bits, previous, version=version + 1, base_version=version)
    assert sum(name == "_counts" for name, *_ in traced) == 1
    rooms = [room for name, room, _ in traced if name == "changes"]
    assert len(rooms) == len(set(rooms)), "one shape, one room: traced once"
    assert set(rooms) <= {1024 << k for k in range(6)}, "powers of two up to the tensor's 32,768 elements"


# ---- from any layout of the devices


@pytest.mark.parametrize(
    ("name", "axes"), [("untied", {"fsdp": 4, "tensor": 2}), ("qwen3", {"data": 2, "fsdp": 2, "tensor": 2})]
)
def test_a_sharded_trainer_sends_the_same_messages(name, axes):
    config = dataclasses.replace(CONFIGS[name], vocab_size=64)
    before = random_params(config)
    after = moved(before, 1e-6)

    def encoded(place):
        one, two = (weight_sync.publish(place(params), config, "bfloat16") for params in (before, after))
        return weight_sync.encode(two, one, version=1, base_version=0), weight_sync.encode(one, version=0)

    alone = encoded(jax.device_put)
    mesh = sharding.make_mesh(**axes)
    with jax.set_mesh(mesh):
        shardings = sharding.tree_shardings(before, mesh)
        sharded = encoded(lambda params: jax.device_put(params, shardings))
    for got, want in zip(sharded, alone, strict=True):
        assert list(weight_sync.stream(got, chunk_bytes=500)) == list(weight_sync.stream(want, chunk_bytes=500))


TWO_PROCESSES = """
import hashlib, sys, jax, numpy as np
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
from tapojax import weight_sync
mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
def placed(x):
    sharding = jax.NamedSharding(mesh, jax.P("fsdp", "tensor"))
    return {"x": jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])}
before = np.arange(64 * 96, dtype=np.uint16).reshape(64, 96)
after = before + (before % 97 == 0)
update = weight_sync.encode(placed(after), placed(before), version=1, base_version=0)
text = b"".join(m.SerializeToString(deterministic=True) for m in weight_sync.stream(update, chunk_bytes=100))
print("digest", len(jax.devices()), hashlib.sha256(text).hexdigest())
"""


def test_a_trainer_of_two_processes_encodes_what_one_does(monkeypatch):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    command, root = [sys.executable, "-c", TWO_PROCESSES, port], Path(__file__).parents[1]
    processes = [
        subprocess.Popen([*command, str(rank)], cwd=root, stdout=subprocess.PIPE, text=True) for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    before = np.arange(64 * 96, dtype=np.uint16).reshape(64, 96)
    after = (before + (before % 97 == 0)).astype(np.uint16)
    update = weight_sync.encode(only(after), only(before), version=1, base_version=0)
    text = b"".join(m.SerializeToString(deterministic=True) for m in weight_sync.stream(update, chunk_bytes=100))
    for lines in said:
        assert f"digest 4 {hashlib.sha256(text).hexdigest()}" in lines


# ---- by way of a file system


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shard_bytes", [10**9, 3000])
def test_weights_arrive_through_a_shared_folder(tmp_path, dtype, shard_bytes, monkeypatch):
    monkeypatch.setattr(weight_sync, "SHARD_BYTES", shard_bytes)
    bits = weight_sync.publish(random_params(QWEN2), QWEN2, dtype)
    update = weight_sync.encode(bits, version=5)
    with weight_sync.shared_folder(update, tmp_path) as shared:
        (message,) = weight_sync.stream(shared, chunk_bytes=100)
        assert not Path(message.header.path).is_absolute()
        assert len(list((tmp_path / message.header.path).glob("*.safetensors"))) == 1 or shard_bytes == 3000
        version, got, size = sent(shared, root=tmp_path)
    assert not list(tmp_path.iterdir()), "the folder is gone when all have it"
    assert (version, size) == (5, sum(x.nbytes for x in bits.values()))
    assert_same(got, bits)


def test_a_shared_folder_is_deleted_after_a_failure_and_takes_no_delta(tmp_path):
    bits = weight_sync.publish(random_params(TIED), TIED, "bfloat16")
    with pytest.raises(KeyError):
        with weight_sync.shared_folder(weight_sync.encode(bits, version=0), tmp_path):
            raise KeyError
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="a delta is small and needs no folder"):
        with weight_sync.shared_folder(weight_sync.encode(bits, bits, version=1, base_version=0), tmp_path):
            pass
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write"):
        with weight_sync.shared_folder(weight_sync.encode(bits, version=0), tmp_path / "file"):
            pass

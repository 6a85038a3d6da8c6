"""Weights for rollout servers, from the trainer: whole, or what has changed since a version that the server holds.

    bits = publish(params, config, "bfloat16")                      # stays on the devices
    update = encode(bits, previous, version=8, base_version=7)      # once, however many servers there are
    stub.LoadWeights(stream(update, chunk_bytes=2**21), timeout=60)

Bits, not numbers, are compared and sent (bfloat16 as uint16, float32 as uint32), so that -0.0 and NaN arrive as they
are and a server ends with exactly the trainer's cast. A delta overwrites: changed positions of the flat tensor, each as
its gap to the one before, then their new bits. At learning rates of reinforcement learning most updates are smaller
than a step of bfloat16, and few per cent of the elements change. The header has the crc32 of every whole tensor as it
must be in the end, so a delta onto another base cannot pass unseen. `rpc/weights.py` is the other side.
"""

import contextlib
import functools
import shutil
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Int, Shaped, UInt

from tapojax.models import huggingface, safetensors_folder
from tapojax.models.config import DecoderConfig
from tapojax.rollout.sampler import Tensor
from tapojax.rpc import tapojax_pb2 as pb

DTYPES = {"uint16": "bfloat16", "uint32": "float32"}  # bits -> what they mean
LEAST_ROOM = 1024  # changed elements; more get room for a power of two, so few shapes are compiled
LARGEST = 2**31 - 1  # elements of a tensor whose positions an int32 can count; larger ones go whole
SHARD_BYTES = 1_000_000_000  # of a file in a shared folder; a server holds one of them twice
Bits = Mapping[str, UInt[Array, "..."]]  # Hugging Face name -> the tensor's bits in its layout


class Encoded(NamedTuple):
    """One tensor of an update: what its pieces hold, and how that is to be read."""

    data: np.ndarray
    end: pb.TensorEnd


class Update(NamedTuple):
    """One version of the weights on the host, ready for any number of servers that hold its base."""

    header: pb.WeightsHeader
    tensors: Sequence[Encoded]  # in the header's order; none where the header names a folder


def shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every tensor that `publish` gives."""
    return {name: tensor.shape for name, tensor in huggingface.manifest(config).items()}


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def publish(params: Any, config: DecoderConfig, dtype: str) -> dict[str, UInt[Array, "..."]]:
    """The params cast to `dtype`, as bits in Hugging Face names and layouts; they stay on the devices.

    Raises:
      ValueError: params are not those of the config, or the dtype is not one that travels.
    """
    if dtype not in DTYPES.values():
        raise ValueError(f"weights cannot travel as {dtype!r}: choose one of {', '.join(DTYPES.values())}")
    unsigned = {name: jnp.dtype(bits) for bits, name in DTYPES.items()}[dtype]
    named = huggingface.to_named(params, config)
    return {name: jax.lax.bitcast_convert_type(x.astype(dtype), unsigned) for name, x in named.items()}


def encode(bits: Bits, previous: Bits | None = None, *, version: int, base_version: int = -1) -> Update:
    """Version `version`: whole, or against `previous`, which is `base_version`. A whole tensor goes where no delta
    is smaller. In a trainer of several processes all of them call this, and each has the whole update.

    Raises:
      ValueError: a base without its version, or of other tensors.
    """
    if (previous is None) != (base_version < 0):
        raise ValueError(f"base_version={base_version}: give the bits of that version, and -1 without any")
    if previous is not None and (was := _kinds(previous)) != (now := _kinds(bits)):
        raise ValueError(f"a delta needs the same tensors, these differ: {sorted(was.items() ^ now.items())[:4]}")
    host = {name: np.asarray(x, order="C") for name, x in _on_host(bits).items()}
    encoded = [Encoded(x, pb.TensorEnd(tensor=i, encoding=pb.ENCODING_WHOLE)) for i, x in enumerate(host.values())]
    header = pb.WeightsHeader(version=version, base_version=base_version)
    with ThreadPoolExecutor() as threads:  # zlib lets go of the interpreter's lock
        checksums = threads.map(zlib.crc32, host.values())
        if previous is not None:
            counts = _on_host(_counts(bits, previous))
            named = zip(host, encoded, strict=True)
            encoded = [_smaller(whole, bits[name], previous[name], int(counts[name])) for name, whole in named]
        for (name, x), crc32 in zip(host.items(), checksums, strict=True):
            header.tensors.add(name=name, dtype=DTYPES[x.dtype.name], shape=x.shape, crc32=crc32)
    return Update(header, encoded)


def _kinds(bits: Bits) -> dict[str, str]:
    return {name: f"{x.dtype.name}{x.shape}" for name, x in bits.items()}


def _on_host(tree: Any) -> Any:
    """As numpy arrays. Where other processes hold a part, all of them must ask, in the same order."""
    return jax.device_get(tree) if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)


@jax.jit
def _counts(bits: Bits, previous: Bits) -> dict[str, Int[Array, ""]]:
    """Changed elements of each tensor."""
    return {name: jnp.sum(x != previous[name], dtype=jnp.int32) for name, x in bits.items()}


def _smaller(whole: Encoded, bits: Any, previous: Any, count: int) -> Encoded:
    """The delta of a tensor, or the whole where that is not larger.

    Gaps take 1, 2 or 4 bytes, whichever holds the largest one.
    """
    data, index = whole.data, whole.end.tensor
    if data.size > LARGEST or count * (1 + data.itemsize) >= data.nbytes:
        return whole
    if not count:
        return Encoded(np.empty(0, np.uint8), pb.TensorEnd(tensor=index, encoding=pb.ENCODING_DELTA, gap_bytes=1))
    room = max(LEAST_ROOM, 1 << (count - 1).bit_length())
    positions, values = (x[:count] for x in _on_host(changes(bits, previous, room=room)))
    gaps = np.diff(positions, prepend=0)
    width = next(width for width in (1, 2, 4) if gaps.max() < 256**width)
    if count * (width + data.itemsize) >= data.nbytes:
        return whole
    pieces = np.concatenate([gaps.astype(f"<u{width}").view(np.uint8), values.view(np.uint8)])
    end = pb.TensorEnd(tensor=index, encoding=pb.ENCODING_DELTA, changed=count, gap_bytes=width)
    return Encoded(pieces, end)


@functools.partial(jax.jit, static_argnames="room")
def changes(
    bits: UInt[Array, "..."], previous: UInt[Array, "..."], *, room: int
) -> tuple[Int[Array, "{room}"], UInt[Array, "{room}"]]:
    """Flat positions of the first `room` elements that differ, in order, and their new bits.

    What follows the last one has no meaning. The k-th is sought among the running counts of words of 32 comparisons,
    then inside its word by halves: a cumulative sum over single elements, as in jnp.nonzero, takes 20 times as long.
    """
    differs = (bits != previous).reshape(-1)
    differs = jnp.pad(differs, (0, -differs.size % 32)).reshape(-1, 32).astype(jnp.uint32)
    words = jnp.sum(differs << jnp.arange(32, dtype=jnp.uint32), axis=1, dtype=jnp.uint32)
    held = jax.lax.population_count(words).astype(jnp.int32)
    ends = jnp.cumsum(held)
    rank = jnp.arange(room, dtype=jnp.int32)
    index = jnp.minimum(jnp.searchsorted(ends, rank, side="right"), words.size - 1).astype(jnp.int32)
    positions = 32 * index + _bit_of_rank(words[index], rank - (ends - held)[index])
    return positions, bits.reshape(-1).at[positions].get(mode="clip")


def _bit_of_rank(word: UInt[Array, "K"], rank: Int[Array, "K"]) -> Int[Array, "K"]:
    """Place of the set bit before which `rank` others are set."""
    place = jnp.zeros_like(rank)
    for width in (16, 8, 4, 2, 1):
        below = jax.lax.population_count(word & jnp.uint32((1 << width) - 1)).astype(jnp.int32)
        above = rank >= below
        rank, place = jnp.where(above, rank - below, rank), jnp.where(above, place + width, place)
        word = jnp.where(above, word >> width, word)
    return place


def stream(update: Update, *, chunk_bytes: int) -> Iterator[pb.WeightsChunk]:
    """The messages of an update: its header, then each tensor's pieces of at most chunk_bytes and its end."""
    yield pb.WeightsChunk(header=update.header)
    for data, end in update.tensors:
        view = _buffer(data)
        for begin in range(0, len(view), chunk_bytes):
            piece = pb.TensorPiece(tensor=end.tensor, data=bytes(view[begin : begin + chunk_bytes]))
            yield pb.WeightsChunk(piece=piece)
        yield pb.WeightsChunk(end=end)


@contextlib.contextmanager
def shared_folder(update: Update, root: safetensors_folder.PathLike) -> Iterator[Update]:
    """The same weights by way of a file system that trainer and servers share: an update without pieces, whose header
    names a new folder of safetensors under `root`. The folder is deleted when the block ends.

    Raises:
      ValueError: the update is a delta.
      OSError: the disk is full or refuses; nothing is left behind.
    """
    if update.header.base_version >= 0:
        raise ValueError("a delta is small and needs no folder: encode the weights whole, without previous")
    folder = Path(root) / f"version-{update.header.version}-{uuid.uuid4().hex}"
    named = zip((spec.name for spec in update.header.tensors), update.tensors, strict=True)
    arrays = ((name, _meant(encoded.data)) for name, encoded in named)
    try:
        with safetensors_folder.appearing(folder) as partial:
            safetensors_folder.write(partial, arrays, max_shard_bytes=SHARD_BYTES)
        header = pb.WeightsHeader()
        header.CopyFrom(update.header)
        header.path = folder.name
        yield Update(header, ())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def tensors(bits: Bits) -> dict[str, Tensor]:
    """The weights as a sampler of this process takes them."""
    return {name: Tensor(DTYPES[x.dtype.name], x.shape, _buffer(x)) for name, x in _on_host(bits).items()}


def _buffer(x: Any) -> memoryview:
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8).data


def _meant(bits: Any) -> Shaped[np.ndarray, "..."]:
    """The numbers whose bits these are."""
    return bits.view(jnp.dtype(DTYPES[bits.dtype.name]))

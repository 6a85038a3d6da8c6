"""Weights as they reach a rollout server: checked whole before anything is touched. numpy alone, no jax.

A stream is a header with every tensor's name, dtype, shape and crc32 at the new version, then per tensor, in the
header's order, its pieces and its end. A tensor comes whole, or as a delta that overwrites elements of the version
before: `changed` gaps between flat positions (the first from 0), then as many values. See `tapojax/weight_sync.py` for
the sending side. Or the header names a folder of safetensors under the server's root, and nothing follows.
"""

import asyncio
import math
import os
import zlib
from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from tapojax.rollout.sampler import Tensor
from tapojax.rpc import tapojax_pb2 as pb

BITS: dict[str, Any] = {"bfloat16": np.dtype("<u2"), "float32": np.dtype("<u4")}
STORED = {"BF16": "bfloat16", "F32": "float32"}  # safetensors' names
FILE_HEADERS = 2**24  # bytes that files of a folder may have beside their tensors
LISTED = 5


class ChecksumError(ValueError):
    """A tensor is not what its crc32 says: damaged on the way, or a delta onto other weights than it was made for."""


class BaseMismatch(ValueError):
    """A delta against a version that is not the one held here."""


async def receive(
    chunks: AsyncIterable[pb.WeightsChunk],
    current: Mapping[str, Tensor] | None,
    current_version: int,
    expected: Mapping[str, Sequence[int]],
    *,
    max_bytes: int,
    root: Path | None = None,
) -> tuple[int, dict[str, Tensor], int]:
    """Version, every tensor, and the bytes of weights that were read.

    `current` stays as it is: unchanged tensors are shared with it, all others are new. Checks run in threads while
    the stream goes on.

    Args:
      expected: name -> shape of every tensor of the model.
      max_bytes: of the whole model; nothing larger is allocated.
      root: the only folder that a header's path may lead into; None reads no files.

    Raises:
      ChecksumError: see there.
      BaseMismatch: see there.
      ValueError: other names, shapes or dtypes, too many bytes, pieces out of order, positions out of range, a
        stream that ends early or goes on, a path outside the root.
    """
    parts = aiter(chunks)
    header = (await _next(parts, "header")).header
    _check(header, expected, max_bytes)
    base = _base(header, current, current_version)
    if header.path:
        await _next(parts)
        return await asyncio.to_thread(_read_folder, header, root)
    decoded: list[asyncio.Future[Tensor]] = []
    received = 0
    try:
        for index, spec in enumerate(header.tensors):
            data, end = await _collect(parts, index, spec)
            received += len(data)
            decoding = asyncio.to_thread(_decode, spec, data, end, base[spec.name] if base else None)
            decoded.append(asyncio.ensure_future(decoding))
        await _next(parts)
        tensors = await asyncio.gather(*decoded)
    finally:  # also after a failure no thread is left at work
        await asyncio.gather(*decoded, return_exceptions=True)
    return header.version, dict(zip((spec.name for spec in header.tensors), tensors, strict=True)), received


async def _next(parts: AsyncIterator[pb.WeightsChunk], *wanted: str) -> Any:
    """The next message, which must be one of `wanted`; nothing wanted means the end of the stream."""
    chunk = await anext(parts, None)
    kind = None if chunk is None else chunk.WhichOneof("part")
    if (kind not in wanted) if wanted else (chunk is not None):
        what = "the stream ended" if chunk is None else f"a message with {kind or 'nothing known'} came"
        raise ValueError(f"weights: {what} where {' or '.join(wanted) or 'the end of the stream'} was due")
    return chunk


def _check(header: pb.WeightsHeader, expected: Mapping[str, Sequence[int]], max_bytes: int):
    """Raises ValueError unless the header announces exactly the expected tensors, within max_bytes."""
    specs = {spec.name: spec for spec in header.tensors}
    problems = {
        "missing": expected.keys() - specs.keys(),
        "unexpected": specs.keys() - expected.keys(),
        "named twice": ["some"] if len(specs) < len(header.tensors) else [],
        "of another shape": [
            f"{name} {tuple(spec.shape)} (here: {tuple(expected[name])})"
            for name, spec in specs.items()
            if name in expected and tuple(spec.shape) != tuple(expected[name])
        ],
        "of another dtype than bfloat16 and float32": [
            f"{name} {spec.dtype!r}" for name, spec in specs.items() if spec.dtype not in BITS
        ],
    }
    listed = [f"{len(names)} {what}: {', '.join(sorted(names)[:LISTED])}" for what, names in problems.items() if names]
    if listed:
        raise ValueError(f"weights of another model than this server's: {'; '.join(listed)}")
    if (total := sum(map(_size, header.tensors))) > max_bytes:
        raise ValueError(f"weights of {total} bytes are over this server's limit of {max_bytes}")
    if header.version < 0:
        raise ValueError(f"weights: version={header.version} must not be negative")


def _size(spec: pb.TensorSpec) -> int:
    return math.prod(spec.shape) * BITS[spec.dtype].itemsize


def _base(
    header: pb.WeightsHeader, current: Mapping[str, Tensor] | None, current_version: int
) -> Mapping[str, Tensor] | None:
    """What the delta is against; None where the tensors are whole."""
    if header.base_version < 0:
        return None
    if current is None or header.base_version != current_version:
        held = "none" if current is None else current_version
        raise BaseMismatch(f"weights: a delta against version {header.base_version}, this server holds {held}")
    if header.path:
        raise ValueError("weights: a folder holds whole tensors, and the header names a base_version")
    for spec in header.tensors:
        if spec.dtype != current[spec.name].dtype:
            raise BaseMismatch(f"weights: {spec.name} is {spec.dtype}, its base here {current[spec.name].dtype}")
    return current


async def _collect(
    parts: AsyncIterator[pb.WeightsChunk], index: int, spec: pb.TensorSpec
) -> tuple[np.ndarray, pb.TensorEnd]:
    """The bytes of one tensor's pieces, never more than the whole tensor has, and its end."""
    buffer, length = np.empty(_size(spec), np.uint8), 0
    while True:
        chunk = await _next(parts, "piece", "end")
        part = chunk.end if chunk.HasField("end") else chunk.piece
        if part.tensor != index:
            raise ValueError(f"weights: a part of tensor {part.tensor} came where {index} ({spec.name}) was due")
        if chunk.HasField("end"):
            return buffer[:length], part
        if not part.data or length + len(part.data) > len(buffer):
            raise ValueError(f"weights: an empty piece of {spec.name}, or more than its {len(buffer)} bytes")
        buffer[length : length + len(part.data)] = np.frombuffer(part.data, np.uint8)
        length += len(part.data)


def _decode(spec: pb.TensorSpec, data: np.ndarray, end: pb.TensorEnd, base: Tensor | None) -> Tensor:
    """The tensor at the new version, its checksum compared; an unchanged one is the base's own."""
    if end.encoding == pb.ENCODING_WHOLE:
        if len(data) != _size(spec):
            raise ValueError(f"weights: {spec.name} came with {len(data)} of its {_size(spec)} bytes")
        new = Tensor(spec.dtype, tuple(spec.shape), data.data)
    elif end.encoding == pb.ENCODING_DELTA and base is not None:
        new = _overwrite(spec, data, end, base)
    else:
        raise ValueError(f"weights: {spec.name} has encoding {end.encoding}, which has no meaning here")
    return _checked(spec, new)


def _overwrite(spec: pb.TensorSpec, data: np.ndarray, end: pb.TensorEnd, base: Tensor) -> Tensor:
    bits, count, width = BITS[spec.dtype], end.changed, end.gap_bytes
    if width not in (1, 2, 4) or len(data) != count * (width + bits.itemsize):
        raise ValueError(
            f"weights: the delta of {spec.name} has {len(data)} bytes, which are not {count} gaps of {width} bytes "
            f"(1, 2 or 4) and as many values of {bits.itemsize}"
        )
    if not count:
        return base
    gaps = np.frombuffer(data, f"<u{width}", count)
    positions = np.cumsum(gaps, dtype=np.int64)
    if not gaps[1:].all():
        raise ValueError(f"weights: the delta of {spec.name} names a position twice")
    if positions[-1] >= math.prod(spec.shape):
        raise ValueError(f"weights: the delta of {spec.name} reaches position {positions[-1]} of {tuple(spec.shape)}")
    new = np.frombuffer(base.data, bits).copy()
    new[positions] = np.frombuffer(data, bits, count, offset=count * width)
    return Tensor(spec.dtype, base.shape, new.view(np.uint8).data)


def _checked(spec: pb.TensorSpec, tensor: Tensor) -> Tensor:
    if (crc32 := zlib.crc32(tensor.data)) != spec.crc32:
        raise ChecksumError(
            f"weights: crc32 of {spec.name} is {crc32:08x} and must be {spec.crc32:08x}: it was damaged on the way, or "
            "the base differs; send it whole"
        )
    return tensor


def _read_folder(header: pb.WeightsHeader, root: Path | None) -> tuple[int, dict[str, Tensor], int]:
    """The tensors of a folder under the root, checked against the header."""
    total = sum(map(_size, header.tensors))
    found: dict[str, Any] = {}
    try:
        files = _files(root, header.path)
        if (size := sum(file.stat().st_size for file in files)) > total + FILE_HEADERS:
            raise ValueError(f"weights: path={header.path!r} holds {size} bytes where {total} were announced")
        for file in files:
            for name, stored in safetensors.deserialize(file.read_bytes()):
                shape = tuple(stored["shape"])
                found[name] = Tensor(STORED.get(stored["dtype"], stored["dtype"]), shape, stored["data"])
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"weights: path={header.path!r} cannot be read: {error}") from error
    announced = {spec.name: (spec.dtype, tuple(spec.shape)) for spec in header.tensors}
    if announced != {name: tensor[:2] for name, tensor in found.items()}:
        raise ValueError(f"weights: path={header.path!r} does not hold the tensors that were announced")
    return header.version, {spec.name: _checked(spec, found[spec.name]) for spec in header.tensors}, total


def _files(root: Path | None, path: str) -> list[Path]:
    """The safetensors of a folder; neither it nor one of them may lie outside the root, links followed."""
    if root is None:
        raise ValueError("weights: this server reads no files: start it with --weights_root, or send the tensors")
    root, folder = Path(os.path.realpath(root)), root / path

    def inside(file: Path) -> bool:
        return Path(os.path.realpath(file)).is_relative_to(root)

    files = sorted(folder.glob("*.safetensors")) if inside(folder) else []
    if not all(map(inside, (folder, *files))):
        raise ValueError(f"weights: path={path!r} leads out of this server's --weights_root")
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"weights: path={path!r} holds no safetensors under this server's --weights_root")
    return files

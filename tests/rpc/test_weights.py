"""What a server does with a stream of weights: takes it whole, or refuses it and is as it was. Sent by: weight_sync."""

import asyncio
import os
import time
import zlib

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from tapojax.rollout.sampler import Tensor
from tapojax.rpc import tapojax_pb2 as pb
from tapojax.rpc import weights

NAMES = {np.dtype(np.uint16): "bfloat16", np.dtype(np.uint32): "float32"}


def model(seed=0, dtype=np.uint16):
    """Bits of three tensors."""
    rng = np.random.default_rng(seed)
    shapes = {"a.weight": (3, 4), "b.weight": (5,), "c.bias": (2, 2, 2)}
    return {name: rng.integers(0, np.iinfo(dtype).max, shape).astype(dtype) for name, shape in shapes.items()}


def shapes_of(arrays):
    return {name: x.shape for name, x in arrays.items()}


def held(arrays):
    return {name: Tensor(NAMES[x.dtype], x.shape, x.tobytes()) for name, x in arrays.items()}


def header(arrays, *, version=7, base_version=-1, path=""):
    message = pb.WeightsHeader(version=version, base_version=base_version, path=path)
    for name, x in arrays.items():
        message.tensors.add(name=name, dtype=NAMES[x.dtype], shape=x.shape, crc32=zlib.crc32(x.tobytes()))
    return pb.WeightsChunk(header=message)


def piece(index, data):
    return pb.WeightsChunk(piece=pb.TensorPiece(tensor=index, data=data))


def end(index, **fields):
    return pb.WeightsChunk(end=pb.TensorEnd(tensor=index, **fields))


def whole(arrays, *, chunk_bytes=7, **fields):
    """The messages of a whole model."""
    messages = [header(arrays, **fields)]
    for index, x in enumerate(arrays.values()):
        data = x.tobytes()
        messages += [piece(index, data[at : at + chunk_bytes]) for at in range(0, len(data), chunk_bytes)]
        messages.append(end(index, encoding=pb.ENCODING_WHOLE))
    return messages


def delta(arrays, before, *, gap_bytes=1, version=8, base_version=7):
    """The messages of a delta, by plain loops."""
    messages = [header(arrays, version=version, base_version=base_version)]
    for index, (name, x) in enumerate(arrays.items()):
        new, old, last, gaps, values = x.reshape(-1), before[name].reshape(-1), 0, b"", b""
        for position in range(new.size):
            if new[position] != old[position]:
                gaps += (position - last).to_bytes(gap_bytes, "little")
                values += new[position].tobytes()
                last = position
        changed = len(gaps) // gap_bytes
        messages += [piece(index, gaps + values)] if changed else []
        messages.append(end(index, encoding=pb.ENCODING_DELTA, changed=changed, gap_bytes=gap_bytes))
    return messages


async def received(messages, arrays, current=None, current_version=-1, **options):
    async def chunks():
        for message in messages:
            yield message

    options = {"max_bytes": 10**6} | options
    return await weights.receive(chunks(), current, current_version, shapes_of(arrays), **options)


def receive(*args, **options):
    return asyncio.run(received(*args, **options))


def refused(words, *args, kind=ValueError, **options):
    with pytest.raises(kind, match=words):
        receive(*args, **options)


def assert_same(got, arrays):
    assert list(got) == list(arrays)
    for name, x in arrays.items():
        assert (got[name].dtype, got[name].shape, bytes(got[name].data)) == (NAMES[x.dtype], x.shape, x.tobytes()), name


# ---- what is taken


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("chunk_bytes", [1, 7, 10**6])
def test_a_whole_model_arrives_in_any_pieces(dtype, chunk_bytes):
    arrays = model(dtype=dtype)
    version, got, size = receive(whole(arrays, chunk_bytes=chunk_bytes), arrays)
    assert (version, size) == (7, sum(x.nbytes for x in arrays.values()))
    assert_same(got, arrays)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_delta_gives_the_new_tensors(data):
    gap_bytes, dtype = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.sampled_from([np.uint16, np.uint32]))
    before = model(dtype=dtype)
    arrays = {name: x.copy() for name, x in before.items()}
    for x in arrays.values():
        most = x.nbytes // (gap_bytes + x.itemsize)  # what is larger than the tensor is sent whole
        changed = sorted(data.draw(st.sets(st.integers(0, x.size - 1), max_size=most)))
        x.flat[changed] = ~x.flat[changed]
    current = held(before)
    version, got, _ = receive(delta(arrays, before, gap_bytes=gap_bytes), arrays, current, 7)
    assert version == 8
    assert_same(got, arrays)
    assert_same(current, before)


def test_what_does_not_change_is_shared_and_what_changes_is_new():
    before = model()
    arrays = before | {"b.weight": before["b.weight"] ^ np.array([0, 0, 1, 0, 0], np.uint16)}
    current = held(before)
    _, got, size = receive(delta(arrays, before), arrays, current, 7)
    assert size == 3, "a gap of one byte and a value of two"
    assert [got[name] is current[name] for name in arrays] == [True, False, True]
    assert_same(current, before)
    assert_same(got, arrays)


def test_whole_tensors_and_deltas_mix_in_one_stream():
    before, arrays = model(0), model(0) | {"a.weight": model(1)["a.weight"]}
    messages = delta(arrays, before)
    first = next(i for i, m in enumerate(messages) if m.HasField("end"))
    messages[1 : first + 1] = whole(arrays)[1:5]
    assert [m.WhichOneof("part") for m in messages[1:5]] == ["piece"] * 4
    messages.insert(5, end(0, encoding=pb.ENCODING_WHOLE))
    assert_same(receive(messages, arrays, held(before), 7)[1], arrays)


def test_the_caller_fixes_nothing_but_shapes():
    """A mixed model, and an order of its own."""
    arrays = {"b": np.arange(4, dtype=np.uint32), "a": np.arange(6, dtype=np.uint16).reshape(2, 3)}
    version, got, _ = receive(whole(arrays), {"a": arrays["a"], "b": arrays["b"]})
    assert_same(got, arrays)


# ---- damage


def damaged(messages):
    """Every stream in which one byte differs, by each of two patterns."""
    texts = [message.SerializeToString() for message in messages]
    for place, text in enumerate(texts):
        for at in range(len(text)):
            for pattern in (0x01, 0xFF):
                wrong = bytearray(text)
                wrong[at] ^= pattern
                yield place, texts[:place] + [bytes(wrong)] + texts[place + 1 :]


@pytest.mark.parametrize("kind", ["whole", "delta"])
def test_no_damaged_byte_gives_other_tensors(kind):
    """The version alone has no checksum: the reply and CommitWeights name it again."""
    before, arrays = model(), model()
    arrays["a.weight"] = before["a.weight"] ^ np.eye(3, 4, dtype=np.uint16)
    arrays["b.weight"] = before["b.weight"] ^ np.array([0, 0, 0, 0, 9], np.uint16)
    messages = whole(arrays) if kind == "whole" else delta(arrays, before)
    current = held(before)

    async def attempts():
        passed = total = 0
        for place, texts in damaged(messages):
            total += 1
            try:
                parsed = [pb.WeightsChunk.FromString(text) for text in texts]
                version, got, _ = await received(parsed, arrays, current, 7)
            except (ValueError, DecodeError):
                continue
            passed += 1
            assert_same({name: got[name] for name in arrays}, arrays)
            assert place == 0 or version == messages[0].header.version
        return passed, total

    passed, total = asyncio.run(attempts())
    assert total > 200 and passed < total / 20, f"{passed} of {total} damaged streams passed, all harmless"
    assert_same(current, before)


def test_a_byte_that_changes_in_a_piece_is_a_checksum_error():
    before, arrays = model(), model()
    arrays["a.weight"] = before["a.weight"] ^ np.eye(3, 4, dtype=np.uint16)
    for messages in (whole(arrays, chunk_bytes=100), delta(arrays, before)):
        values = messages[1].piece.data[3:]  # three gaps of a byte come first
        for at in range(len(values)):
            data = bytearray(messages[1].piece.data)
            data[3 + at] ^= 0x10
            wrong = [messages[0], piece(0, bytes(data)), *messages[2:]]
            refused("crc32 of a.weight is .* and must be", wrong, arrays, held(before), 7, kind=weights.ChecksumError)


def test_a_base_of_another_version_or_none_is_told_apart_from_damage():
    before, arrays = model(0), model(1)
    messages = delta(arrays, before)
    for current, version, words in ((held(before), 6, "holds 6"), (None, -1, "holds none")):
        refused(
            f"against version 7, this server {words}", messages, arrays, current, version, kind=weights.BaseMismatch
        )
    wide = held({name: x.astype(np.uint32) for name, x in before.items()})
    refused("a.weight is bfloat16, its base here float32", messages, arrays, wide, 7, kind=weights.BaseMismatch)


def test_other_weights_under_the_version_of_the_base_never_pass():
    before = model(0)
    arrays = before | {"b.weight": before["b.weight"] ^ np.array([0, 0, 1, 0, 0], np.uint16)}
    for name in arrays:
        other = before | {name: before[name] + np.uint16(1)}
        refused(f"crc32 of {name}", delta(arrays, before), arrays, held(other), 7, kind=weights.ChecksumError)


# ---- streams that are not of this shape


def test_a_stream_that_ends_early_is_refused_wherever_it_ends():
    before, arrays = model(), model()
    arrays["b.weight"][3] ^= 1
    for messages in (whole(arrays), delta(arrays, before)):
        for count in range(len(messages)):
            refused("the stream ended where", messages[:count], arrays, held(before), 7)


def test_messages_out_of_order_are_refused():
    arrays = model()
    messages = whole(arrays)
    refused("a message with piece came where header was due", messages[1:], arrays)
    refused("a message with header came where piece or end", [messages[0], *messages], arrays)
    refused("a message with nothing known came where", [messages[0], pb.WeightsChunk()], arrays)
    refused("a message with end came where the end of the stream was due", [*messages, messages[-1]], arrays)
    refused(r"a part of tensor 1 came where 0 \(a.weight\) was due", [messages[0], *messages[6:]], arrays)
    refused(r"a part of tensor 2 came where 0", [messages[0], piece(2, b"x")], arrays)
    refused("an empty piece of a.weight", [messages[0], piece(0, b"")], arrays)


def test_every_tensor_has_its_size():
    arrays = model()
    first = header(arrays)
    refused("or more than its 24 bytes", [first, piece(0, bytes(25))], arrays)
    refused("or more than its 24 bytes", [first, piece(0, bytes(24)), piece(0, b"x")], arrays)
    rest = whole(arrays)[6:]
    assert rest[0].piece.tensor == 1
    short = [first, piece(0, bytes(23)), end(0, encoding=pb.ENCODING_WHOLE)]
    refused("a.weight came with 23 of its 24 bytes", [*short, *rest], arrays)


@pytest.mark.parametrize(
    ("data", "fields", "words"),
    [
        (b"\x01\x02\x03", {"changed": 1, "gap_bytes": 3}, "3 bytes, which are not 1 gaps of 3 bytes"),
        (b"\x01\x02\x03", {"changed": 1, "gap_bytes": 0}, "not 1 gaps of 0 bytes"),
        (b"\x01\x02\x03", {"changed": 2, "gap_bytes": 1}, "not 2 gaps of 1 bytes"),
        (b"\x01\x02\x03", {"changed": 0, "gap_bytes": 1}, "not 0 gaps of 1 bytes"),
        (b"\x01\x02\x03", {"changed": 2**63, "gap_bytes": 4}, "gaps of 4 bytes"),
        (b"\x0c\x02\x03", {"changed": 1, "gap_bytes": 1}, r"reaches position 12 of \(3, 4\)"),
        (b"\xff\xff\xff\xff\x02\x03", {"changed": 1, "gap_bytes": 4}, "reaches position 4294967295"),
        (b"\x0b\x01AABB", {"changed": 2, "gap_bytes": 1}, "reaches position 12"),
        (b"\x01\x00AABB", {"changed": 2, "gap_bytes": 1}, "names a position twice"),
    ],
)
def test_a_delta_that_cannot_be_is_refused(data, fields, words):
    arrays = model()
    messages = delta(arrays, arrays)
    messages[1:2] = [piece(0, data), end(0, encoding=pb.ENCODING_DELTA, **fields)]
    refused(words, messages, arrays, held(arrays), 7)


def test_an_encoding_without_meaning_is_refused():
    arrays = model()
    for encoding, base in ((pb.ENCODING_UNSPECIFIED, 7), (99, 7), (pb.ENCODING_DELTA, -1)):
        messages = [header(arrays, base_version=base)]
        messages += [end(i, encoding=encoding, gap_bytes=1) for i in range(len(arrays))]
        refused(f"a.weight has encoding {encoding}, which has no meaning", messages, arrays, held(arrays), 7)


def test_another_model_is_refused_before_a_byte_of_it_is_read():
    arrays = model()
    first = header(arrays)

    def changed(**fields):
        message = pb.WeightsChunk.FromString(first.SerializeToString())
        for name, value in fields.items():
            setattr(message.header.tensors[0], name, value)
        return [message]

    refused("1 missing: a.weight; 1 unexpected: z", changed(name="z"), arrays)
    refused("1 missing: a.weight; 1 named twice", changed(name="b.weight"), arrays)
    refused("1 of another dtype than bfloat16 and float32: a.weight 'float16'", changed(dtype="float16"), arrays)
    other = {name: x.reshape(-1) for name, x in arrays.items()}
    refused(r"2 of another shape: a.weight \(3, 4\) \(here: \(12,\)\)", [first], other)
    refused("weights of 50 bytes are over this server's limit of 49", whole(arrays), arrays, max_bytes=49)
    assert receive(whole(arrays), arrays, max_bytes=50)[0] == 7
    refused("version=-1 must not be negative", [header(arrays, version=-1)], arrays)


def test_a_failure_of_the_stream_itself_passes_through_and_leaves_no_thread_at_work(monkeypatch):
    arrays, done = model(), []
    decode = weights._decode

    def slow(*args):
        time.sleep(0.1)
        done.append(decode(*args))
        return done[-1]

    monkeypatch.setattr(weights, "_decode", slow)

    async def chunks():
        for message in whole(arrays):
            if message.HasField("end") and message.end.tensor == 1:
                raise ConnectionError("the peer is gone")
            yield message

    async def attempt():
        with pytest.raises(ConnectionError, match="the peer is gone"):
            await weights.receive(chunks(), None, -1, shapes_of(arrays), max_bytes=10**6)
        return len(done)

    assert asyncio.run(attempt()) == 1, "the first tensor was being checked when the stream broke"


# ---- by way of a file system


@pytest.fixture
def folder(tmp_path):
    """A root with the folder `v7` of two files, and the header that names it."""
    arrays = model()
    root = tmp_path / "root"
    (root / "v7").mkdir(parents=True)
    save(root / "v7", {name: arrays[name] for name in ("a.weight", "b.weight")}, "one")
    save(root / "v7", {"c.bias": arrays["c.bias"]}, "two")
    return root, arrays


def save(place, arrays, name):
    stored = {name: x.view(ml_dtypes.bfloat16) for name, x in arrays.items()}
    safetensors.numpy.save_file(stored, place / f"{name}.safetensors")


def test_a_folder_under_the_root_is_read(folder):
    root, arrays = folder
    for path in ("v7", "./v7/", "v7/../v7"):
        version, got, size = receive([header(arrays, path=path)], arrays, root=root)
        assert (version, size) == (7, 50)
        assert_same(got, arrays)


def test_nothing_outside_the_root_is_opened(folder, tmp_path):
    root, arrays = folder
    outside = tmp_path / "outside"
    (root / "v7").rename(outside)
    (root / "link").symlink_to(outside)
    (root / "files").mkdir()
    for file in outside.iterdir():
        (root / "files" / file.name).symlink_to(file)
    (tmp_path / "root-beside").symlink_to(outside)
    for path in ("../outside", str(outside), "link", "link/../../outside", "files", "../root-beside", "/", ".."):
        refused("leads out of this server's --weights_root", [header(arrays, path=path)], arrays, root=root)
    refused("this server reads no files", [header(arrays, path="link")], arrays)


def test_a_link_that_stays_under_the_root_is_followed(folder):
    root, arrays = folder
    (root / "newest").symlink_to("v7")
    assert_same(receive([header(arrays, path="newest")], arrays, root=root)[1], arrays)


def test_what_is_no_folder_of_safetensors_is_refused(folder):
    root, arrays = folder
    (root / "loop").symlink_to("loop")
    (root / "pipe").mkdir()
    os.mkfifo(root / "pipe" / "x.safetensors")
    (root / "empty").mkdir()
    for path in ("absent", "empty", "v7/one.safetensors", "loop", "pipe", "."):
        refused("holds no safetensors under", [header(arrays, path=path)], arrays, root=root)
    for path in ("v7\0", "x" * 5000):
        refused("null|cannot be read|holds no", [header(arrays, path=path)], arrays, root=root)


def test_files_that_are_damaged_or_others_are_refused(folder):
    root, arrays = folder
    file = root / "v7" / "two.safetensors"
    data = file.read_bytes()
    message = [header(arrays, path="v7")]
    for kept in (0, 7, 20, len(data) - 1):
        file.write_bytes(data[:kept])
        refused("path='v7' cannot be read", message, arrays, root=root)
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused("crc32 of c.bias", message, arrays, root=root, kind=weights.ChecksumError)
    file.unlink()
    refused("path='v7' does not hold the tensors that were announced", message, arrays, root=root)
    save(root / "v7", {"c.bias": arrays["c.bias"].reshape(-1)}, "two")
    refused("path='v7' does not hold the tensors that were announced", message, arrays, root=root)
    file.write_bytes(bytes(weights.FILE_HEADERS + 51))
    refused("bytes where 50 were announced", message, arrays, root=root)


def test_a_folder_has_no_base_and_nothing_follows_it(folder):
    root, arrays = folder
    messages = [header(arrays, path="v7", base_version=7)]
    refused("a folder holds whole tensors", messages, arrays, held(arrays), 7, root=root)
    refused("where the end of the stream was due", [header(arrays, path="v7"), piece(0, b"x")], arrays, root=root)

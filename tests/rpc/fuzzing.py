"""Messages made to break a server: noise, and valid ones with parts flipped, cut, repeated, swapped or inflated."""

import collections
import concurrent.futures
import random
import zlib
from collections.abc import Iterator

import grpc

from tapojax.rpc import tapojax_pb2 as pb

# tag bytes and lengths that mean something to a parser: nested groups, huge varints, negative sizes, wrong wire types
TOKENS = [
    b"\x00",
    b"\xff",
    b"\x0b",
    b"\x0c",
    b"\x0a\xff\xff\xff\xff\x0f",
    b"\x80" * 11,
    b"\xfa\xff\xff\xff\x07",
    b"\x08" * 9,
]

DATA = bytes(range(12))
TENSOR = pb.TensorSpec(name="w", dtype="bfloat16", shape=[2, 3], crc32=zlib.crc32(DATA))


def seeds(method) -> list[bytes]:
    """Valid messages of a method's request type, rich and poor; those of a stream make one in this order."""
    rich = {
        "GenerateRequest": [
            pb.GenerateRequest(
                request_id="fuzz",
                prompts=[pb.Prompt(index=i, tokens=range(9), example=b'{"id": "7"}') for i in range(3)],
                group_size=2,
                sampling=pb.Sampling(max_tokens=4, temperature=1.0, top_p=1.0, stop_token_ids=[1], adaptive={}),
                key=[1, 2],
                skip=[1],
            )
        ],
        "LogprobsRequest": [pb.LogprobsRequest(rows=[pb.Row(tokens=range(1, 9))] * 2)],
        "WeightsChunk": [
            pb.WeightsChunk(header=pb.WeightsHeader(version=1, base_version=-1, tensors=[TENSOR])),
            pb.WeightsChunk(piece=pb.TensorPiece(data=DATA[:5])),
            pb.WeightsChunk(piece=pb.TensorPiece(data=DATA[5:])),
            pb.WeightsChunk(end=pb.TensorEnd(encoding=pb.ENCODING_WHOLE)),
        ],
        "CommitRequest": [pb.CommitRequest(version=1)],
        "PauseRequest": [pb.PauseRequest(mode=pb.PAUSE_MODE_KEEP)],
        "AbortRequest": [pb.AbortRequest(request_ids=["fuzz", ""])],
        "ScoreItem": [pb.ScoreItem(id=str(i), example=b'{"answer": "7"}', completion="It is 7.") for i in range(4)],
    }
    name = method.input_type.name
    poor = pb.DESCRIPTOR.message_types_by_name[name]._concrete_class()
    messages = rich.get(name, []) if method.client_streaming else [*rich.get(name, []), poor]
    return [message.SerializeToString() for message in messages]


def mutate(data: bytes, others: list[bytes], dice: random.Random) -> bytes:
    """One to four changes of a message; one time in ten it is noise from the start."""
    changed = bytearray(dice.randbytes(dice.choice([0, 1, 5, 100, 3000])) if dice.random() < 0.1 else data)
    for _ in range(dice.choice([1, 1, 2, 4])):
        at, to = sorted(dice.randint(0, len(changed)) for _ in range(2))
        kind = dice.randrange(8)
        if kind <= 2 and changed:
            changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
        elif kind == 3:
            del changed[at:to]
        elif kind == 4:
            changed[at:at] = changed[at:to] * dice.choice([1, 3, 50])
        elif kind == 5:
            changed[at:at] = dice.choice(TOKENS)
        elif kind == 6:
            changed[at:to] = dice.choice(others)
        else:
            changed[at:at] = dice.randbytes(dice.randint(1, 20))
    return bytes(changed[:100_000])


def streams(method, *, messages: int, dice: random.Random) -> Iterator[list[bytes]]:
    """What the calls of a method send, until so many messages were broken; about half of a stream's are."""
    valid, broken = seeds(method), 0
    while broken < messages:
        if method.client_streaming:
            breaks = [dice.random() < 0.5 for _ in valid]
            yield [mutate(data, valid, dice) if bad else data for data, bad in zip(valid, breaks, strict=True)]
            broken += sum(breaks)
        else:
            yield [mutate(dice.choice(valid), valid, dice)]
            broken += 1


def attack(channel: grpc.Channel, service: str, *, messages: int, seed: int, timeout: float) -> collections.Counter:
    """Sends so many broken messages to each method of a service; counts calls by (method, code)."""
    counts: collections.Counter = collections.Counter()
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        for method in pb.DESCRIPTOR.services_by_name[service].methods:
            made = streams(method, messages=messages, dice=random.Random(f"{seed} {method.name}"))
            codes = threads.map(_sender(channel, method, timeout), made)
            counts.update((method.name, code) for code in codes)
    return counts


def _sender(channel, method, timeout):
    path = f"/{method.containing_service.full_name}/{method.name}"
    kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    call = getattr(channel, kind)(path)  # without serializers: bytes

    def send(stream):
        try:
            replies = call(iter(stream) if method.client_streaming else stream[0], timeout=timeout)
            if method.server_streaming:
                collections.deque(replies, maxlen=0)
            return "OK"
        except grpc.RpcError as error:
            return error.code().name

    return send

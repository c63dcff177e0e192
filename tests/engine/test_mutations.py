"""What arrives is what was sent, or it is refused: batches mutated at random on their way."""

from __future__ import annotations

import random

import pyarrow as pa

from casparian_flow.engine.batches import ReceivedTopic
from casparian_flow.errors import ProtocolError

COUNT = 4000
LIMIT = 1 << 20


def stream() -> bytes:
    """A batch with the kinds of buffers that lengths and offsets can spoil."""
    batch = pa.record_batch(
        {
            "n": pa.array([*range(20)]),
            "word": pa.array(["alpha", None] * 10),
            "list": pa.array([[1, 2], [], None, [3]] * 5),
            "struct": pa.array([{"a": 1, "b": "x"}, None] * 10),
            "pairs": pa.FixedSizeListArray.from_arrays(pa.array([*range(40)]), 2),
            "none": pa.array([[None], None] * 10, pa.list_(pa.null())),
            "flag": pa.array([True, False, None, True] * 5),
        }
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue().to_pybytes())


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Flipped bits, a foreign word, a cut, or a piece that is gone or twice."""
    changed = bytearray(data)
    at = chance.randrange(len(data))
    match chance.randrange(5):
        case 0:
            changed[at] ^= 1 << chance.randrange(8)
        case 1:
            changed[at : at + 8] = chance.choice(
                [b"\xff" * 8, b"\x00" * 8, b"\xff\xff\xff\x7f", chance.randbytes(8)]
            )
        case 2:
            del changed[at:]
        case 3:
            del changed[at : at + 8]
        case _:
            changed[at:at] = changed[at : at + 64]
    return bytes(changed)


def test_a_mutated_batch_is_refused_or_safe_to_read_and_never_the_one_that_was_sent(
    seed: int,
) -> None:
    """What Arrow reads without an error (most of it) END's digest tells from what was sent."""
    chance = random.Random(seed)
    good = stream()
    sent = ReceivedTopic("t")
    rows = sent.add(pa.py_buffer(good), LIMIT)[0].to_pylist()
    read = 0
    for _ in range(COUNT):
        data = mutated(good, chance)
        received = ReceivedTopic("t")
        try:
            batch, _ = received.add(pa.py_buffer(data), LIMIT)
        except ProtocolError:
            continue
        read += 1
        for column in batch.columns:  # Python's dicts have no room for fields of one name
            assert column.to_string(window=len(column) or 1, container_window=99)
        assert data == good or received.end() != sent.end()
    assert 0 < read < COUNT
    assert len(rows) == 20

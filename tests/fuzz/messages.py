"""The messages of live.py: number and seed in, bytes out.

A message is drawn from a ``Random`` of its own, seeded with the run's seed and its number: whatever the server does and
however long it takes, message 4711 of seed 1 is always the same.  (But for the ids of cursors: see commands.A_CURSOR.)
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from random import Random

import bson
import crc32c

from tests.fuzz.commands import WORD, command, confused, named, value, wordy

OP_QUERY, OP_MSG = 2004, 2013
_OPCODES = (0, 1, 2001, 2002, 2004, 2005, 2006, 2007, 2010, 2011, 2012, 2013, 2**31 - 1, -1)
_LENGTHS = (-(2**31), -1, 0, 1, 4, 5, 15, 16, 20, 21, 25, 26, 255, 4096, 48_000_000, 48_000_001, 2**31 - 1)
# Types of values, which are also small lengths and ends of strings.
_TELLING = (0, 1, 2, 3, 4, 5, 0x0B, 0x0C, 0x0F, 0x7F, 0xFF)
_SEQUENCES = {"insert": "documents", "update": "updates", "delete": "deletes"}
# MongoDB's limit is 200; what is beyond must not reach the end of anybody's stack.
_DEPTHS = (50, 150, 199, 201, 500, 5_000, 50_000)

Maker = Callable[[Random, int], bytes]


def message(seed: int, number: int) -> bytes:
    """Message ``number`` of the run, its own number as request id unless that was part of what was damaged."""
    random = Random(f"{seed}:{number}")
    ((_, make),) = random.choices(_KINDS, _WEIGHTS)
    return make(random, number)


def frame(payload: bytes, number: int, opcode: int = OP_MSG, length: int | None = None) -> bytes:
    """A message with a header; ``length`` is a lie to tell."""
    head = struct.pack("<iii", number, 0, opcode)
    return struct.pack("<i", 16 + len(payload) if length is None else length) + head + payload


def body(document: bytes) -> bytes:
    """A section of kind 0."""
    return b"\0" + document


def sequence(name: bytes, documents: list[bytes], size: int | None = None) -> bytes:
    """A section of kind 1; ``size`` is a lie to tell."""
    content = name + b"\0" + b"".join(documents)
    return b"\1" + struct.pack("<i", 4 + len(content) if size is None else size) + content


def msg(sections: bytes, number: int, flags: int = 0) -> bytes:
    """An OP_MSG of finished sections."""
    return frame(struct.pack("<I", flags) + sections, number)


def sealed(data: bytes, spoil: int = 0) -> bytes:
    """An OP_MSG with a checksum, a wrong one if ``spoil``."""
    flags = struct.unpack_from("<I", data, 16)[0] | 1
    data = struct.pack("<i", len(data) + 4) + data[4:16] + struct.pack("<I", flags) + data[20:]
    return data + struct.pack("<I", crc32c.crc32c(data) ^ spoil)


def relength(data: bytes) -> bytes:
    """The same message with a header that tells its length."""
    return struct.pack("<i", len(data)) + data[4:]


def _valid(random: Random, number: int) -> bytes:
    """As a driver would send it: statements of writes in a document sequence, or all in the body."""
    made = command(random)
    statements = _SEQUENCES.get(next(iter(made)))
    if statements is None or random.random() < 0.4:
        return msg(body(bson.encode(made)), number)
    documents = [bson.encode(item) for item in made.pop(statements)]
    return msg(body(bson.encode(made)) + sequence(statements.encode(), documents), number)


def _confused(random: Random, number: int) -> bytes:
    return msg(body(bson.encode(confused(random))), number)


def _named(random: Random, number: int) -> bytes:
    return msg(body(bson.encode(named(random))), number)


def _flipped(random: Random, number: int) -> bytes:
    """Some bits turned over, one time in five also in the header."""
    data = bytearray(_valid(random, number))
    first = 0 if random.random() < 0.2 else 16
    for _ in range(random.randrange(1, 5)):
        data[random.randrange(first, len(data))] ^= 1 << random.randrange(8)
    return bytes(data)


def _cut(random: Random, number: int) -> bytes:
    """The beginning of a message; the header tells of it or promises what does not come."""
    data = _valid(random, number)
    short = data[: random.randrange(len(data))]
    return relength(short) if len(short) >= 16 and random.random() < 0.7 else short


def _lying(random: Random, number: int) -> bytes:
    """A length that is wrong: the message's, the document's, or any four bytes that look like one."""
    data = bytearray(_valid(random, number))
    place = random.choice((0, 21, 21, *_small_numbers(data)))
    told = struct.unpack_from("<i", data, place)[0]
    lie = random.choice((*_LENGTHS, told + 1, told - 1, told + 4, told * 2, len(data)))
    struct.pack_into("<i", data, place, max(-(2**31), min(2**31 - 1, lie)))
    return bytes(data)


def _small_numbers(data: bytearray) -> list[int]:
    """Where the body has what may be the length of a string, an array or a document."""
    return [place for place in range(25, len(data) - 4) if 0 < struct.unpack_from("<i", data, place)[0] < len(data)]


def _spliced(random: Random, number: int) -> bytes:
    """The head of one message and the tail of another."""
    head, tail = _valid(random, number), _confused(random, number)
    data = head[: random.randrange(16, len(head))] + tail[random.randrange(16, len(tail)) :]
    return relength(data) if random.random() < 0.8 else data


def _other_opcode(random: Random, number: int) -> bytes:
    """Another opcode in the header, or a command in a legacy message."""
    if random.random() < 0.5:
        data = bytearray(_valid(random, number))
        struct.pack_into("<i", data, 12, random.choice(_OPCODES))
        return bytes(data)
    made = {random.choice(("isMaster", "hello", "ismaster")): 1} if random.random() < 0.5 else command(random)
    collection = random.choice((b"admin.$cmd", b"fuzz_a.$cmd", b"fuzz_a.c", b"$cmd", b"", b"\xff.$cmd"))
    skip = struct.pack("<ii", random.choice((0, -1, 5)), random.choice((-1, 1, 0)))
    return frame(struct.pack("<i", 0) + collection + b"\0" + skip + bson.encode(made), number, OP_QUERY)


def _flagged(random: Random, number: int) -> bytes:
    """Flag bits; moreToCome has no answer."""
    data = bytearray(_valid(random, number))
    flags = random.choice((1, 2, 2, 2, 3, 4, 1 << 15, 1 << 16, 1 << 16 | 2, 1 << 31, random.getrandbits(32)))
    struct.pack_into("<I", data, 16, flags)
    return bytes(data)


def _checksummed(random: Random, number: int) -> bytes:
    return sealed(_valid(random, number), random.choice((0, 0, 1, random.getrandbits(32))))


def _sectioned(random: Random, number: int) -> bytes:
    """Sections repeated, missing, empty, in another order, of an unknown kind or with the name of a field."""
    made = command(random)
    first = body(bson.encode(made))
    documents = [bson.encode(value_document(random)) for _ in range(random.randrange(3))]
    name = random.choice((*_SEQUENCES.values(), "", "$db", "ordered", "pipeline", "x\u00e9")).encode()
    second = sequence(name, documents, random.choice((None, None, None, *_LENGTHS)))
    unknown = bytes((random.randrange(2, 256),)) + first[1:]
    choices = (first + first, b"", second, second + first, first + second + second, first + unknown, first + second)
    data = msg(random.choice(choices), number)
    return sealed(data) if random.random() < 0.1 else data


def value_document(random: Random) -> dict[str, object]:
    """Any document: what is drawn, if it is one, else with it inside."""
    drawn = value(random)
    return drawn if isinstance(drawn, dict) else {"q": drawn, "u": value(random), "_id": value(random)}


def _corrupted(random: Random, number: int) -> bytes:
    """Well-framed, and broken inside: types and lengths of nested values, names without an end."""
    data = bytearray(_valid(random, number))
    for _ in range(random.randrange(1, 4)):
        place = random.randrange(min(40, len(data) - 1), len(data))
        near = data[place]
        data[place] = random.choice(
            (0, 1, 2, 3, 4, 5, 0x0B, 0x0C, 0x0F, 0x7F, 0xFF, near ^ 0x80, random.randrange(256))
        )
    return bytes(data)


def _misspelt(random: Random, number: int) -> bytes:
    """Well-formed but for the characters: names and strings that are not UTF-8, which error texts may repeat."""
    if random.random() < 0.5:
        data = bytearray(msg(body(bson.encode(wordy(random))), number))
        letters = [place + 1 for place in range(len(data)) if data.startswith(WORD, place)]
    else:
        data = bytearray(_confused(random, number))
        letters = [place for place in range(40, len(data)) if data[place] in b"abxfuz.$"]
    for place in random.sample(letters, min(len(letters), random.randrange(1, 4))):
        data[place] = random.choice((0xFF, 0xC3, 0xED, 0x80, 0xF8))
    return bytes(data)


def _deep(random: Random, number: int) -> bytes:
    """Documents in documents, to many times the depth that is allowed."""
    name = random.choice((b"a", b"$and", b"$not", b"0"))
    kind = random.choice((3, 4))
    inner = bson.encode({"x": 1})
    depth = random.choice(_DEPTHS)
    head = bytes((kind,)) + name + b"\0"
    sizes = [len(inner) + (level + 1) * (len(head) + 5) for level in range(depth)]
    opening = b"".join(struct.pack("<i", size) + head for size in reversed(sizes))
    nested = opening + inner + bytes(depth)
    made = command(random)
    places = {"find": b"filter", "insert": b"documents", "aggregate": b"pipeline", "update": b"updates"}
    place = places.get(next(iter(made)), b"x")
    made.pop(place.decode(), None)
    elements = bson.encode(made)[4:-1] + bytes((kind,)) + place + b"\0" + nested
    return msg(body(struct.pack("<i", len(elements) + 5) + elements + b"\0"), number)


def _noise(random: Random, number: int) -> bytes:
    """Bytes, with a header or without."""
    data = random.randbytes(random.choice((1, 3, 4, 16, 30, 100, 2000)))
    return frame(data, number, random.choice((OP_MSG, OP_QUERY))) if random.random() < 0.7 else data


_KINDS: tuple[tuple[float, Maker], ...] = (
    (18, _valid),
    (26, _confused),
    (4, _named),
    (12, _flipped),
    (5, _cut),
    (6, _lying),
    (5, _spliced),
    (3, _other_opcode),
    (3, _flagged),
    (3, _checksummed),
    (4, _sectioned),
    (8, _corrupted),
    (4, _misspelt),
    (0.3, _deep),
    (1, _noise),
)
_WEIGHTS = tuple(weight for weight, _ in _KINDS)

"""Writes the golden frames of tests/unit/frames: run it after adding one here, and read the diff.

``valid/NAME.bin`` parses to what ``valid/NAME.json`` says; ``invalid/NAME.bin`` is refused with the class and words
of ``invalid/NAME.txt``.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import bson
import crc32c

HERE = Path(__file__).parent / "frames"
BODY = bson.encode({"ping": 1, "$db": "admin"})
DOCUMENTS = [bson.encode({"_id": 1}), bson.encode({"_id": 2, "a": "b"})]


def frame(opcode: int, payload: bytes, length: int | None = None) -> bytes:
    return struct.pack("<iiii", length or 16 + len(payload), 77, 0, opcode) + payload


def msg(*sections: bytes, flags: int = 0) -> bytes:
    return frame(2013, struct.pack("<I", flags) + b"".join(sections))


def sequence(name: bytes, *documents: bytes, size: int | None = None) -> bytes:
    content = name + b"\0" + b"".join(documents)
    return b"\x01" + struct.pack("<i", size or 4 + len(content)) + content


def checked(data: bytes, spoil: int = 0) -> bytes:
    data = struct.pack("<i", len(data) + 4) + data[4:]
    return data + struct.pack("<I", crc32c.crc32c(data) ^ spoil)


def query(collection: bytes, document: bytes) -> bytes:
    return frame(2004, struct.pack("<i", 0) + collection + b"\0" + struct.pack("<ii", 0, -1) + document)


VALID = {
    "body": (msg(b"\0" + BODY), {"name": "ping"}),
    "checksum": (checked(msg(b"\0" + BODY, flags=1)), {"name": "ping"}),
    "more-to-come": (msg(b"\0" + BODY, flags=2), {"name": "ping", "silent": True}),
    "exhaust-allowed": (msg(b"\0" + BODY, flags=1 << 16), {"name": "ping"}),
    "body-then-sequence": (
        msg(b"\0" + BODY, sequence(b"documents", *DOCUMENTS)),
        {"name": "ping", "sequences": {"documents": 2}},
    ),
    "three-sections-body-last": (
        msg(sequence(b"ops", *DOCUMENTS), sequence(b"nsInfo", DOCUMENTS[0]), b"\0" + BODY),
        {"name": "ping", "sequences": {"ops": 2, "nsInfo": 1}},
    ),
    "empty-sequence": (msg(b"\0" + BODY, sequence(b"documents")), {"name": "ping", "sequences": {"documents": 0}}),
    "op-query": (query(b"admin.$cmd", bson.encode({"isMaster": 1})), {"name": "isMaster", "legacy": True}),
}
INVALID = {
    "unknown-opcode": (frame(2012, BODY), "ProtocolError opcode 2012"),
    "legacy-insert": (frame(2002, b"\0" * 20 + BODY), "ProtocolError opcode 2002"),
    "too-short": (frame(2013, b"\0\0\0\0\0"), "ProtocolError too short"),
    "required-flag": (msg(b"\0" + BODY, flags=4), "ProtocolError unknown required flag"),
    "bad-checksum": (checked(msg(b"\0" + BODY, flags=1), spoil=1), "ProtocolError checksum"),
    "no-body": (msg(sequence(b"documents", *DOCUMENTS)), "ProtocolError no body"),
    "two-bodies": (msg(b"\0" + BODY, b"\0" + BODY), "ProtocolError more than one body"),
    "two-sequences-of-a-name": (
        msg(b"\0" + BODY, sequence(b"a", *DOCUMENTS), sequence(b"a", *DOCUMENTS)),
        "ProtocolError same name",
    ),
    "section-kind": (msg(b"\0" + BODY, b"\x02" + BODY), "ProtocolError section kind 2"),
    "sequence-over-the-end": (msg(b"\0" + BODY, sequence(b"a", *DOCUMENTS, size=900)), "ProtocolError invalid size"),
    "sequence-negative": (msg(b"\0" + BODY, sequence(b"a", *DOCUMENTS, size=-5)), "ProtocolError invalid size"),
    "sequence-without-name": (
        msg(b"\0" + BODY, b"\x01" + struct.pack("<i", 6) + b"ab"),
        "ProtocolError has no name",
    ),
    "body-over-the-end": (msg(b"\0" + struct.pack("<i", 900) + BODY[4:]), "InvalidBSONError invalid length"),
    "body-not-ended": (msg(b"\0" + BODY[:-1] + b"\x01"), "InvalidBSONError does not end in NUL"),
    "body-empty": (msg(b"\0" + bson.encode({})), "InvalidBSONError empty"),
    "string-over-the-end": (
        msg(b"\0" + BODY.replace(struct.pack("<i", 6) + b"admin", struct.pack("<i", 600) + b"admin")),
        "InvalidBSONError cut short",
    ),
    "unknown-type": (msg(b"\0" + BODY.replace(b"\x10ping", b"\x20ping")), "InvalidBSONError type 0x20"),
    "op-query-find": (query(b"db.c", bson.encode({"a": 1})), "ProtocolError no longer supported"),
    "op-query-short": (frame(2004, b"\0\0\0\0admin.$cmd\0"), "ProtocolError cut short"),
}


def main() -> None:
    for name, (data, expected) in VALID.items():
        (HERE / "valid" / f"{name}.bin").write_bytes(data)
        (HERE / "valid" / f"{name}.json").write_text(json.dumps(expected, indent=1) + "\n")
    for name, (data, refusal) in INVALID.items():
        (HERE / "invalid" / f"{name}.bin").write_bytes(data)
        (HERE / "invalid" / f"{name}.txt").write_text(refusal + "\n")


if __name__ == "__main__":
    main()

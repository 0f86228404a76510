"""Messages as clients send them."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

from bson import encode


def frame(payload: bytes, number: int = 1, opcode: int = 2013) -> bytes:
    return struct.pack("<iiii", 16 + len(payload), number, 0, opcode) + payload


def message(command: dict[str, Any], number: int = 1, flags: int = 0, sections: bytes = b"") -> bytes:
    """An OP_MSG; the sections are those behind the command."""
    return frame(struct.pack("<I", flags) + b"\0" + encode(command) + sections, number)


def sequence(name: str, documents: Iterable[bytes]) -> bytes:
    """A section of documents."""
    content = name.encode() + b"\0" + b"".join(documents)
    return b"\1" + struct.pack("<i", 4 + len(content)) + content

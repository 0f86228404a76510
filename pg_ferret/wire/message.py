"""Frames to requests, reply documents to frames.

OP_MSG and OP_QUERY as in the manual's "MongoDB Wire Protocol" and the driver specification message/OP_MSG.
"""

from __future__ import annotations

from struct import Struct
from typing import Any, Final

import crc32c

from pg_ferret.errors import ProtocolError
from pg_ferret.wire import bson

HEADER_BYTES: Final = 16
MAX_DOCUMENT_BYTES: Final = 16 * 1024 * 1024
MAX_MESSAGE_BYTES: Final = 48_000_000
OP_REPLY: Final = 1
OP_QUERY: Final = 2004
OP_MSG: Final = 2013

CHECKSUM_PRESENT: Final = 1
MORE_TO_COME: Final = 2
# The lower 16 flag bits must be understood; exhaustAllowed, bit 16, may be ignored.
_UNKNOWN_REQUIRED: Final = 0xFFFF & ~(CHECKSUM_PRESENT | MORE_TO_COME)

_uint32 = Struct("<I").unpack_from
_int32 = Struct("<i").unpack_from
_HEAD = Struct("<iiii").unpack_from
_REPLY_HEAD = Struct("<iiiiiB").pack  # OP_MSG: length, id, answered id, opcode, flags, section kind 0
_LEGACY_HEAD = Struct("<iiiiiqii").pack  # OP_REPLY: …, flags, cursor id, starting from, number of documents


def frame_length(head: bytes | bytearray | memoryview) -> int:
    """The length in bytes that a message header (at least its first 4 bytes) claims.

    Raises ProtocolError for a length that no message may have, before anything is allocated for it.
    """
    length: int = _int32(head)[0]
    if not HEADER_BYTES <= length <= MAX_MESSAGE_BYTES:
        raise ProtocolError(f"message length {length} is not between {HEADER_BYTES} and {MAX_MESSAGE_BYTES}")
    return length


class Request:
    """One command as it came: the frame, where its body is, and where the body's top-level fields are."""

    __slots__ = ("end", "fields", "frame", "legacy", "memo", "name", "request_id", "sequences", "silent", "start")

    frame: bytes
    request_id: int
    start: int  # the body document is frame[start:end]
    end: int
    name: bytes  # the command: the first field's name
    fields: dict[bytes, bson.Span]  # not to be changed: requests of one shape share it
    memo: dict[str, Any] | None  # what was found out for all requests of this shape, whatever collection they name
    sequences: dict[bytes, bytes | memoryview]  # kind-1 sections: field name -> documents, one behind the other
    silent: bool  # moreToCome: the client does not read a reply
    legacy: bool  # OP_QUERY: answered by OP_REPLY

    @property
    def body(self) -> memoryview:
        """The command document's bytes."""
        return memoryview(self.frame)[self.start : self.end]

    def string(self, name: bytes) -> bytes | None:
        """The UTF-8 bytes of a string field; None if the field is missing or is no string."""
        span = self.fields.get(name)
        return None if span is None else bson.read_string(self.frame, span)

    def integer(self, name: bytes) -> int | None:
        """A whole number; None if the field is missing or is none."""
        span = self.fields.get(name)
        return None if span is None else bson.read_int(self.frame, span)

    def true(self, name: bytes) -> bool:
        """Whether a field is there and true in MongoDB's sense."""
        span = self.fields.get(name)
        return span is not None and bson.read_bool(self.frame, span)


# A piece of a message of so many bytes is copied in less time than a view of it is made.
_COPIED_BYTES: Final = 4096


def piece(frame: bytes, place: slice) -> bytes | memoryview:
    """A part of a frame, to be handed on."""
    return frame[place] if len(frame) <= _COPIED_BYTES else memoryview(frame)[place]


_PLAIN: Final = b"\0\0\0\0\0"  # no flags, and a section of kind 0
_NO_SEQUENCES: dict[bytes, bytes | memoryview] = {}


class _Shape:
    """Messages that differ only in what their values hold: the same fields lie at the same places in all of them."""

    __slots__ = ("fields", "fixed", "mask", "memo", "name")

    def __init__(self, request: Request) -> None:
        self.fields = request.fields
        self.name = request.name
        self.memo: dict[str, Any] = {}
        free = bytearray(b"\xff" * (request.end - _FIXED_FROM))
        for field, (kind, start, end) in request.fields.items():
            # What a value's size follows from stays fixed, and so do top-level strings and booleans, which are options,
            # but not the name of a collection: there may be tens of thousands.
            first, last = start - _FIXED_FROM, end - _FIXED_FROM
            if field in _OPTIONS:
                continue
            if kind in (bson.DOCUMENT, bson.ARRAY) or (kind == bson.STRING and field in (request.name, b"collection")):
                free[first + 4 : last - 1] = bytes(last - first - 5)
            elif kind in _OPEN_TYPES:
                free[first:last] = bytes(last - first)
        self.mask = int.from_bytes(free, "little")
        self.fixed = int.from_bytes(request.frame[_FIXED_FROM : request.end], "little") & self.mask


class Shapes:
    """Applications send few shapes of messages, again and again: the scan of one serves for all others like it."""

    def __init__(self) -> None:
        # Size of the body -> mask -> what it leaves -> shape: messages to many databases differ in the third only.
        self._by_size: dict[int, dict[int, dict[int, _Shape]]] = {}
        self._count = 0
        self._misses = 0

    def find(self, frame: bytes, end: int) -> _Shape | None:
        """The shape of an OP_MSG frame that begins with its body, which ends at ``end``; None if it is not known."""
        masks = self._by_size.get(end)
        if masks is not None:
            content = int.from_bytes(frame[_FIXED_FROM:end], "little")
            for mask, shapes in masks.items():
                shape = shapes.get(content & mask)
                if shape is not None:
                    return shape
        return None

    def learn(self, request: Request) -> None:
        """Remember the shape of a request that has been scanned; at most so many, and now and then all anew."""
        self._misses += 1
        if self._misses >= _FORGET_AFTER:
            self._misses = self._count = 0
            self._by_size.clear()
        if request.end > _LONGEST_SHAPE or self._count >= _MOST_SHAPES:
            return
        shape = _Shape(request)
        masks = self._by_size.setdefault(request.end, {})
        if shape.mask not in masks and len(masks) >= _MASKS_OF_A_SIZE:
            return
        masks.setdefault(shape.mask, {})[shape.fixed] = shape
        self._count += 1
        request.memo = shape.memo


# They say how a command is to be run: looked at once for all messages that say the same.
_OPTIONS: Final = frozenset((b"readConcern", b"writeConcern"))
_FIXED_FROM: Final = 12  # behind the ids: opcode, flags, section kind and body
_OPEN_TYPES: Final = frozenset((bson.DOUBLE, bson.DATE, bson.INT32, bson.INT64, bson.OBJECT_ID, 0x11, 0x13))
_LONGEST_SHAPE: Final = 1024
_MASKS_OF_A_SIZE: Final = 6
_MOST_SHAPES: Final = 1024
_FORGET_AFTER: Final = 4096
_shapes = Shapes()


def parse(frame: bytes) -> Request:
    """The request in a whole frame.

    Raises ProtocolError when it cannot be answered, InvalidBSONError (a CommandError) when only its body is broken;
    `reply_head` then still finds what is needed to answer.
    """
    request = Request()
    request.frame = frame
    size = len(frame)
    end = 21 + _int32(frame, 21)[0] if size > 25 else 0
    shape = _shapes.find(frame, end) if 25 < end <= size else None
    if shape is not None:
        request.request_id = _int32(frame, 4)[0]
        request.start = 21
        request.end = end
        request.name = shape.name
        request.fields = shape.fields
        request.memo = shape.memo
        request.sequences = _NO_SEQUENCES if end == size else _sequences(frame, end, size)
        request.silent = request.legacy = False
        return request
    request.memo = None
    request.sequences = _NO_SEQUENCES
    request.legacy = False
    request.silent = False
    _, request.request_id, _, opcode = _HEAD(frame)
    plain = opcode == OP_MSG and frame.startswith(_PLAIN, 16)
    if plain and end == size:
        # Nearly every message: no flags, one body and nothing else.
        if frame[-1]:
            raise bson.InvalidBSONError("BSON document does not end in NUL")
        request.start = 21
        request.end = size
    elif opcode == OP_MSG:
        _parse_msg(request, frame)
    elif opcode == OP_QUERY:
        _parse_query(request, frame)
    else:
        raise ProtocolError(f"opcode {opcode} is not supported")
    request.fields = fields = bson.scan(frame, request.start, request.end)
    if not fields:
        raise bson.InvalidBSONError("the command document is empty")
    request.name = next(iter(fields))
    if plain and request.start == 21:
        _shapes.learn(request)
    return request


def reply_head(frame: bytes) -> tuple[int, bool, bool]:
    """Of a frame whose body is broken: request id, whether it is OP_QUERY, whether no reply is wanted."""
    _, request_id, _, opcode = _HEAD(frame)
    silent = opcode == OP_MSG and len(frame) >= 20 and bool(_uint32(frame, 16)[0] & MORE_TO_COME)
    return request_id, opcode == OP_QUERY, silent


def _parse_msg(request: Request, frame: bytes) -> None:
    limit = len(frame)
    if limit < 26:
        raise ProtocolError("OP_MSG is too short to hold a document")
    flags: int = _uint32(frame, 16)[0]
    if flags:
        if flags & _UNKNOWN_REQUIRED:
            raise ProtocolError(f"OP_MSG has unknown required flag bits {flags:#x}")
        request.silent = bool(flags & MORE_TO_COME)
        if flags & CHECKSUM_PRESENT:
            limit -= 4
            if crc32c.crc32c(memoryview(frame)[:limit]) != _uint32(frame, limit)[0]:
                raise ProtocolError("OP_MSG checksum does not match its contents")
    _parse_sections(request, frame, limit)


def _parse_sections(request: Request, frame: bytes, limit: int) -> None:
    """Any number of sections in any order, exactly one of them a body."""
    position = 20
    request.start = 0
    sequences: dict[bytes, bytes | memoryview] = {}
    request.sequences = sequences
    while position < limit:
        kind = frame[position]
        position += 1
        if kind == 0:
            if request.start:
                raise ProtocolError("OP_MSG has more than one body")
            request.start = position
            request.end = position = bson.document_end(frame, position, limit)
        elif kind == 1:
            position = _add_sequence(sequences, frame, position, limit)
        else:
            raise ProtocolError(f"OP_MSG section kind {kind} is not known")
    if not request.start:
        raise ProtocolError("OP_MSG has no body")


def _sequences(frame: bytes, position: int, limit: int) -> dict[bytes, bytes | memoryview]:
    """What follows a body that came first: document sequences and nothing else."""
    if frame[position] == 1 and limit - position > 5 and _int32(frame, position + 1)[0] == limit - position - 1:
        # Nearly always a single one.
        name_end = frame.find(0, position + 5, limit)
        if name_end > 0:
            return {frame[position + 5 : name_end]: piece(frame, slice(name_end + 1, limit))}
    sequences: dict[bytes, bytes | memoryview] = {}
    while position < limit:
        if frame[position] == 0:
            raise ProtocolError("OP_MSG has more than one body")
        if frame[position] != 1:
            raise ProtocolError(f"OP_MSG section kind {frame[position]} is not known")
        position = _add_sequence(sequences, frame, position + 1, limit)
    return sequences


def _add_sequence(sequences: dict[bytes, bytes | memoryview], frame: bytes, position: int, limit: int) -> int:
    """Enter the document sequence at ``position``; returns where it ends."""
    size = _int32(frame, position)[0] if position + 4 <= limit else 0
    end = position + size
    if size < 5 or end > limit:
        raise ProtocolError("OP_MSG document sequence has an invalid size")
    name_end = frame.find(0, position + 4, end)
    if name_end < 0:
        raise ProtocolError("OP_MSG document sequence has no name")
    name = frame[position + 4 : name_end]
    if name in sequences:
        raise ProtocolError("OP_MSG has two document sequences of the same name")
    sequences[name] = piece(frame, slice(name_end + 1, end))
    return end


def _parse_query(request: Request, frame: bytes) -> None:
    limit = len(frame)
    name_end = frame.find(0, 20)
    if name_end < 0 or name_end + 9 > limit:
        raise ProtocolError("OP_QUERY is cut short")
    if not frame.endswith(b".$cmd", 20, name_end):
        raise ProtocolError("OP_QUERY is no longer supported for anything but the first hello")
    request.legacy = True
    request.start = name_end + 9
    request.end = bson.document_end(frame, request.start, limit)


# From this size on, a second write buffer costs less than a copy.
_JOINED_BYTES: Final = 16 * 1024


def reply(document: bytes, answered_id: int, legacy: bool) -> bytes | list[bytes]:
    """The frame that answers a request with a document; a large one in two parts, to be written one after the other."""
    if legacy:
        head = _LEGACY_HEAD(36 + len(document), 0, answered_id, OP_REPLY, 8, 0, 0, 1)
    else:
        head = _REPLY_HEAD(21 + len(document), 0, answered_id, OP_MSG, 0, 0)
    return head + document if len(document) < _JOINED_BYTES else [head, document]

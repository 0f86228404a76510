"""Looking into BSON without decoding it: a scan of top-level keys, readers for single values, a small writer.

Offsets count from the start of the buffer that holds the document.  https://bsonspec.org/spec.html
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from struct import Struct
from struct import error as StructError
from typing import Final

from pg_ferret.errors import CommandError

DOUBLE: Final = 0x01
STRING: Final = 0x02
DOCUMENT: Final = 0x03
ARRAY: Final = 0x04
BINARY: Final = 0x05
OBJECT_ID: Final = 0x07
BOOL: Final = 0x08
DATE: Final = 0x09
NULL: Final = 0x0A
INT32: Final = 0x10
INT64: Final = 0x12

Buffer = bytes | bytearray | memoryview
# A value: its type, the offset of its first byte, the offset just behind its last.
Span = tuple[int, int, int]
_EMPTY_BYTES: Final = 5
# The span of a field that is not there: of no type, and empty.
MISSING: Final[Span] = (0, 0, 0)

_INT32 = Struct("<i")
_INT64 = Struct("<q")
_DOUBLE = Struct("<d")
_read_int32 = _INT32.unpack_from
_pack_int32 = _INT32.pack
_pack_int64 = _INT64.pack
_pack_double = _DOUBLE.pack

# By type: the size of a value, or how to learn it.  Documents and strings begin with a length; the negative of it is
# what must be added to that length to get from the NUL before the value to its end.
_DOCUMENT, _STRING, _BINARY, _REGEX, _POINTER, _UNKNOWN = -1, -5, -6, -7, -8, -9
_SIZES = [_UNKNOWN] * 256
for _type, _size in {
    0x01: 8,
    0x02: _STRING,
    0x03: _DOCUMENT,
    0x04: _DOCUMENT,
    0x05: _BINARY,
    0x06: 0,
    0x07: 12,
    0x08: 1,
    0x09: 8,
    0x0A: 0,
    0x0B: _REGEX,
    0x0C: _POINTER,
    0x0D: _STRING,
    0x0E: _STRING,
    0x0F: _DOCUMENT,
    0x10: 4,
    0x11: 8,
    0x12: 8,
    0x13: 16,
    0xFF: 0,
    0x7F: 0,
}.items():
    _SIZES[_type] = _size


class InvalidBSONError(CommandError):
    """The bytes are not a BSON document (InvalidBSON, 22)."""

    def __init__(self, message: str) -> None:
        super().__init__(22, message)


def document_end(data: Buffer, start: int, limit: int) -> int:
    """The offset behind the document at ``start``; raises InvalidBSONError unless it ends in a NUL before ``limit``."""
    if limit - start < 5:
        raise InvalidBSONError("BSON document is shorter than 5 bytes")
    end: int = start + _read_int32(data, start)[0]
    if end < start + 5 or end > limit or data[end - 1] != 0:
        raise InvalidBSONError(f"BSON document has an invalid length of {end - start} bytes")
    return end


def scan(data: bytes, start: int, end: int) -> dict[bytes, Span]:
    """The top-level fields of the document in ``data[start:end]``, in order; of a repeated key the last one counts.

    Values are measured, not validated: what is inside a nested document is the reader's business.
    Raises InvalidBSONError.
    """
    fields: dict[bytes, Span] = {}
    position = start + 4
    last = end - 1
    sizes = _SIZES
    find = data.index
    read_int32 = _read_int32
    try:
        while position < last:
            kind = data[position]
            name_end = find(0, position + 1, last)
            size = sizes[kind]
            if size >= 0:
                after = name_end + 1 + size
            elif size >= _STRING:  # a length comes first
                after = name_end - size + read_int32(data, name_end + 1)[0]
                if after < name_end + 6 or data[after - 1]:
                    raise InvalidBSONError("BSON string or nested document has an invalid length")
            else:
                after = name_end + 1 + _measure(data, kind, name_end + 1, size, last)
            if after > last:
                raise InvalidBSONError("BSON value runs over the end of its document")
            fields[data[position + 1 : name_end]] = (kind, name_end + 1, after)
            position = after
    except (ValueError, IndexError, StructError):
        raise InvalidBSONError("BSON document is cut short") from None
    return fields


def _measure(data: bytes, kind: int, value: int, how: int, last: int) -> int:
    """The size in bytes of a value that has neither a fixed one nor a simple length before it."""
    if how == _BINARY:
        length: int = _read_int32(data, value)[0]
        if length < 0:
            raise InvalidBSONError("BSON binary has a negative length")
        size = length + 5
    elif how == _REGEX:
        size = data.index(0, data.index(0, value, last) + 1, last) + 1 - value
    elif how == _POINTER:
        size = _read_int32(data, value)[0] + 4 + 12
        if size < 17:
            raise InvalidBSONError("BSON pointer has an invalid length")
    else:
        raise InvalidBSONError(f"BSON type {kind:#04x} is not known")
    return size


def is_empty(span: Span) -> bool:
    """Whether a value is a document without fields."""
    kind, start, end = span
    return kind == DOCUMENT and end - start == _EMPTY_BYTES


def read_int(data: Buffer, span: Span) -> int | None:
    """The whole number of an int32, int64 or integral double, or None for any other value."""
    kind, start, _ = span
    if kind == INT32:
        return int(_read_int32(data, start)[0])
    if kind == INT64:
        return int(_INT64.unpack_from(data, start)[0])
    if kind == DOUBLE:
        number: float = _DOUBLE.unpack_from(data, start)[0]
        return int(number) if number.is_integer() else None
    return None


def read_bool(data: Buffer, span: Span) -> bool:
    """MongoDB's truth of a value: false, null, undefined and zero are false."""
    kind, start, _ = span
    if kind == BOOL:
        return data[start] != 0
    if kind == DOUBLE:
        return bool(_DOUBLE.unpack_from(data, start)[0])
    if kind in (INT32, INT64):
        return read_int(data, span) != 0
    return kind not in (NULL, 0x06)


def read_string(data: bytes, span: Span) -> bytes | None:
    """The UTF-8 bytes of a string, or None for any other value."""
    kind, start, end = span
    return data[start + 4 : end - 1] if kind == STRING else None


def read_int64s(data: bytes, span: Span) -> list[int] | None:
    """The numbers of an array of int64, or None if it is anything else."""
    kind, start, end = span
    if kind != ARRAY:
        return None
    values = scan(data, start, end).values()
    if any(value[0] != INT64 for value in values):
        return None
    return [_INT64.unpack_from(data, value[1])[0] for value in values]


def split_sequence(data: bytes | memoryview) -> Iterator[memoryview]:
    """The documents of a sequence (documents one behind the other); raises InvalidBSONError."""
    view = memoryview(data)
    position, limit = 0, len(data)
    while position < limit:
        end = document_end(data, position, limit)
        yield view[position:end]
        position = end


def split_array(data: bytes, start: int, end: int) -> Iterator[memoryview]:
    """The documents of the array in ``data[start:end]``, whatever they are called; raises InvalidBSONError."""
    view = memoryview(data)
    position, last = start + 4, end - 1
    while position < last:
        name_end = data.find(0, position + 1, last)
        if data[position] != DOCUMENT or name_end < 0:
            raise InvalidBSONError("an item of an array of documents is none")
        position = document_end(data, name_end + 1, last)
        yield view[name_end + 1 : position]


def document(*elements: bytes) -> bytes:
    """A document of finished elements."""
    body = b"".join(elements)
    return _pack_int32(len(body) + 5) + body + b"\0"


def without(data: bytes, fields: dict[bytes, Span], names: Set[bytes]) -> bytes:
    """The document without the named top-level fields."""
    return document(
        *(
            bytes((kind,)) + name + b"\0" + data[value:after]
            for name, (kind, value, after) in fields.items()
            if name not in names
        )
    )


def string(name: bytes, value: str) -> bytes:
    """The element ``name: value``."""
    data = value.encode("utf-8", "replace")
    return b"\x02" + name + b"\0" + _pack_int32(len(data) + 1) + data + b"\0"


def int32(name: bytes, value: int) -> bytes:
    """The element ``name: value`` as a 32-bit integer."""
    return b"\x10" + name + b"\0" + _pack_int32(value)


def int64(name: bytes, value: int) -> bytes:
    """The element ``name: value`` as a 64-bit integer."""
    return b"\x12" + name + b"\0" + _pack_int64(value)


def double(name: bytes, value: float) -> bytes:
    """The element ``name: value`` as a double."""
    return b"\x01" + name + b"\0" + _pack_double(value)


def boolean(name: bytes, value: bool) -> bytes:
    """The element ``name: value``."""
    return b"\x08" + name + (b"\0\x01" if value else b"\0\0")


def date(name: bytes, milliseconds: int) -> bytes:
    """The element ``name: value`` as a UTC datetime, in milliseconds since the Unix epoch."""
    return b"\x09" + name + b"\0" + _pack_int64(milliseconds)


def array(name: bytes, kind: int, values: list[bytes]) -> bytes:
    """The element ``name: [value, …]`` of finished values that are all of one type."""
    prefix = bytes((kind,))
    items = [prefix + str(index).encode() + b"\0" + value for index, value in enumerate(values)]
    return b"\x04" + name + b"\0" + document(*items)


OK = double(b"ok", 1.0)
OK_REPLY = document(OK)

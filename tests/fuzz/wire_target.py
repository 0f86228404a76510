"""What must hold for any bytes that reach pg_ferret.wire; parser.py feeds it.

Imported by parser.py after atheris has begun to watch imports, so that the coverage of the parser steers it.
"""

from __future__ import annotations

import struct
from contextlib import suppress

import bson as oracle
import crc32c
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.errors import BSONError
from bson.raw_bson import RawBSONDocument

from pg_ferret.errors import ProtocolError
from pg_ferret.wire import bson, message

_LENIENT: CodecOptions[dict[str, object]] = CodecOptions(
    unicode_decode_error_handler="replace", datetime_conversion=DatetimeConversion.DATETIME_MS
)
_NOTHING: frozenset[bytes] = frozenset()
# Where the body of an OP_MSG without flags begins, as in most of the golden frames.
_BODY = 21


def check_input(data: bytes) -> None:
    """Everything that can be done with the same bytes: a frame, one with a right checksum, a document, a sequence."""
    check_frame(data)
    check_frame(with_checksum(data))
    check_document(data)
    check_document(data[_BODY:])
    check_sequence(memoryview(data))


def with_checksum(data: bytes) -> bytes:
    """The frame with the flag and the checksum set: no fuzzer guesses a CRC, and what is behind it is to be reached."""
    if len(data) < 24:
        return data
    flags = struct.unpack_from("<I", data, 16)[0] | message.CHECKSUM_PRESENT
    head = struct.pack("<i", len(data) + 4) + data[4:16] + struct.pack("<I", flags) + data[20:]
    return head + struct.pack("<I", crc32c.crc32c(head))


def check_frame(frame: bytes) -> None:
    """`parse` gives a request that fits its frame, or one of its two refusals, and `reply_head` agrees with it."""
    check_length(frame)
    if len(frame) < message.HEADER_BYTES:
        return  # the connection never has one
    number, legacy, silent = message.reply_head(frame)
    try:
        request = message.parse(frame)
    except ProtocolError:
        return
    except bson.InvalidBSONError as error:
        assert error.code == 22
        return
    assert (number, legacy, silent) == (request.request_id, request.legacy, request.silent)
    assert number == struct.unpack_from("<i", frame, 4)[0]
    assert request.name == next(iter(request.fields))
    check_fields(frame, request.start, request.end, request.fields)
    for name in request.fields:
        request.string(name)
        request.integer(name)
        request.true(name)
    for content in request.sequences.values():
        check_sequence(content)
    parts = message.reply(bytes(request.body), number, legacy)
    answer = parts if isinstance(parts, bytes) else b"".join(parts)
    assert message.frame_length(answer) == len(answer)


def check_length(frame: bytes) -> None:
    """The length is the header's and within the limits, or it is refused."""
    if len(frame) >= 4:
        with suppress(ProtocolError):
            length = message.frame_length(frame)
            assert message.HEADER_BYTES <= length <= message.MAX_MESSAGE_BYTES
            assert length == struct.unpack_from("<i", frame)[0]


def check_document(data: bytes) -> None:
    """`scan` finds what the oracle finds; it may find more, as it does not look into nested documents."""
    try:
        end = bson.document_end(data, 0, len(data))
        fields = bson.scan(data, 0, end)
    except bson.InvalidBSONError:
        assert oracle_names(data) is None, "the oracle reads a document that scan refuses"
        return
    check_fields(data, 0, end, fields)
    names = oracle_names(data[:end])
    if names is not None:
        # Names that differ only in what is not UTF-8 are one for the oracle.
        assert names == list(dict.fromkeys(name.decode("utf-8", "replace") for name in fields))


def oracle_names(data: bytes) -> list[str] | None:
    """The document's names as PyMongo reads them, or None if it refuses the document."""
    try:
        return list(oracle.decode(data, _LENIENT))
    except (BSONError, ValueError, OverflowError, RecursionError, TypeError, KeyError):
        return None


def check_fields(data: bytes, start: int, end: int, fields: dict[bytes, bson.Span]) -> None:
    """Every span lies in the document behind its own type and name, no two overlap, and each value can be read."""
    assert 0 <= start < start + 5 <= end <= len(data)
    assert struct.unpack_from("<i", data, start)[0] == end - start
    assert data[end - 1] == 0
    covered = start + 4
    for name, (kind, value, after) in sorted(fields.items(), key=lambda item: item[1][1]):
        head = value - len(name) - 2
        assert covered <= head and value <= after <= end - 1
        assert data[head:value] == bytes((kind,)) + name + b"\0"
        covered = after
        check_value(data, (kind, value, after))
    check_without(data[start:end], data, fields)


def check_value(data: bytes, span: bson.Span) -> None:
    """No reader fails on a value that `scan` has measured; what is in an array may be malformed still."""
    kind, start, after = span
    bson.read_int(data, span)
    bson.read_bool(data, span)
    text = bson.read_string(data, span)
    assert (text is not None) == (kind == bson.STRING)
    assert text is None or len(text) == after - start - 5
    with suppress(bson.InvalidBSONError):
        numbers = bson.read_int64s(data, span)
        assert numbers is None or all(-(2**63) <= number < 2**63 for number in numbers)


def check_without(body: bytes, data: bytes, fields: dict[bytes, bson.Span]) -> None:
    """A document without nothing has the same fields; the same bytes too, unless a name was repeated."""
    copy = bson.without(data, fields, _NOTHING)
    again = bson.scan(copy, 0, bson.document_end(copy, 0, len(copy)))
    assert list(again) == list(fields)
    for name, (kind, value, after) in fields.items():
        assert (again[name][0], copy[again[name][1] : again[name][2]]) == (kind, data[value:after])
    if list(fields.values()) == sorted(fields.values(), key=lambda span: span[1]) and len(copy) == len(body):
        assert copy == body
    for name in fields:
        left = bson.without(data, fields, frozenset((name,)))
        assert list(bson.scan(left, 0, len(left))) == [other for other in fields if other != name]
        break


def check_sequence(content: bytes | memoryview) -> None:
    """The documents of a sequence are the sequence, one behind the other."""
    try:
        documents = list(bson.split_sequence(content))
    except bson.InvalidBSONError:
        return
    assert b"".join(documents) == bytes(content)
    for document in documents:
        with suppress(bson.InvalidBSONError):
            data = bytes(document)
            check_fields(data, 0, len(data), bson.scan(data, 0, len(data)))
            RawBSONDocument(data)

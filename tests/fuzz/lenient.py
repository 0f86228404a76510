"""Reading whatever a server may rightly store: PyMongo refuses some of it, UUIDs that have not 16 bytes for example."""

from __future__ import annotations

from typing import Any

import bson
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.errors import BSONError

from pg_ferret.errors import CommandError
from pg_ferret.wire import bson as wire

Document = dict[str, Any]

# Names and strings can be written again as they were.
LENIENT: CodecOptions[Document] = CodecOptions(
    unicode_decode_error_handler="surrogateescape", datetime_conversion=DatetimeConversion.DATETIME_MS
)


def decoded(data: bytes) -> Document:
    """The document; ValueError if it is malformed, however deep inside."""
    try:
        return bson.decode(data, LENIENT)
    except (BSONError, RecursionError):
        return _walked(data)


def _walked(data: bytes) -> Document:
    """The same by our own scan; values that nobody here looks at stay bytes."""
    try:
        if wire.document_end(data, 0, len(data)) != len(data):
            raise ValueError("there are bytes behind the document")
        fields = wire.scan(data, 0, len(data))
    except CommandError as error:
        raise ValueError(error.message) from None
    return {_text(name): _value(data, span) for name, span in fields.items()}


def _value(data: bytes, span: wire.Span) -> Any:
    kind, start, end = span
    if kind == wire.DOCUMENT:
        return _walked(data[start:end])
    if kind == wire.ARRAY:
        return list(_walked(data[start:end]).values())
    if kind == wire.STRING:
        return _text(data[start + 4 : end - 1])
    number = wire.read_int(data, span)
    return data[start:end] if number is None else number


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")

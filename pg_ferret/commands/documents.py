"""Decoding BSON where a reply has to be changed: off the hot path, and for whatever a client may have stored."""

from __future__ import annotations

from typing import Any

from bson.codec_options import CodecOptions, DatetimeConversion
from bson.raw_bson import RawBSONDocument

# Dates beyond year 9999 stay numbers of milliseconds, and what is no UTF-8 must not keep a reply from its client.
# Documents within stay bytes, so that none is taken for a DBRef.
OPTIONS: CodecOptions[RawBSONDocument] = CodecOptions(
    document_class=RawBSONDocument,
    datetime_conversion=DatetimeConversion.DATETIME_AUTO,
    unicode_decode_error_handler="replace",
)


def decode(data: bytes | memoryview) -> dict[str, Any]:
    """The document as a dict with nested ones as RawBSONDocument; raises bson.errors.InvalidBSON for what is none."""
    return dict(RawBSONDocument(bytes(data), OPTIONS))

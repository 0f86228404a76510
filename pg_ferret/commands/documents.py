"""Decoding BSON where a reply has to be changed: off the hot path, and for whatever a client may have stored."""

from __future__ import annotations

from typing import Any

import bson
from bson.codec_options import CodecOptions, DatetimeConversion

# Dates beyond year 9999 stay numbers of milliseconds, and what is no UTF-8 must not keep a reply from its client.
OPTIONS: CodecOptions[dict[str, Any]] = CodecOptions(
    datetime_conversion=DatetimeConversion.DATETIME_AUTO, unicode_decode_error_handler="replace"
)


def decode(data: bytes | memoryview) -> dict[str, Any]:
    """The document as a dict; raises bson.errors.InvalidBSON for bytes that are none."""
    return bson.decode(data, OPTIONS)

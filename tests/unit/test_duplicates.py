"""A duplicate key's text."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from bson import Binary, DatetimeMS, Decimal128, Int64, MaxKey, MinKey, ObjectId, encode
from bson.binary import UuidRepresentation
from bson.raw_bson import RawBSONDocument

from pg_ferret.commands.documents import OPTIONS
from pg_ferret.commands.duplicates import description
from pg_ferret.commands.statements import Index, Statement

_UUID = UUID("00112233-4455-6677-8899-aabbccddeeff")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (7, "7"),
        (Int64(7), "7"),
        (1.5, "1.5"),
        (float("nan"), "nan.0"),
        (float("-inf"), "-inf.0"),
        (Decimal128("1.50"), "1.50"),
        ('a "b" \\', '"a \\"b\\" \\\\"'),
        ({"x": {"y": "z"}}, '{ x: { y: "z" } }'),
        ({}, "{ }"),
        ([[1, "x"]], '[ 1, "x" ]'),
        (ObjectId("0123456789abcdef01234567"), "ObjectId('0123456789abcdef01234567')"),
        (Binary.from_uuid(_UUID, UuidRepresentation.STANDARD), f'UUID("{_UUID}")'),
        (Binary(b"\x01\xab", 0), "BinData(0, 01AB)"),
        (Binary(b"\x01\xab", 5), "BinData(5, 01AB)"),
        (datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC), "new Date(1000)"),
        (DatetimeMS(2**60), f"new Date({2**60})"),
        (MinKey(), "MinKey"),
        (MaxKey(), "MaxKey"),
    ],
)
def test_values_are_printed_as_mongodb_prints_them(value: Any, text: str) -> None:
    statement = Statement(RawBSONDocument(encode({"key": value}), OPTIONS))
    told = description(b"db.c", Index("key_1", {"key": 1}), statement)
    assert told["errmsg"] == f"E11000 duplicate key error collection: db.c index: key_1 dup key: {{ key: {text} }}"

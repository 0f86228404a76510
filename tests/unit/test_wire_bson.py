"""The BSON scan against pymongo's bson as the oracle."""

from __future__ import annotations

import contextlib
import datetime
from typing import Any

import bson as oracle
import pytest
from bson.raw_bson import RawBSONDocument
from hypothesis import given
from hypothesis import strategies as st

from pg_ferret.wire import bson

_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(st.characters(codec="utf-8")),
    st.binary(),
    st.builds(oracle.ObjectId),
    st.datetimes(min_value=datetime.datetime(1970, 1, 2), max_value=datetime.datetime(2100, 1, 1)),
    st.builds(oracle.Regex, st.text(st.characters(codec="utf-8", exclude_characters="\0"))),
    st.builds(oracle.Timestamp, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
    st.just(oracle.MinKey()),
    st.just(oracle.MaxKey()),
    st.builds(oracle.Decimal128, st.sampled_from(["1", "-0.5", "NaN"])),
    st.builds(oracle.Code, st.text(max_size=5), st.sampled_from([None, {"a": 1}])),
)
_NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
_VALUES = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_NAMES, inner, max_size=4), max_leaves=12
)
_DOCUMENTS = st.dictionaries(_NAMES, _VALUES, max_size=8)


@given(_DOCUMENTS)
def test_scan_finds_the_fields_that_the_oracle_finds(document: dict[str, Any]) -> None:
    data = oracle.encode(document)
    fields = bson.scan(data, 0, len(data))
    assert [name.decode() for name in fields] == list(document)
    for name, (kind, start, end) in fields.items():
        alone = oracle.decode(bson.document(bytes((kind,)) + name + b"\0" + data[start:end]))
        assert alone == oracle.decode(oracle.encode({name.decode(): document[name.decode()]}))


@given(_DOCUMENTS, st.data())
def test_scan_of_damaged_bytes_answers_or_raises_invalid_bson(document: dict[str, Any], data: st.DataObject) -> None:
    damaged = bytearray(oracle.encode(document))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    frozen = bytes(damaged)
    try:
        end = bson.document_end(frozen, 0, len(frozen))
        fields = bson.scan(frozen, 0, end)
    except bson.InvalidBSONError as error:
        assert error.code == 22
    else:
        assert all(0 <= start <= after < end for _, start, after in fields.values())


@given(st.binary(max_size=200))
def test_scan_of_noise_never_fails_otherwise(noise: bytes) -> None:
    with contextlib.suppress(bson.InvalidBSONError):
        bson.scan(noise, 0, bson.document_end(noise, 0, len(noise)))


@given(st.dictionaries(_NAMES, st.integers(-(2**63), 2**63 - 1) | st.floats() | st.booleans() | st.text(max_size=3)))
def test_single_values_are_read_as_the_oracle_reads_them(document: dict[str, Any]) -> None:
    data = oracle.encode(document)
    for name, span in bson.scan(data, 0, len(data)).items():
        value = document[name.decode()]
        if isinstance(value, str):
            assert bson.read_string(data, span) == value.encode()
            assert bson.read_int(data, span) is None
        elif isinstance(value, bool):
            assert bson.read_bool(data, span) is value
        elif isinstance(value, int):
            assert bson.read_int(data, span) == value
            assert bson.read_bool(data, span) is (value != 0)
        else:
            assert bson.read_int(data, span) == (int(value) if value.is_integer() else None)


def test_the_writer_writes_what_the_oracle_reads() -> None:
    written = bson.document(
        bson.string(b"s", "käse"),
        bson.int32(b"i", -5),
        bson.int64(b"l", 2**40),
        bson.double(b"d", 1.5),
        bson.boolean(b"t", True),
        bson.boolean(b"f", False),
        bson.date(b"when", 1_000),
        bson.array(b"a", bson.INT64, [(7).to_bytes(8, "little")]),
        bson.OK,
    )
    assert oracle.decode(written) == {
        "s": "käse",
        "i": -5,
        "l": 2**40,
        "d": 1.5,
        "t": True,
        "f": False,
        "when": datetime.datetime(1970, 1, 1, 0, 0, 1),
        "a": [7],
        "ok": 1.0,
    }


@given(_DOCUMENTS, st.sets(_NAMES, max_size=3))
def test_without_leaves_the_other_fields(document: dict[str, Any], unwanted: set[str]) -> None:
    data = oracle.encode(document)
    names = frozenset(name.encode() for name in unwanted)
    left = bson.without(data, bson.scan(data, 0, len(data)), names)
    kept = {name: value for name, value in document.items() if name not in unwanted}
    assert RawBSONDocument(left).raw == oracle.encode(kept)


@given(st.lists(_DOCUMENTS, max_size=5))
def test_a_sequence_splits_into_its_documents(documents: list[dict[str, Any]]) -> None:
    encoded = [oracle.encode(document) for document in documents]
    assert [bytes(item) for item in bson.split_sequence(memoryview(b"".join(encoded)))] == encoded


@pytest.mark.parametrize("tail", [b"\x01", b"\x04\0\0\0\0", b"\xff\xff\xff\x7f\0", b"\x06\0\0\0\0"])
def test_a_broken_sequence_is_refused(tail: bytes) -> None:
    with pytest.raises(bson.InvalidBSONError):
        list(bson.split_sequence(memoryview(oracle.encode({"a": 1}) + tail)))


def test_int64_arrays() -> None:
    data = oracle.encode({"a": [oracle.Int64(1), oracle.Int64(-2)], "b": [1], "c": 5})
    fields = bson.scan(data, 0, len(data))
    assert bson.read_int64s(data, fields[b"a"]) == [1, -2]
    assert bson.read_int64s(data, fields[b"b"]) is None
    assert bson.read_int64s(data, fields[b"c"]) is None

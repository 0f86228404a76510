"""Requests of a known shape are not scanned: what is taken from the shape must be what a scan would find."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

import bson as oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pg_ferret.errors import CommandError
from pg_ferret.wire import bson, message
from tests.wire import message as frame_of

_VALUES = st.one_of(
    st.integers(-(2**31), 2**31 - 1),
    st.integers(2**40, 2**50).map(oracle.Int64),
    st.floats(allow_nan=False),
    st.booleans(),
    st.none(),
    st.text(max_size=6),
    st.binary(max_size=6),
    st.dictionaries(st.sampled_from(["a", "b"]), st.integers(0, 9), max_size=2),
    st.lists(st.integers(0, 9), max_size=3),
)
_NAMES = st.sampled_from(["find", "filter", "limit", "$db", "lsid", "x"])
_COMMANDS = st.dictionaries(_NAMES, _VALUES, min_size=1, max_size=5)


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> message.Shapes:
    """A memory of its own."""
    made = message.Shapes()
    monkeypatch.setattr(message, "_shapes", made)
    return made


def test_the_second_of_a_shape_is_not_scanned(shapes: message.Shapes, monkeypatch: pytest.MonkeyPatch) -> None:
    first = message.parse(frame_of({"find": "c", "filter": {"_id": 1}, "limit": 1, "$db": "d"}, 7))
    monkeypatch.setattr(bson, "scan", None)
    second = message.parse(frame_of({"find": "c", "filter": {"_id": 2}, "limit": 9, "$db": "d"}, 8))
    assert (second.request_id, second.name, second.integer(b"limit"), second.string(b"$db")) == (8, b"find", 9, b"d")
    assert second.fields is first.fields
    assert second.memo is first.memo


@pytest.mark.parametrize(
    "other",
    [
        {"find": "cc", "filter": {"_id": 1}, "limit": 1, "$db": "d"},
        {"find": "c", "filter": {"_id": 1}, "limit": 1, "$db": "e"},
        {"find": "c", "filter": {"_id": 1}, "limix": 1, "$db": "d"},
        {"find": "c", "filter": ["abcdefgh"[:0] or 1], "limit": 1, "$db": "d"},
        {"finx": "c", "filter": {"_id": 1}, "limit": 1, "$db": "d"},
    ],
)
def test_names_types_and_options_make_the_shape(shapes: message.Shapes, other: dict[str, Any]) -> None:
    first = message.parse(frame_of({"find": "c", "filter": {"_id": 1}, "limit": 1, "$db": "d"}))
    assert message.parse(frame_of(other)).memo is not first.memo


@given(st.lists(_COMMANDS, min_size=2, max_size=8), st.randoms(use_true_random=False))
def test_a_shape_says_what_a_scan_says(commands: list[dict[str, Any]], chance: random.Random) -> None:
    message._shapes = message.Shapes()
    for command in commands:
        whole = bytearray(frame_of(command))
        for damaged in (False, True):
            if damaged:
                whole[chance.randrange(12, len(whole))] ^= 1 << chance.randrange(8)
            frame = bytes(whole)
            try:
                expected: Any = bson.scan(frame, 21, len(frame))
            except CommandError:
                expected = None
            if frame[12:21] != b"\xdd\x07\0\0\0\0\0\0\0" or struct.unpack_from("<i", frame, 21)[0] != len(frame) - 21:
                continue
            try:
                found: Any = message.parse(frame).fields
            except CommandError:
                found = None
            if frame[-1]:
                assert found is None
            else:
                assert found == (expected or None)


@pytest.mark.parametrize("template", ['{"find": "%s", "$db": "d"}', '{"getMore": 1, "collection": "%s", "$db": "d"}'])
def test_collections_do_not_make_shapes(template: str, shapes: message.Shapes, monkeypatch: pytest.MonkeyPatch) -> None:
    first = message.parse(frame_of(json.loads(template % "tenant00000")))
    monkeypatch.setattr(bson, "scan", None)
    for number in range(10_000):
        request = message.parse(frame_of(json.loads(template % f"tenant{number:05}")))
        assert request.memo is first.memo
        assert request.string(next(name for name in (b"find", b"collection") if name in request.fields)) == (
            b"tenant%05d" % number
        )


def test_many_databases_are_all_remembered(shapes: message.Shapes, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [frame_of({"find": "c", "filter": {"_id": 1}, "$db": f"tenant{number:03}"}) for number in range(1000)]
    first = [message.parse(frame) for frame in frames]
    monkeypatch.setattr(bson, "scan", None)
    for known, frame in zip(first, frames, strict=True):
        assert message.parse(frame).memo is known.memo


def test_what_is_remembered_is_bounded(shapes: message.Shapes) -> None:
    for number in range(10_000):
        message.parse(frame_of({"find": "c", "$db": f"d{number:06}", "x" * (number % 400): 1}))
    kept = [shape for masks in shapes._by_size.values() for known in masks.values() for shape in known]
    assert len(kept) == shapes._count <= message._MOST_SHAPES
    for number in range(100):
        message.parse(frame_of({"find": "c", f"{number:02}" + "x" * (number % 7): 1}))
    assert max(map(len, shapes._by_size.values())) <= message._MASKS_OF_A_SIZE

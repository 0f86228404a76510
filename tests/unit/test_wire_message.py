"""Golden frames: raw bytes and what they must become (tests/unit/make_frames.py wrote them)."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import bson as oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pg_ferret.errors import CommandError, ProtocolError
from pg_ferret.wire import bson, message

_FRAMES = Path(__file__).parent / "frames"
_VALID = sorted((_FRAMES / "valid").glob("*.bin"))
_INVALID = sorted((_FRAMES / "invalid").glob("*.bin"))


@pytest.mark.parametrize("path", _VALID, ids=lambda path: path.stem)
def test_valid_frame(path: Path) -> None:
    frame = path.read_bytes()
    expected = json.loads(path.with_suffix(".json").read_text())
    assert message.frame_length(frame) == len(frame)
    request = message.parse(frame)
    assert request.request_id == 77
    assert request.name.decode() == expected["name"]
    assert request.silent is expected.get("silent", False)
    assert request.legacy is expected.get("legacy", False)
    counted = {name.decode(): len(list(bson.split_sequence(data))) for name, data in request.sequences.items()}
    assert counted == expected.get("sequences", {})
    assert next(iter(oracle.decode(request.body))) == expected["name"]


@pytest.mark.parametrize("path", _INVALID, ids=lambda path: path.stem)
def test_invalid_frame(path: Path) -> None:
    kind, _, words = path.with_suffix(".txt").read_text().strip().partition(" ")
    with pytest.raises((ProtocolError, CommandError), match=words) as refusal:
        message.parse(path.read_bytes())
    assert type(refusal.value).__name__ == kind


def test_there_are_golden_frames() -> None:
    assert len(_VALID) >= 8
    assert len(_INVALID) >= 19


@pytest.mark.parametrize("length", [-1, 0, 15, 48_000_001, 2**31 - 1, -(2**31)])
def test_a_length_that_no_message_has_is_refused_before_the_message_is_there(length: int) -> None:
    with pytest.raises(ProtocolError, match=str(length)):
        message.frame_length(struct.pack("<i", length))


@given(st.sampled_from(_VALID), st.data())
def test_damaged_frames_are_refused_and_nothing_else(path: Path, data: st.DataObject) -> None:
    frame = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(4, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        message.parse(bytes(frame))
    except ProtocolError:
        pass
    except CommandError as error:
        assert error.code == 22
        message.reply_head(bytes(frame))


def test_replies_are_framed() -> None:
    document = oracle.encode({"ok": 1.0})
    assert message.reply(document, 9, legacy=False) == (
        struct.pack("<iiiiI", 21 + len(document), 0, 9, 2013, 0) + b"\0" + document
    )
    assert message.reply(document, 9, legacy=True) == (
        struct.pack("<iiiiiqii", 36 + len(document), 0, 9, 1, 8, 0, 0, 1) + document
    )

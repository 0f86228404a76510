"""The registry of cursors, on a real LMDB environment."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import lmdb
import pytest

from pg_ferret.errors import CommandError
from pg_ferret.state.cursors import Cursor, Cursors, owner

_SOON = float("inf")


@pytest.fixture(params=["on disk", "in memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Where the registry is: it is written to by system calls, or through its map."""
    if request.param == "on disk":
        yield tmp_path
    else:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
            yield Path(path)


@pytest.fixture
def cursors(place: Path) -> Iterator[Cursors]:
    registry = Cursors(place)
    yield registry
    registry.close()


def cursor(session: bytes = b"", expires: float = _SOON, continuation: bytes = b"next", shape: int = 0) -> Cursor:
    return Cursor(owner(b"db.c", b"user", session), expires, continuation, shape)


def test_a_cursor_comes_back_as_it_was(cursors: Cursors) -> None:
    kept = cursor(session=b"s" * 16, continuation=bytes(range(256)), shape=-(1 << 63))
    cursors.open(7, kept)
    assert cursors.get(7) == kept
    assert (kept.namespace, kept.user) == (b"db.c", b"user")
    assert cursors.count() == 1
    assert cursors.get(8) is None
    assert cursors.get(-7) is None


def test_advance_keeps_the_newest_continuation_and_does_not_raise_the_dead(cursors: Cursors) -> None:
    cursors.open(7, cursor(shape=1))
    assert cursors.advance(7, cursor(shape=1), _SOON, b"later")
    assert cursors.get(7) == cursor(continuation=b"later", shape=1)
    assert cursors.remove([7, 8]) == [7]
    assert not cursors.advance(7, cursor(), _SOON, b"later")
    assert cursors.get(7) is None


def test_bereft_cursors_have_nothing_to_go_on_with_and_stay_so(cursors: Cursors) -> None:
    mine, other = owner(b"db.c", b"me", b"s" * 16), owner(b"db.cc", b"me")
    cursors.open(1, Cursor(mine, _SOON, b"one"))
    cursors.open(2, Cursor(other, _SOON, b"one"))
    assert cursors.of_owners(b"db.c\0") == ([1], None)
    assert cursors.of_owners(b"db.") == ([1, 2], None)
    assert cursors.of_owners(b"d.") == ([], None)
    cursors.bereave([1, 3])
    assert cursors.of_owners(b"db.c\0") == ([], None)
    bereft = cursors.get(1)
    assert bereft is not None
    assert (bereft.owner, bereft.continuation) == (mine, b"")
    assert bereft.expires < time.time() + 3600
    # A page was under way.
    assert not cursors.advance(1, Cursor(mine, _SOON, b"one"), _SOON, b"two")
    assert cursors.get(1) == bereft
    assert cursors.get(2) == Cursor(other, _SOON, b"one")
    assert cursors.get(3) is None
    assert cursors.of_sessions([b"s" * 16]) == [1]
    assert cursors.remove([1]) == [1]


def test_expired_cursors_are_not_found_and_can_be_swept(cursors: Cursors) -> None:
    cursors.open(1, cursor(expires=time.time() - 1))
    cursors.open(2, cursor(expires=time.time() + 3600))
    cursors.open(3, cursor())
    assert cursors.get(1) is None
    assert cursors.expired() == ([1], None)
    cursors.remove([1])
    assert cursors.expired() == ([], None)
    assert cursors.count() == 2


def test_many_cursors_are_swept_in_parts(cursors: Cursors) -> None:
    for number in range(1000):
        cursors.open(number, cursor(session=b"s" * 16, expires=0.0 if number % 3 else _SOON))
    swept: list[int] = []
    position: bytes | None = b""
    while position is not None:
        part, position = cursors.expired(position)
        assert len(part) <= 250
        assert cursors.remove(part) == part
        swept += part
    assert swept == [number for number in range(1000) if number % 3]
    assert cursors.count() == 334


def test_cursors_of_a_session(cursors: Cursors) -> None:
    cursors.open(1, cursor(session=b"a" * 16))
    cursors.open(2, cursor(session=b"a" * 16))
    cursors.open(3, cursor(session=b"b" * 16))
    cursors.remove([2])
    assert cursors.of_sessions([b"a" * 16, b"c" * 16]) == [1]
    assert sorted(cursors.of_sessions([b"a" * 16, b"b" * 16])) == [1, 3]


def test_another_process_sees_them_and_a_killed_writer_harms_nobody(place: Path) -> None:
    """A writer is killed again and again in the middle of its work; every record read back is whole."""
    for _ in range(5):
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            own = Cursors(place)
            number = 1
            while True:
                own.open(number % 50 + 1, cursor(session=b"s" * 16, continuation=b"x" * (number % 3000)))
                if number == 20:
                    os.write(writer, b"!")
                number += 1
        os.read(reader, 1)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        os.close(writer)
        registry = Cursors(place)
        for number in range(1, 52):
            found = registry.get(number)
            assert found is None or found.namespace == b"db.c"
        registry.open(99, cursor())
        assert registry.get(99) == cursor()
        registry.close()


class _Failing:
    """An environment whose transactions fail."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def begin(self, **_: object) -> None:
        raise self._error


@pytest.mark.parametrize(
    "use",
    [lambda registry: registry.get(1), lambda registry: registry.advance(1, cursor(), _SOON, b"x"), Cursors.count],
    ids=["get", "advance", "count"],
)
def test_what_fails_is_told_and_no_other_error_is_taken_for_a_full_registry(
    cursors: Cursors, monkeypatch: pytest.MonkeyPatch, use: Callable[[Cursors], object]
) -> None:
    def no_room() -> None:
        raise OSError("no space")

    monkeypatch.setattr(cursors._store, "grow", no_room)
    for error in (lmdb.DiskError("disk"), lmdb.MapFullError("full"), lmdb.MapResizedError("resized")):
        monkeypatch.setattr(cursors, "_env", _Failing(error))
        with pytest.raises(CommandError) as refused:
            use(cursors)
        assert refused.value.code == 14031
    monkeypatch.setattr(cursors, "_env", _Failing(lmdb.BadRslotError("slot")))
    with pytest.raises(lmdb.BadRslotError):
        use(cursors)

"""The registry of open cursors: one LMDB environment that every worker maps.

A cursor is its continuation, which any connection of any worker can hand to the engine, so a cursor outlives the
worker that opened it.  Readers see committed records without locks; a writer killed in the middle leaves the last
committed state (LMDB's mutex is robust).  Nothing is synced to disk: the registry ends with the postmaster.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from struct import Struct
from typing import Final, TypeVar, TypeVarTuple

import lmdb

from pg_ferret.errors import CommandError, StateDirError
from pg_ferret.state.store import Store

_Given = TypeVarTuple("_Given")
_Result = TypeVar("_Result")

# The file.
REGISTRY: Final = "cursors.mdb"
# Opening stops at such a part of the room: what is open must still be able to go on and to end.
_MOST_PART: Final = 0.8
_KEY = Struct(">Q")
_SESSIONS: Final = b"by_session"  # longer than the key of any cursor
_HEAD = Struct("<dqH")  # expiry (Unix seconds; infinity: never), shape, length of the owner
_HEAD_BYTES: Final = _HEAD.size
# What changes with it: what another version writes is of no use, or written in another way.
FORMAT: Final = f"{_HEAD.format} map"
_SWEEP_AT_ONCE: Final = 250
# How long whoever goes on with a cursor whose collection has gone is told so.
_BEREFT_SECONDS: Final = 600.0


@dataclass(slots=True)  # one for each page: to make a named tuple takes twice as long
class Cursor:
    """What is needed to go on with a cursor."""

    owner: bytes  # see `owner`
    expires: float  # Unix seconds; infinity for noCursorTimeout
    continuation: bytes  # empty: what it read has gone
    # Of the find that opened it, as its worker reckons shapes: cursors of one shape cost about the same.  Elsewhere it
    # may be another number, which costs no more than to measure it anew.  0: not known, as of aggregations.
    shape: int = 0

    @property
    def namespace(self) -> bytes:
        """``database.collection``."""
        return self.owner.split(b"\0", 2)[0]

    @property
    def user(self) -> bytes:
        """Who may go on with it."""
        return self.owner.split(b"\0", 2)[1]


def owner(namespace: bytes, user: bytes, session: bytes = b"") -> bytes:
    """Whose a cursor is; the session is the 16 bytes of a UUID, or empty: then it is what the owner begins with."""
    return b"%b\0%b\0%b" % (namespace, user, session)


def _session(cursor_owner: bytes) -> bytes:
    return cursor_owner.split(b"\0", 2)[2]


def _growing(use: Callable[[Cursors, *_Given], _Result]) -> Callable[[Cursors, *_Given], _Result]:
    """A method of `Cursors`, for which the registry grows."""

    @wraps(use)
    def used(self: Cursors, *given: *_Given) -> _Result:
        try:
            return use(self, *given)
        except lmdb.Error as error:
            return self._grown(error, used, self, *given)

    return used


class Cursors:
    """All open cursors; the methods take microseconds, milliseconds when the registry grows, and never wait for I/O.

    All raise CommandError when it has to grow and there is no room.
    """

    def __init__(self, place: Path) -> None:
        """Raises StateDirError when there is no room."""
        try:
            self._store = Store(place / REGISTRY)
        except (OSError, lmdb.Error) as error:
            raise StateDirError(f"ferretdb.state_dir: {place}: {error}") from error
        self._env = self._store.environment
        # Cursors are in the main database, by id: the fewer databases a commit changes, the fewer pages it writes.
        self._by_session = self._sessions()

    def _grown(self, error: Exception, use: Callable[[*_Given], _Result], *given: *_Given) -> _Result:
        """The same once more for a use of the registry that has failed because it is too small.

        Raises CommandError if it cannot grow, or the disk has failed; the error itself if it is another one.
        """
        if isinstance(error, lmdb.DiskError):
            raise _refused(error) from None
        if not isinstance(error, lmdb.MapFullError | lmdb.MapResizedError):
            raise error
        try:
            self._store.grow()
        except (lmdb.MapFullError, lmdb.DiskError, OSError) as failure:
            raise _refused(failure) from None
        return use(*given)

    @_growing
    def _sessions(self) -> lmdb._Database:
        return self._env.open_db(_SESSIONS, dupsort=True, dupfixed=True)

    @_growing
    def count(self) -> int:
        """How many cursors are open."""
        with self._env.begin() as transaction:
            return int(transaction.stat()["entries"]) - 1  # the other database is an entry, too

    @_growing
    def open(self, cursor_id: int, cursor: Cursor) -> None:
        """Remember a new cursor; raises CommandError when the registry is full."""
        key = _KEY.pack(cursor_id)
        with self._env.begin(write=True) as transaction:
            used = _pages(transaction.stat()) + _pages(transaction.stat(self._by_session))
            if used > _MOST_PART * self._store.pages:
                raise lmdb.MapFullError
            transaction.put(key, _pack(cursor))
            if session := _session(cursor.owner):
                transaction.put(session, key, db=self._by_session)

    # `advance` and `get`, which are used for every page, would cost a tenth more if they were decorated.

    def advance(self, cursor_id: int, cursor: Cursor, expires: float, continuation: bytes) -> bool:
        """Store the new continuation and expiry of a cursor that `get` gave, unless it has ended meanwhile.

        Tells whether it lives.
        """
        key = _KEY.pack(cursor_id)
        cursor_owner = cursor.owner
        head = _HEAD.pack(expires, cursor.shape, len(cursor_owner)) + cursor_owner
        record = head + continuation
        try:
            with self._env.begin(write=True) as transaction:
                current = transaction.get(key)
                if current is None or len(current) == len(head):  # it is bereft
                    return False
                transaction.put(key, record)
        except lmdb.Error as error:
            return self._grown(error, self.advance, cursor_id, cursor, expires, continuation)
        return True

    def bereave(self, cursor_ids: list[int]) -> None:
        """What these cursors read has gone: nothing is left of them but whose they were, for a while."""
        try:
            self._bereave(cursor_ids)
        except CommandError:
            self.remove(cursor_ids)  # which needs no room

    @_growing
    def _bereave(self, cursor_ids: list[int]) -> None:
        at_most = time.time() + _BEREFT_SECONDS
        with self._env.begin(write=True) as transaction:
            for key in map(_KEY.pack, cursor_ids):
                if (record := transaction.get(key)) is not None:
                    expires, _, size = _HEAD.unpack_from(record)
                    whose = record[_HEAD_BYTES : _HEAD_BYTES + size]
                    transaction.put(key, _pack(Cursor(whose, min(expires, at_most), b"")))

    def get(self, cursor_id: int) -> Cursor | None:
        """The cursor, or None if it is unknown or has expired."""
        try:
            with self._env.begin() as transaction:
                record = transaction.get(_KEY.pack(cursor_id & 0xFFFFFFFFFFFFFFFF))
        except lmdb.Error as error:
            return self._grown(error, self.get, cursor_id)
        if record is None:
            return None
        expires, shape, size = _HEAD.unpack_from(record)
        if expires <= time.time():
            return None
        end = _HEAD_BYTES + size
        return Cursor(record[_HEAD_BYTES:end], expires, record[end:], shape)

    @_growing
    def known(self, cursor_id: int) -> bool:
        """Whether there is such a cursor, expired or not."""
        with self._env.begin() as transaction:
            return transaction.get(_KEY.pack(cursor_id & 0xFFFFFFFFFFFFFFFF)) is not None

    def remove(self, cursor_ids: list[int]) -> list[int]:
        """Forget cursors; returns those that were known."""
        # One by one: LMDB needs free pages to delete, and a full map has few.
        return [cursor_id for cursor_id in cursor_ids if self._remove(_KEY.pack(cursor_id & 0xFFFFFFFFFFFFFFFF))]

    @_growing
    def _remove(self, key: bytes) -> bool:
        with self._env.begin(write=True) as transaction:
            record = transaction.pop(key)
            if record is None:
                return False
            end = _HEAD_BYTES + _owner_bytes(record)
            if session := _session(record[_HEAD_BYTES:end]):
                transaction.delete(session, key, db=self._by_session)
        return True

    @_growing
    def of_sessions(self, sessions: list[bytes]) -> list[int]:
        """The ids of the cursors that were opened in any of these sessions."""
        found: list[int] = []
        with self._env.begin(db=self._by_session) as transaction, transaction.cursor() as walk:
            for session in sessions:
                if walk.set_key(session):
                    found.extend(_KEY.unpack(key)[0] for key in walk.iternext_dup())
        return found

    def expired(self, begin: bytes = b"") -> tuple[list[int], bytes | None]:
        """Of the next few cursors from ``begin`` on: the ids of those whose time is up, and where to go on, if at all.

        In parts, because a registry may hold a hundred thousand, and the worker has clients to serve.
        """
        now = time.time()
        return self._some(begin, lambda record: bool(_HEAD.unpack_from(record)[0] <= now))

    def of_owners(self, prefix: bytes, begin: bytes = b"") -> tuple[list[int], bytes | None]:
        """As `expired`, those whose owner begins with ``prefix`` and that have something to go on with."""
        owned = slice(_HEAD_BYTES, _HEAD_BYTES + len(prefix))
        return self._some(begin, lambda record: record[owned] == prefix and not _bereft(record))

    @_growing
    def _some(self, begin: bytes, chosen: Callable[[memoryview], bool]) -> tuple[list[int], bytes | None]:
        found: list[int] = []
        with self._env.begin(buffers=True) as transaction, transaction.cursor() as walk:
            walk.set_range(begin)
            for number, (key, record) in enumerate(walk):
                if number >= _SWEEP_AT_ONCE:
                    return found, bytes(key)
                if len(key) == _KEY.size and chosen(record):
                    found.append(_KEY.unpack(key)[0])
        return found, None

    def close(self) -> None:
        """Unmap the registry; it goes on to exist for the other workers."""
        self._store.close()


def _bereft(record: bytes | memoryview) -> bool:
    return len(record) == _HEAD_BYTES + _owner_bytes(record)


def _owner_bytes(record: bytes | memoryview) -> int:
    return int(_HEAD.unpack_from(record)[-1])


def _pages(stat: dict[str, int]) -> int:
    return stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]


def _refused(error: Exception) -> CommandError:
    """The registry cannot take a cursor: it has reached its own size, or its file system is full."""
    if isinstance(error, lmdb.MapFullError):
        return CommandError(146, "too many open cursors")
    return CommandError(14031, f"the cursor cannot be kept in ferretdb.state_dir: {error}")


def _pack(cursor: Cursor) -> bytes:
    return _HEAD.pack(cursor.expires, cursor.shape, len(cursor.owner)) + cursor.owner + cursor.continuation

"""Connections for the small writes of many clients.

A write of one document by its _id takes PostgreSQL less time than it takes to wake a process up and to wait for the
disk.  So while several are under way they stand in line at few connections, each a transaction of its own, committed
without a flush (commits.py).  Nothing in such a line waits for a lock: who would have to is made elsewhere instead, and
so is for a while whatever has taken long.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import struct
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

import psycopg
from psycopg import pq

from pg_ferret.engine.calls import FLUSH_COMMITS, SET_UP_WRITES, Call
from pg_ferret.engine.lines import Line, Lines, Owner, Shared
from pg_ferret.engine.pipeline import (
    COMMAND_OK,
    LARGE_BYTES,
    PIPELINE_ABORTED,
    PIPELINE_SYNC,
    TUPLES_OK,
    Params,
    Row,
    Session,
)
from pg_ferret.engine.sqlstate import CANCELLED, LOCKED, UNPREPARED, pack
from pg_ferret.errors import EngineError, EngineLostError
from pg_ferret.runner import Turn, Waiter

# Seconds: a line whose first write takes longer takes nobody, and as much for each that waits: the loop has more to do
# before it sees them end.
_LATE_SECONDS: Final = 0.004
_EACH_SECONDS: Final = 0.0005
# A write that takes longer is made elsewhere for so long, and so are those like it.
_SLOW_SECONDS: Final = 0.05
_BANNED_SECONDS: Final = 1.0
# A write that PostgreSQL does not end for so long though it is cancelled costs the line.
_GIVEN_UP_SECONDS: Final = 5.0
_CANCEL_SECONDS: Final = 5.0
_MOST_WAITING: Final = 128
# From so many that wait on another line is used: a backend that never sleeps serves them in less time than two.
_FULL: Final = 12
_MOST_SHAPES: Final = 10_000
# How long a write may wait for a lock before it is made elsewhere.
_LOCK_MILLISECONDS: Final = b"30"
# The statement by which the engine finds a document is planned once only if PostgreSQL takes the plan for any _id for
# no dearer than to plan it for each anew, which is a third of an update's work.  What planning costs it reckons by
# this, in the mean of all plans so far: a process that has taken it for cheap soon learns better.
_CPU_OPERATOR_COST: Final = b"0.1"
# The second column of a write that has been made as it was asked for.
_WELL: Final = b"\x01"
# Errors that may be the line's own, and of which nothing is left: the lock was not to be had, or it was cancelled.
_NOT_MADE: Final = (LOCKED, CANCELLED)
# The same in the engine's writeErrors.
_WRITE_ERRORS: Final = tuple(b"\x10code\0" + struct.pack("<i", pack(code)) for code in _NOT_MADE)


class Shapes(dict[int, float]):
    """Which shapes of writes may stand in line, and from when on: those that have been made and were not slow lately.

    Times are the loop's.
    """

    __slots__ = ()

    def note(self, shape: int, begin: float) -> None:
        """From then on it may."""
        if len(self) >= _MOST_SHAPES:
            self.clear()
        self[shape] = begin


_Waiting = tuple[Shared, Waiter[Row]]


class WriteLine(Line):
    """One of the connections."""

    __slots__ = (
        "_committed",
        "_error",
        "_leaving",
        "_owner",
        "_row",
        "_shapes",
        "_tasks",
        "queue",
    )

    def __init__(
        self,
        conn: Session,
        turn: Turn,
        shapes: Shapes,
        committed: Callable[[Waiter[Row], Row], None],
        owner: Owner,
    ) -> None:
        """``committed`` gets who waits and the result when a write has been committed without a flush."""
        self._shapes = shapes
        self._committed = committed
        self._owner = owner
        self.queue: deque[_Waiting] = deque()  # the first one is under way
        self._row: Row | None = None
        self._error: Exception | None = None
        self._leaving = False
        self._tasks: set[asyncio.Task[None]] = set()
        super().__init__(conn, turn)
        self.spent = True  # with settings of its own it is of no use to others

    def begin(self) -> None:
        """Set the connection up."""
        self.add(Shared(SET_UP_WRITES, (_LOCK_MILLISECONDS, _CPU_OPERATOR_COST), b"", 0)).cancel()

    def takes(self, shape: int) -> bool:
        """Whether a write may join."""
        queue = self.queue
        now = self._loop.time()
        if self._leaving or len(queue) >= _MOST_WAITING or self._shapes.get(shape, math.inf) > now:
            return False
        if not queue or now - self.since <= _LATE_SECONDS + len(queue) * _EACH_SECONDS:
            return True
        return self._flushes  # a slow disk is as slow elsewhere

    @property
    def _flushes(self) -> bool:
        """Whether a flush is under way."""
        return bool(self.queue) and self.queue[0][0].call is FLUSH_COMMITS

    def coming(self) -> int:
        """How many are about to be committed: none if the first one takes long, because it may wait for a lock."""
        return len(self.queue) if self._loop.time() - self.since <= _LATE_SECONDS else 0

    @property
    def open(self) -> bool:
        """Whether a write may join if there is no other way, though it may be slow, or we are late."""
        return not self._leaving and len(self.queue) < _MOST_WAITING

    @property
    def waiting(self) -> int:
        return len(self.queue)

    def add(self, write: Shared) -> Waiter[Row]:
        """The future gets the result when it is durable; it raises EngineError or EngineLostError."""
        waiter: Waiter[Row] = Waiter(self._turn)
        queue = self.queue
        if self.lost:
            waiter.set_exception(EngineLostError("connection to PostgreSQL lost"))
            return waiter
        if not queue:
            self.since = self._loop.time()
            self._starts()
        queue.append((write, waiter))
        call = write.call
        try:
            if call.name not in self._prepared:
                self._pg.send_prepare(call.name, call.sql)
                self._prepared.add(call.name)
            self._pg.send_query_prepared(call.name, write.params, call.formats, 1)
            self._sync()
        except psycopg.Error:
            self._end()
        return waiter

    def _take(self, result: pq.abc.PGresult, status: int) -> None:
        if status == TUPLES_OK:
            get = result.get_value
            if result.nfields == 3:
                reply = get(0, 0)
                if reply is not None and len(reply) > LARGE_BYTES:
                    self.swollen = True
                self._row = (reply, get(0, 1), get(0, 2))
        elif status == PIPELINE_SYNC:
            self._finish()
        elif status not in (COMMAND_OK, PIPELINE_ABORTED):
            self._error = error = self._error_of(result)
            if isinstance(error, EngineLostError):
                self._end()

    def _finish(self) -> None:
        """The server has done with the first one: it is committed, or rolled back."""
        slow = _SLOW_SECONDS + len(self.queue) * _EACH_SECONDS
        write, waiter = self.queue.popleft()
        row, self._row = self._row, None
        error, self._error = self._error, None
        now = self._loop.time()
        if now - self.since > slow:
            self._shapes.note(write.shape, now + _BANNED_SECONDS)
        elif write.shape not in self._shapes:  # it had no other way than to join
            self._shapes.note(write.shape, now)
        self.since = now
        if not self.queue:
            self.busy = False
        well = error is None and (row is None or row[1] == _WELL)
        if waiter.done():
            pass
        elif not well and write.call is not FLUSH_COMMITS and _not_made(row, error):
            self._shapes.note(write.shape, now + _BANNED_SECONDS)
            self._leaving |= isinstance(error, EngineError) and error.sqlstate == UNPREPARED
            self._owner.elsewhere(write, waiter)
        elif error is not None:
            waiter.set_exception(error)
        elif row is not None and row[-1] is not None:
            self._committed(waiter, row)
        else:
            waiter.set_result(row if row is not None else ())
        if self._leaving:
            self.retire()

    def _progress(self) -> object:
        return self.since

    def _stands_still(self) -> None:
        """Have the first write cancelled, again and again, and at last give up."""
        if self._flushes:  # whoever commits has to wait for the disk, and for standbys
            self._look_again()
        elif self._loop.time() - self.since <= _GIVEN_UP_SECONDS:
            if not self._tasks:
                task = self._loop.create_task(self._cancel())
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            self._look_again()
        else:
            first, _ = self.queue[0]
            self._give_up()
            self._owner.stalled(self, first)

    async def _cancel(self) -> None:
        """Whichever write the request meets is made elsewhere."""
        with contextlib.suppress(psycopg.Error):
            await self._conn.cancel_safe(timeout=_CANCEL_SECONDS)

    def _give_up(self) -> None:
        """Serve no more; nobody knows what becomes of those who wait: PostgreSQL may still make their writes."""
        self.detach()
        self.lost = self._leaving = True
        self.busy = False
        queue, self.queue = self.queue, deque()
        for _, waiter in queue:
            if not waiter.done():
                waiter.set_exception(EngineLostError("connection to PostgreSQL lost"))

    def _end(self) -> None:
        if not self.lost:
            self._give_up()
            self._owner.ended(self)

    def retire(self) -> None:
        self._leaving = True
        if not self.queue and not self.lost:
            self.detach()
            self._owner.ended(self)

    def drop(self) -> None:
        self._end()


def _not_made(row: Row | None, error: Exception | None) -> bool:
    """Whether a write that did not go well was not made, for a reason that is only the line's."""
    if error is not None:
        return isinstance(error, EngineError) and error.sqlstate in (*_NOT_MADE, UNPREPARED)
    reply = None if row is None else row[0]
    return reply is not None and any(code in reply for code in _WRITE_ERRORS)


class Room(NamedTuple):
    """What the pool does for writes."""

    crowded: Callable[[], bool]  # to be asked once for every write: whether it meets so many others that it shares
    alone: Callable[[Call, Params], Awaitable[Row]]  # make a write, which waits for its own commit; without the flag
    apart: Callable[[Call, Params], Awaitable[Row]]  # make a write on a connection of its own
    free: Callable[[], bool]  # whether there is such a connection, or may be
    want: Callable[[Writes], None]  # have another connection become a line
    others: Callable[[], int]  # how many requests have connections of their own, or wait for one


class Writes(Lines[WriteLine]):
    """All of them."""

    __slots__ = ("_alone", "_apart", "_crowded", "_free", "_shapes", "_want")

    def __init__(self, make: Callable[[Session], WriteLine], shapes: Shapes, room: Room) -> None:
        super().__init__(make)
        self._shapes = shapes
        self._crowded, self._alone, self._apart, self._free, self._want, _ = room

    def add(self, connection: Session) -> None:
        super().add(connection)
        self.all[-1].begin()

    def coming(self) -> int:
        """How many are about to be committed; some may turn out to change nothing."""
        return sum([line.coming() for line in self.all])

    def flush(self, flush: Shared) -> Waiter[Row] | None:
        """Make a flush in a line that is not late, where it would wait for what is before it, or else in any.

        None if there is none, or while another connection can be had.
        """
        lines = [line for line in self.all if line.open]
        line = next((line for line in lines if line.coming() == len(line.queue)), None)
        if line is None and not self._free():
            line = self.shortest(lines)
        return None if line is None else line.add(flush)

    def share(self, write: Shared) -> Awaitable[Row]:
        """As the pool's `write`, for one that touches a single small document, which it finds by its _id.

        Its last parameter is TRUE.  It is made once; a cancelled one is not taken back.
        """
        if not self._crowded():
            return self._alone(write.call, write.params[:-1])
        for line in self.all:
            if len(line.queue) < _FULL and line.takes(write.shape):
                return line.add(write)
        return self._pressed(write)

    def _pressed(self, write: Shared) -> Awaitable[Row]:
        """Where no line has room that takes it."""
        if self.due:
            self._want(self)
        line = self.shortest([line for line in self.all if line.takes(write.shape)])
        if line is None and not self._free():
            line = self.shortest(other for other in self.all if other.open)
        if line is not None:
            return line.add(write)
        if write.shape in self._shapes:
            return self._apart(write.call, write.params)
        return self._first(write)

    async def _first(self, write: Shared) -> Row:
        """The first of its shape may have a collection made."""
        row = await self._apart(write.call, write.params)
        self._shapes.note(write.shape, 0.0)
        return row

"""Connections for the cheap reads of many clients.

A point read takes PostgreSQL less time than it takes to wake a process up, so the reads that arrive in one turn of the
event loop go out together: one write, one transaction, one answer.  Whoever turns out to be slow is measured on a
connection of its own and stays there until it is cheap again.  While the line stands still nobody new joins it, and if
it does so for long, it is given up: those who wait in it are served elsewhere.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable

import psycopg
from psycopg import pq

from pg_ferret.engine.backend import Backend
from pg_ferret.engine.calls import FIND, Call
from pg_ferret.engine.lines import STALL_SECONDS, Line, Lines, Owner, Shared
from pg_ferret.engine.pipeline import LARGE_BYTES, PIPELINE_ABORTED, PIPELINE_SYNC, TUPLES_OK, Row, Session
from pg_ferret.errors import EngineLostError

# Seconds: what takes no longer is cheap; a line that stands still for longer, and as much for each read, takes nobody.
CHEAP_SECONDS = 0.004
_EACH_SECONDS = 0.0005
_MOST_WAITING = 128
# Shapes of reads whose cost is remembered.
_MOST_SHAPES = 10_000


class Costs:
    """Which shapes of reads have been cheap lately."""

    __slots__ = ("_cheap", "_slow")

    def __init__(self) -> None:
        self._cheap: set[int] = set()
        self._slow: set[int] = set()

    def cheap(self, shape: int) -> bool:
        """Whether the last read of this shape was cheap; one that was never seen is not."""
        return shape in self._cheap

    def slow(self, shape: int) -> bool:
        """Whether the last read of this shape was not cheap."""
        return shape in self._slow

    def note(self, shape: int, seconds: float) -> None:
        """A read of this shape has taken so long."""
        now, before = (self._slow, self._cheap) if seconds > CHEAP_SECONDS else (self._cheap, self._slow)
        before.discard(shape)
        if len(now) >= _MOST_SHAPES:
            now.clear()
        now.add(shape)


_Waiting = tuple[Shared, asyncio.Future[Row]]


class SharedLine(Line):
    """A connection for reads by one call, which has been prepared on it before."""

    __slots__ = (
        "_answered",
        "_batches",
        "_call",
        "_costs",
        "_filling",
        "_late",
        "_owner",
        "_scheduled",
        "_since",
    )

    def __init__(self, conn: Session, loop: asyncio.AbstractEventLoop, call: Call, costs: Costs, owner: Owner) -> None:
        self._call: Call | None = call  # None: the line is leaving
        self._costs = costs
        self._owner = owner
        self._filling: list[_Waiting] = []  # given to libpq, not yet sent
        self._batches: deque[list[_Waiting]] = deque()  # on their way, the oldest first
        self._answered = 0  # reads of the oldest batch that have their answer
        self._since = 0.0  # when the server began with the oldest batch
        self._late = 0.0  # from then on it takes too long
        self._scheduled = False
        super().__init__(conn, loop)

    def takes(self, read: Shared) -> bool:
        """Whether a read may join."""
        if read.call is not self._call or not self._costs.cheap(read.shape) or len(self._filling) >= _MOST_WAITING:
            return False
        return not self._batches or self._loop.time() <= self._late

    def may_take(self, read: Shared) -> bool:
        """Whether a read may join if there is no other way, though we are late, or it may be slow."""
        return read.call is self._call and len(self._filling) < _MOST_WAITING and not self._costs.slow(read.shape)

    @property
    def waiting(self) -> int:
        """Reads without an answer."""
        return len(self._filling) + sum(map(len, self._batches)) - self._answered

    def add(self, read: Shared) -> asyncio.Future[Row]:
        """The future gets the first row of the result; it raises EngineError or EngineLostError."""
        waiter: asyncio.Future[Row] = self._loop.create_future()
        call, params, _, _ = read
        self._filling.append((read, waiter))
        try:
            self._pg.send_query_prepared(call.name, params, call.formats, 1)
        except psycopg.Error:
            self._end()
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._send)
        return waiter

    def _send(self) -> None:
        """At the end of the loop's turn: all that has come in it goes out together."""
        self._scheduled = False
        if not self._filling:
            return
        if not self._batches:
            self._begin(self._loop.time(), self._filling)
        self._be_watched()
        self._batches.append(self._filling)
        self._filling = []
        self.busy = True
        self.idle_ticks = 0
        try:
            self._sync()
        except psycopg.Error:
            self._end()

    def _begin(self, now: float, batch: list[_Waiting]) -> None:
        """The server begins with a batch."""
        self._since = now
        self._late = now + CHEAP_SECONDS + len(batch) * _EACH_SECONDS

    def _take(self, result: pq.abc.PGresult) -> None:
        status = result.status
        if status == TUPLES_OK:
            get = result.get_value
            read, waiter = self._batches[0][self._answered]
            self._answered += 1
            page, following = get(0, 0), get(0, 1)
            if page is not None and len(page) > LARGE_BYTES:
                self.swollen = True
            if following is not None and read.call is FIND:
                # Behind others in a batch the engine keeps the cursor no longer than the batch lasts.
                self._costs.note(read.shape, math.inf)
                self._elsewhere(read, waiter)
            elif not waiter.done():
                waiter.set_result((page, following))
        elif status == PIPELINE_SYNC:
            self._finish(self._batches.popleft())
        elif status != PIPELINE_ABORTED:
            self._fail(result)

    def _fail(self, result: pq.abc.PGresult) -> None:
        """One read is refused; those behind it in the batch are answered elsewhere."""
        error = self._error_of(result)
        if isinstance(error, EngineLostError):
            self._end()
            return
        read, waiter = self._batches[0][self._answered]
        self._answered += 1
        self._costs.note(read.shape, STALL_SECONDS)  # whoever sends such reads again is not to hold others up
        if not waiter.done():
            waiter.set_exception(error)

    def _finish(self, batch: list[_Waiting]) -> None:
        """The server has done with a batch."""
        now = self._loop.time()
        seconds = (now - self._since) / len(batch)
        if self._batches:
            self._begin(now, self._batches[0])
        else:
            self.busy = False
        if seconds > CHEAP_SECONDS:
            for read, _ in batch:  # one of them is to blame: each has to show anew what it costs
                self._costs.note(read.shape, seconds)
        if self._answered < len(batch):
            for waiting in batch[self._answered :]:
                self._elsewhere(*waiting)
        self._answered = 0
        if self._call is None:
            self.retire()

    def _progress(self) -> object:
        return self._since, self._answered

    def _stands_still(self) -> None:
        waiting = self._give_up()
        first, _ = waiting[0]
        self._costs.note(first.shape, STALL_SECONDS)
        self._owner.stalled(self, first)
        for one in waiting:
            self._elsewhere(*one)

    def _elsewhere(self, read: Shared, waiter: asyncio.Future[Row]) -> None:
        if not waiter.done():
            self._owner.elsewhere(read, waiter)

    def _give_up(self) -> list[_Waiting]:
        """Serve no more; those who have no answer yet, the first one first."""
        self.detach()
        self.lost = True
        self.busy = False
        waiting = [*(one for batch in self._batches for one in batch), *self._filling][self._answered :]
        self._batches.clear()
        self._filling = []
        self._answered = 0
        return waiting

    def _end(self) -> None:
        if self.lost:
            return
        for _, waiter in self._give_up():
            if not waiter.done():
                waiter.set_exception(EngineLostError("connection to PostgreSQL lost"))
        self._owner.ended(self)

    def retire(self) -> None:
        """Take nobody any more, and end when those who wait have their answers."""
        self._call = None
        if not self.busy and not self._filling and not self.lost:
            self.detach()
            self._owner.ended(self)

    def drop(self) -> None:
        """Give the connection up, whatever it does."""
        self._end()


class Reads(Lines[SharedLine]):
    """The connections that reads by one call share: results are a page and, if it goes on, the continuation."""

    __slots__ = ("_free", "_measured", "_only", "call")

    def __init__(
        self,
        call: Call,
        make: Callable[[Session], SharedLine],
        measured: Callable[[Reads, Shared], Awaitable[Row]],
        free: Callable[[], bool],
    ) -> None:
        """`measured` runs a read on a connection of its own, to learn what it costs or because another line is due.

        `free` tells whether there is such a connection, or may be.
        """
        super().__init__(make)
        self.call = call
        self._only: SharedLine | None = None  # there is one, and there will be no other
        self._measured = measured
        self._free = free

    def fits(self, backend: Backend) -> bool:
        return super().fits(backend) and backend.has_prepared(self.call)

    def share(self, read: Shared) -> Awaitable[Row]:
        """To be awaited at once, as the pool's `call`: reads whose shape has been cheap lately share a connection."""
        if (only := self._only) is not None and only.takes(read):
            return only.add(read)
        line = self.shortest(line for line in self.all if line.takes(read))
        if line is None and not self._free():
            line = self.shortest(line for line in self.all if line.may_take(read))
        elif line is not None and line.waiting and self.due and self._free():
            line = None
        return self._measured(self, read) if line is None else line.add(read)

    def _changed(self) -> None:
        self._only = self.all[0] if len(self.all) == self._most == 1 else None

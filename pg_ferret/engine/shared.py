"""Connections for the cheap reads of many clients.

A point read takes PostgreSQL less time than it takes to wake a process up, so the reads that arrive in one turn of the
event loop go out together: one write, one transaction, one answer.  Reads of pages go out one by one, each a
transaction of its own, so that they may open cursors; what they gain is a process that stays awake.

Whoever turns out to be slow is measured on a connection of its own and stays there until it is cheap again.
While the line stands still nobody new joins it, and if it does so for long, it is given up: those who wait in it are
served elsewhere.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

import psycopg
from psycopg import pq

from pg_ferret.engine.calls import FIND, GET_MORE
from pg_ferret.engine.lines import STALL_SECONDS, Line, Lines, Owner, Shared
from pg_ferret.engine.pipeline import (
    COMMAND_OK,
    LARGE_BYTES,
    PIPELINE_ABORTED,
    PIPELINE_SYNC,
    TUPLES_OK,
    Row,
    Session,
)
from pg_ferret.engine.scheduling import work_of
from pg_ferret.engine.sqlstate import CANCELLED, UNPREPARED
from pg_ferret.errors import EngineError, EngineLostError

# Seconds: what takes no longer is cheap; a line that stands still for longer, and as much for each read, takes nobody.
CHEAP_SECONDS = 0.004
_EACH_SECONDS = 0.0005
# In a line only one that takes so many times as long is not: a busy machine makes one in a hundred wait.
_SLOW_TIMES = 2.0
# A machine that is slow, or so busy that PostgreSQL waits for a processor, makes all pages wait: one that takes no more
# than so many times the mean is cheap there, as long as it takes no more than so many seconds.
_CHEAP_TIMES = 4.0
_MOST_CHEAP_SECONDS = STALL_SECONDS / 2
# And where a page takes so much longer than it may, pages like it stay away for a while: they differ in what they cost.
_LONG_SECONDS = 0.02
_AWAY_SECONDS = 1.0
# Where pages, in the mean of so many, take PostgreSQL more of a processor's time, nobody joins others: to wake it up
# for each costs next to nothing then.  Nor where they take more time, and it runs or waits for a processor for less
# than such a part of it: it waits for a disk or a lock, and those behind it would wait with it.
LOOKED_AT = 32
_HEAVY_SECONDS = 0.001
_BUSY_PART = 1 / 3
# Pages share while they meet so many other requests, in the mean of some dozens.
_CROWD = 3.0
_OTHERS_WEIGHT = 1 / 64
_MOST_WAITING = 128
# libpq reads 16 kB at a time: behind a page of so many bytes it has hardly read the next one, which may have come.
_READ_ON_BYTES = 8192
# Shapes of reads whose cost is remembered.
_MOST_SHAPES = 10_000


class Costs:
    """Which shapes of reads have been cheap lately.  Times are the loop's."""

    __slots__ = ("_cheap", "_slow", "cheap_seconds")

    def __init__(self) -> None:
        self.cheap_seconds = CHEAP_SECONDS  # how long a read may take
        self._cheap: set[int] = set()
        self._slow: dict[int, float] = {}  # shape -> from when on one that is cheap will do

    def cheap(self, shape: int) -> bool:
        """Whether the last read of this shape was cheap; one that was never seen is not."""
        return shape in self._cheap

    def slow(self, shape: int) -> bool:
        """Whether reads of this shape are known not to be cheap."""
        return shape in self._slow

    def note(self, shape: int, seconds: float, now: float) -> None:
        """A read of this shape has taken so long."""
        if seconds > self.cheap_seconds:
            self.keep_away(shape, now)
        elif self._slow.get(shape, now) <= now:
            self._slow.pop(shape, None)
            if len(self._cheap) >= _MOST_SHAPES:
                self._cheap.clear()
            self._cheap.add(shape)

    def keep_away(self, shape: int, until: float) -> None:
        """Reads of this shape are not cheap, whatever they take until then."""
        self._cheap.discard(shape)
        if len(self._slow) >= _MOST_SHAPES:
            self._slow.clear()
        self._slow[shape] = max(until, self._slow.get(shape, until))


_Waiting = tuple[Shared, asyncio.Future[Row]]


class SharedLine(Line):
    """A connection for reads."""

    __slots__ = (
        "_answered",
        "_batches",
        "_costs",
        "_filling",
        "_heavy",
        "_late",
        "_leaving",
        "_owner",
        "_pages",
        "_read_on",
        "_scheduled",
        "_since",
        "_taken",
        "_together",
        "_work",
    )

    def __init__(
        self, conn: Session, loop: asyncio.AbstractEventLoop, costs: Costs, owner: Owner, *, together: bool
    ) -> None:
        """``together``: reads that come in one turn are one transaction, in which none may open a cursor."""
        self._costs = costs
        self._owner = owner
        self._together = together
        self._leaving = False
        self._filling: list[_Waiting] = []  # given to libpq, not yet sent
        self._batches: deque[list[_Waiting]] = deque()  # on their way, the oldest first
        self._answered = 0  # reads of the oldest batch that have their answer
        self._since = 0.0  # when the server began with the oldest batch
        self._late = 0.0  # from then on it takes too long
        self._heavy = False  # whether nobody is to wait behind others
        self._pages = 0  # since their cost was last looked at
        self._taken = 0.0  # and how long they took
        self._read_on = False  # whether libpq may have left the next page in the socket
        self._scheduled = False
        super().__init__(conn, loop)
        self._work = None if together else work_of(self.pid)  # what PostgreSQL had done then

    def takes(self, read: Shared) -> bool:
        """Whether a read may join."""
        batches = self._batches
        if self._leaving or not self._costs.cheap(read.shape) or len(self._filling) + len(batches) >= _MOST_WAITING:
            return False
        return not batches or (not self._heavy and self._loop.time() <= self._late)

    def may_take(self, read: Shared) -> bool:
        """Whether a read may join if there is no other way, though we are late: one that is cheap, or may be.

        An aggregation, a count or a distinct of which nothing is known may take any time: it waits for a connection.
        """
        full = len(self._filling) + len(self._batches) >= _MOST_WAITING
        if self._leaving or full:
            return False
        costs, shape = self._costs, read.shape
        return costs.cheap(shape) or (read.call in (FIND, GET_MORE) and not costs.slow(shape))

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
            if call.name not in self._prepared:
                self._prepare(call)
            self._pg.send_query_prepared(call.name, params, call.formats, 1)
        except psycopg.Error:
            self._end()
        if not self._together:
            self._send()
        elif not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._send)
        return waiter

    def _send(self) -> None:
        """At the end of the loop's turn, if reads go together: all that have come in it."""
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
        self._late = now + self._costs.cheap_seconds + len(batch) * _EACH_SECONDS

    def _take(self, result: pq.abc.PGresult) -> None:
        status = result.status
        if status == TUPLES_OK:
            get = result.get_value
            read, waiter = self._batches[0][self._answered]
            self._answered += 1
            page, following = get(0, 0), get(0, 1)
            row: Row = (page, following)
            size = 0 if page is None else len(page)
            self._read_on = size >= _READ_ON_BYTES
            if size > LARGE_BYTES:
                self.swollen = True
                self._costs.keep_away(read.shape, self._loop.time())
            if following is not None and read.call is not GET_MORE:  # it has opened a cursor
                if self._together:
                    # Behind others in a batch the engine keeps the cursor no longer than the batch lasts.
                    self._costs.keep_away(read.shape, self._loop.time())
                    self._elsewhere(read, waiter)
                    return
                row = (page, following, get(0, 2))
            if waiter.done():
                self._owner.unclaimed(read.call, row)
            else:
                waiter.set_result(row)
        elif status == PIPELINE_SYNC:
            self._finish(self._batches.popleft())
            if self._read_on and self.busy and self._pg.is_busy():
                self._pg.consume_input()
        elif status == COMMAND_OK:
            self._prepared.add(self._preparing.pop(0))
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
        if self._preparing[:1] == [read.call.name]:
            self._leaving = True  # it is the statement that has failed: reads behind this one will not find it
            self._preparing.pop(0)
        sqlstate = error.sqlstate if isinstance(error, EngineError) else ""
        if sqlstate != UNPREPARED:  # whoever sends such reads again is not to hold others up
            self._costs.keep_away(read.shape, self._loop.time())
        if sqlstate in (UNPREPARED, CANCELLED):
            self._elsewhere(read, waiter)
        elif not waiter.done():
            waiter.set_exception(error)

    def _finish(self, batch: list[_Waiting]) -> None:
        """The server has done with a batch."""
        now = self._loop.time()
        seconds = (now - self._since) / len(batch)
        if not self._together:
            self._taken += seconds
            self._pages += 1
            if self._pages == LOOKED_AT:
                self._judge()
            if now - self._late > _LONG_SECONDS:
                self._costs.keep_away(batch[0][0].shape, now + _AWAY_SECONDS)
        if self._batches:
            self._begin(now, self._batches[0])
        else:
            self.busy = False
        if seconds > _SLOW_TIMES * self._costs.cheap_seconds:
            for read, _ in batch:  # one of them is to blame: each has to show anew what it costs
                self._costs.keep_away(read.shape, now)
        if self._answered < len(batch):
            for waiting in batch[self._answered :]:
                self._elsewhere(*waiting)
        self._answered = 0
        if self._leaving:
            self.retire()

    def _judge(self) -> None:
        """Now and then, by what the last pages have cost: may others wait behind them, and how long is late?"""
        mean = self._taken / LOOKED_AT
        self._pages = 0
        self._taken = 0.0
        before, now = self._work, work_of(self.pid)
        self._work = now
        heavy = mean > _HEAVY_SECONDS
        if before is not None and now is not None:
            ran = (now.ran - before.ran) / LOOKED_AT
            waited = (now.waited - before.waited) / LOOKED_AT
            heavy = ran > _HEAVY_SECONDS or (heavy and ran + waited < _BUSY_PART * mean)
        self._heavy = heavy
        late = CHEAP_SECONDS if heavy else _CHEAP_TIMES * mean
        self._costs.cheap_seconds = min(max(CHEAP_SECONDS, late), _MOST_CHEAP_SECONDS)

    def _progress(self) -> object:
        return self._since, self._answered

    def _stands_still(self) -> None:
        waiting = self._give_up()
        first, _ = waiting[0]
        self._costs.keep_away(first.shape, self._loop.time())
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
        self._leaving = True
        if not self.busy and not self._filling and not self.lost:
            self.detach()
            self._owner.ended(self)

    def drop(self) -> None:
        """Give the connection up, whatever it does."""
        self._end()


class Reads(Lines[SharedLine]):
    """The connections that reads share: results are a document and, of a page that goes on, its cursor."""

    __slots__ = ("_free", "_measured", "_only", "_others", "costs")

    def __init__(
        self,
        make: Callable[[Session], SharedLine],
        costs: Costs,
        measured: Callable[[Reads, Shared], Awaitable[Row]],
        free: Callable[[], bool],
    ) -> None:
        """`measured` runs a read on a connection of its own, to learn what it costs or because another line is due.

        `free` tells whether there is such a connection, or may be.
        """
        super().__init__(make)
        self.costs = costs
        self._only: SharedLine | None = None  # there is one, and there will be no other
        self._measured = measured
        self._free = free
        self._others = 0.0  # how many other requests a page has met lately

    def crowded(self, others: int) -> bool:
        """To be asked for every page that may `share`: whether it had better, with so many other requests under way.

        Few of them do better side by side.
        """
        self._others += (others - self._others) * _OTHERS_WEIGHT
        return self._others >= _CROWD

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

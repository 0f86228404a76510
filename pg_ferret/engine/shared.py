"""Connections for the cheap reads of many clients: which read shares one, and what all of them have in common.

Point reads (points.py) and reads of pages (pages.py) do so in different ways.

Whoever turns out to be slow is measured on a connection of its own and stays there until it is cheap again.
While the line stands still nobody new joins it, and if it does so for long, it is given up: those who wait in it are
served elsewhere.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Awaitable, Callable
from functools import partial
from typing import ClassVar, Final

from psycopg import pq

from pg_ferret.engine.calls import FIND, FIND_AS_EVER, GET_MORE
from pg_ferret.engine.costs import Costs
from pg_ferret.engine.crowd import Crowd
from pg_ferret.engine.lines import Line, Lines, Owner, Shared
from pg_ferret.engine.pipeline import Row, Session
from pg_ferret.engine.sqlstate import CANCELLED, UNPREPARED
from pg_ferret.errors import EngineError, EngineLostError
from pg_ferret.runner import Turn, Waiter

# Seconds: a line that stands still for longer than a cheap read, and as much for each that waits, takes nobody.
_EACH_SECONDS: Final = 0.0005
# In a line only one that takes so many times as long is slow: a busy machine makes one in a hundred wait.
SLOW_TIMES: Final = 2.0
# Pages share from so many other requests on that they meet in the mean, until there are so few, which do better side by
# side.
_CROWD: Final = 3.0
_NO_CROWD: Final = 2.5

# libpq reads 16 kB at a time: behind an answer of so many bytes it has hardly read the next one, which may have come.
READ_ON_BYTES: Final = 8192

Waiting = tuple[Shared, Waiter[Row]]


class ReadLine(Line):
    """A connection for reads."""

    # What has held a line up stays away for so long, and so does what is like it, even if one of them is cheap.
    _AWAY_SECONDS: ClassVar[float]
    __slots__ = ("_answered", "_costs", "_late", "_leaving", "_owner", "_read_on")

    def __init__(self, conn: Session, turn: Turn, costs: Costs, owner: Owner) -> None:
        self._costs = costs
        self._owner = owner
        self._leaving = False
        self._answered = 0  # reads that have their answer, of those that the server is at
        self._late = 0.0  # from then on it takes too long
        self._read_on = False  # the last answer was large: libpq may have left the next one in the socket
        super().__init__(conn, turn)

    @abstractmethod
    def takes(self, read: Shared) -> bool:
        """Whether a read may join."""

    @abstractmethod
    def add(self, read: Shared) -> Waiter[Row]:
        """The future gets the first row of the result; it raises EngineError or EngineLostError."""

    @property
    @abstractmethod
    def full(self) -> bool:
        """Whether nobody may join."""

    @abstractmethod
    def _refused(self) -> tuple[bytes, list[Waiting]]:
        """The statement that the server is at, and those whom it was to answer: they have an answer from now on."""

    @abstractmethod
    def _clear(self) -> list[Waiting]:
        """Those without an answer, the first one first; they wait here no more."""

    def may_take(self, read: Shared) -> bool:
        """Whether a read may join if there is no other way, though we are late: one that is cheap, or may be.

        An aggregation, a count or a distinct of which nothing is known may take any time: it waits for a connection.
        """
        if self._leaving or self.full:
            return False
        costs, shape = self._costs, read.shape
        return shape in costs.cheap or (read.call in (FIND, FIND_AS_EVER, GET_MORE) and not costs.slow(shape))

    def _begin(self, now: float, count: int) -> None:
        """The server begins with so many."""
        self.since = now
        self._late = now + self._costs.late_seconds + count * _EACH_SECONDS

    def _fail(self, result: pq.abc.PGresult) -> None:
        """A statement is refused."""
        error = self._error_of(result)
        if isinstance(error, EngineLostError):
            self._end()
            return
        name, refused = self._refused()
        if not refused:
            return  # it is the end of the transaction that has failed, and nothing was written in it
        if self._preparing[:1] == [name]:
            self._leaving = True  # it is the statement that has failed: reads behind this one will not find it
            self._preparing.pop(0)
        sqlstate = error.sqlstate if isinstance(error, EngineError) else ""
        if len(refused) > 1:  # nobody knows which of them it was
            for read, waiter in refused:
                waiter.then(partial(self._made_again, read))
                self._elsewhere(read, waiter)
            return
        ((read, waiter),) = refused
        if sqlstate != UNPREPARED:
            self._keep_away(read)
        if sqlstate in (UNPREPARED, CANCELLED):
            self._elsewhere(read, waiter)
        elif not waiter.done():
            waiter.set_exception(error)

    def _made_again(self, read: Shared, waiter: Waiter[Row]) -> None:
        """One of several that were refused together has been made by itself."""
        if not waiter.cancelled() and isinstance(waiter.exception(), EngineError):
            self._keep_away(read)

    def _keep_away(self, read: Shared) -> None:
        """Whoever sends such reads again is not to hold others up."""
        self._costs.keep_away(read.shape, self._loop.time())

    def _read_more(self) -> None:
        """Behind a large answer: what has come of the next one."""
        if self.busy and self._pg.is_busy():
            self._pg.consume_input()

    def _progress(self) -> object:
        return self.since, self._answered

    def _stands_still(self) -> None:
        waiting = self._give_up()
        first, _ = waiting[0]
        self._costs.keep_away(first.shape, self._loop.time() + self._AWAY_SECONDS)
        self._owner.stalled(self, first)
        for one in waiting:
            self._elsewhere(*one)

    def _elsewhere(self, read: Shared, waiter: Waiter[Row]) -> None:
        if not waiter.done():
            self._owner.elsewhere(read, waiter)

    def _give_up(self) -> list[Waiting]:
        """Serve no more; those who have no answer yet, the first one first."""
        self.detach()
        self.lost = True
        self.busy = False
        waiting = self._clear()
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
        self._leaving = True
        if not self.busy and not self.waiting and not self.lost:
            self.detach()
            self._owner.ended(self)

    def drop(self) -> None:
        self._end()


class Reads(Lines[ReadLine]):
    """The connections that reads share: results are a document and, of a page that goes on, its cursor."""

    __slots__ = ("_free", "_measured", "_only", "costs", "crowded")

    def __init__(
        self,
        make: Callable[[Session], ReadLine],
        costs: Costs,
        measured: Callable[[Reads, Shared], Awaitable[Row]],
        free: Callable[[], bool],
    ) -> None:
        """`measured` runs a read on a connection of its own, to learn what it costs or because another line is due.

        `free` tells whether there is such a connection, or may be.
        """
        super().__init__(make)
        self.costs = costs
        self._only: ReadLine | None = None  # there is one, and there will be no other
        self._measured = measured
        self._free = free
        # To be asked once for every page that may `share`, with the number of other requests: whether it had better.
        # A method here would be one call more for each.
        self.crowded = Crowd(_CROWD, _NO_CROWD).meets

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
        self._only = self.all[0] if len(self.all) == self.most == 1 else None

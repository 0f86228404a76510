"""One flush for the commits of many writes.

A connection that commits waits for the disk.  While several requests are under way, writes commit without that wait
(extension/commit.c) and their connections serve the next request at once.  One connection flushes what has been
committed, again as soon as it is done if there is more, and only then are the writes' results told: nothing is
acknowledged before it is as durable as synchronous_commit demands.

A flush waits for a moment while more writes are about to be committed than it would serve: whoever is told later sends
its next request later, too, and fewer, larger groups cost PostgreSQL and the worker less.

Where another process of PostgreSQL's would only take the processor from the one that makes the writes, that one flushes
what it has committed itself, when it has nothing else to do or many wait for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple

from pg_ferret.engine.backend import Backend
from pg_ferret.engine.calls import FLUSH_COMMITS, Call
from pg_ferret.engine.pipeline import Params, Row
from pg_ferret.errors import EngineError, EngineLostError
from pg_ferret.runner import Waiter

# crash_shutdown, extension/commit.c: the server that committed them is no more.
_RESTARTED: Final = "57P02"
# Seconds a flush waits at most for writes to be committed.
_HELD_SECONDS: Final = 0.002
# For so many a flush in line waits no longer, though it then stands behind all that have been sent.
_MOST_HELD: Final = 16


class Committed(NamedTuple):
    """Writes that are committed and perhaps not on disk yet."""

    incarnation: bytes  # of the server that committed them, 8 bytes: none other can flush them
    writes: list[tuple[Waiter[Row], Row]]  # who waits for which result

    def tell(self, error: Callable[[], Exception] | None) -> None:
        """They are on disk, or nobody knows."""
        for waiter, row in self.writes:
            if waiter.done():
                continue
            if error is None:
                waiter.set_result(row)
            else:
                waiter.set_exception(error())


def unknown(error: BaseException | None) -> Callable[[], Exception]:
    """What to tell when writes could not be flushed: whether they have been made, nobody knows.

    No other error would be true, and least of all one that a client may answer by making them again.
    """
    if isinstance(error, EngineError) and error.sqlstate == _RESTARTED:
        return partial(EngineError, error.sqlstate, error.message)
    return partial(EngineLostError, "the connection to PostgreSQL was lost")


class Commits:
    """What has been committed without a flush, and the connection that flushes it, if there is one."""

    __slots__ = (
        "_coming",
        "_elsewhere",
        "_flushes",
        "_in_line",
        "_loop",
        "_next",
        "_scheduled",
        "_timer",
        "apart",
        "backend",
        "flushing",
        "pending",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        elsewhere: Callable[[Committed], None],
        coming: Callable[[], int],
        in_line: Callable[[Call, Params], Waiter[Row] | None],
        flushes: Callable[[], None],
    ) -> None:
        """`elsewhere` has writes flushed by any other connection; `coming` tells how many are about to be committed.

        `in_line` makes a call where writes stand in line, if there is such a connection; `flushes` hears of each flush.
        """
        self._loop = loop
        self._elsewhere = elsewhere
        self._in_line = in_line
        self._coming = coming
        self._flushes = flushes
        self._timer: asyncio.TimerHandle | None = None  # there while a flush waits for them
        self._next: Committed | None = None
        self._scheduled = False
        self.flushing = False
        self.pending = 0  # writes that wait for a flush
        self.apart = False  # a connection of their own flushes, not the line of writes
        self.backend: Backend | None = None  # it does nothing else

    def fits(self, backend: Backend) -> bool:
        """Whether a connection may become the one that flushes."""
        return not backend.swollen

    def add(self, waiter: Waiter[Row], row: Row) -> None:
        """A write has been committed; the last column of its result is the server's incarnation."""
        incarnation = row[-1]
        assert incarnation is not None
        following = self._next
        if following is None or following.incarnation != incarnation:
            if following is not None:  # the server has been restarted
                self._pass_on(following)
            following = self._next = Committed(incarnation, [])
        following.writes.append((waiter, row))
        self.pending += 1
        if not self.flushing and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """At the end of the loop's turn: all that has been committed, unless more than that is about to be."""
        self._scheduled = False
        following = self._next
        if following is None or self.flushing:
            return
        if self._enough(len(following.writes)):
            self._flush_now()
        elif self._timer is None:
            self._timer = self._loop.call_later(_HELD_SECONDS, self._flush_now)

    def _enough(self, writes: int) -> bool:
        """Whether a flush of so many writes need not wait for others."""
        if self.apart:
            return self.backend is None or writes >= self._coming()
        return writes >= _MOST_HELD or not self._coming()

    def _flush_now(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        committed, self._next = self._next, None
        if committed is None:
            return
        self._flushes()
        flush = self._ask((committed.incarnation,))
        if flush is None:
            self._pass_on(committed)
            return
        self.flushing = True
        flush.then(partial(self._flushed, committed))

    def _ask(self, params: Params) -> Waiter[Row] | None:
        """Ask for a flush; None if nobody is there to ask."""
        backend = self.backend
        if backend is not None and not backend.lost:
            return backend.execute(FLUSH_COMMITS, params)
        return None if self.apart else self._in_line(FLUSH_COMMITS, params)

    def _flushed(self, committed: Committed, flush: Waiter[Row]) -> None:
        self.flushing = False
        error = flush.exception()
        if error is None or (isinstance(error, EngineError) and error.sqlstate == _RESTARTED):
            self.pending -= len(committed.writes)
            committed.tell(None if error is None else unknown(error))
        else:
            self._pass_on(committed)
        self._flush()

    def _pass_on(self, committed: Committed) -> None:
        self.pending -= len(committed.writes)
        self._elsewhere(committed)

"""A connection for the pages of many clients.

They go out one by one, each a transaction of its own, so that they may open cursors; what they gain is a process of
PostgreSQL that stays awake.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from typing import Final

import psycopg
from psycopg import pq

from pg_ferret.engine.calls import GET_MORE
from pg_ferret.engine.costs import CHEAP_SECONDS, Costs
from pg_ferret.engine.lines import STALL_SECONDS, Owner, Shared
from pg_ferret.engine.pipeline import (
    COMMAND_OK,
    LARGE_BYTES,
    PIPELINE_ABORTED,
    PIPELINE_SYNC,
    TUPLES_OK,
    Row,
    Session,
)
from pg_ferret.engine.scheduling import Account
from pg_ferret.engine.shared import READ_ON_BYTES, SLOW_TIMES, ReadLine, Waiting
from pg_ferret.runner import Turn, Waiter

_MOST_WAITING: Final = 128
# A machine that is slow, or so busy that PostgreSQL waits for a processor, makes all pages wait: one that takes no more
# than so many times the mean is cheap there, as long as it takes no more than so many seconds.
_CHEAP_TIMES: Final = 4.0
_MOST_CHEAP_SECONDS: Final = STALL_SECONDS / 2
# And where a page takes PostgreSQL so much longer than it may, pages like it stay away for a while: they differ in what
# they cost.
_LONG_SECONDS: Final = 0.02
# Where pages, in the mean of so many, take PostgreSQL more of a processor's time, nobody joins others: to wake it up
# for each costs next to nothing then.  Nor where they take it more time, and it runs or waits for a processor for less
# than such a part of that: it waits for a disk or a lock, and those behind it would wait with it.
LOOKED_AT: Final = 32
_HEAVY_SECONDS: Final = 0.001
_BUSY_PART: Final = 1 / 3
# Whoever else waits for the processor goes first (limits.py) while so many pages are under way and the last one was
# large: more of them are there then, and the worker is woken half as often.
_MANY: Final = 5


class PageLine(ReadLine):
    """The connection: a queue of pages."""

    _AWAY_SECONDS = 1.0
    __slots__ = ("_account", "_dry", "_gives_way", "_heavy", "_judged", "_pages", "_queue", "_taken")

    def __init__(self, conn: Session, turn: Turn, costs: Costs, owner: Owner, gives_way: Callable[[], bool]) -> None:
        """`gives_way` tells whether other processes may go first."""
        self._gives_way = gives_way
        self._queue: deque[Waiting] = deque()  # the server is at the first one
        self._heavy = False  # whether nobody is to wait behind others
        self._pages = 0  # since their cost was last looked at
        self._taken = 0.0  # and how long they took
        self._dry = 0  # and before how many of them nobody was there
        self._judged = turn.loop.time()
        super().__init__(conn, turn, costs, owner)
        self._account = Account(self.pid)  # since then

    def takes(self, read: Shared) -> bool:
        queue = self._queue
        if self._leaving or read.shape not in self._costs.cheap or len(queue) >= _MOST_WAITING:
            return False
        return not queue or (not self._heavy and self._loop.time() <= self._late)

    @property
    def full(self) -> bool:
        return len(self._queue) >= _MOST_WAITING

    @property
    def waiting(self) -> int:
        return len(self._queue) - self._answered

    def add(self, read: Shared) -> Waiter[Row]:
        waiter: Waiter[Row] = Waiter(self._turn)
        if not self._queue:
            self._begin(self._loop.time(), 1)
            self._dry += 1
            self._starts()
        self._queue.append((read, waiter))
        try:
            self._add_call(read.call, read.params)
            self._sync()
        except psycopg.Error:
            self._end()
        return waiter

    def _readable(self) -> None:
        if self._read_on and len(self._queue) >= _MANY and self._gives_way():
            self._read_on = False  # once for each page, in however many parts it comes
            os.sched_yield()
        super()._readable()

    def _take(self, result: pq.abc.PGresult, status: int) -> None:
        if status == TUPLES_OK:
            get = result.get_value
            read, waiter = self._queue[0]
            self._answered = 1
            page, following = get(0, 0), get(0, 1)
            size = 0 if page is None else len(page)
            self._read_on = size >= READ_ON_BYTES
            if size > LARGE_BYTES:
                self.swollen = True
                self._keep_away(read)
            # One that opens a cursor brings its id, too.
            opened = following is not None and read.call is not GET_MORE
            row: Row = (page, following, get(0, 2)) if opened else (page, following)
            if waiter.done():
                self._owner.unclaimed(read.call, row)
            else:
                waiter.set_result(row)
        elif status == PIPELINE_SYNC:
            self._finish()
            if self._read_on:
                self._read_more()
        elif status == COMMAND_OK:
            self._prepared.add(self._preparing.pop(0))
        elif status != PIPELINE_ABORTED:
            self._fail(result)

    def _refused(self) -> tuple[bytes, list[Waiting]]:
        refused = [] if self._answered else [self._queue[0]]
        self._answered = 1
        return self._queue[0][0].call.name, refused

    def _finish(self) -> None:
        """The server has done with the first one."""
        read, _ = self._queue.popleft()
        now = self._loop.time()
        seconds = now - self.since
        if seconds > SLOW_TIMES * self._costs.cheap_seconds or now - self._late > _LONG_SECONDS:
            self._blame(read, now)
        self._taken += seconds
        self._pages += 1
        if self._pages == LOOKED_AT:
            self._judge()
        if self._queue:
            self._begin(now, 1)
        else:
            self.busy = False
        self._answered = 0
        if self._leaving:
            self.retire()

    def _blame(self, read: Shared, now: float) -> None:
        """A page was late: did PostgreSQL take so long for it?"""
        taken = now - self.since
        seconds = taken - self._costs.lag.seconds
        if (done := self._account.done()) is not None:
            # The other pages of the account cannot have run for longer than they took; any of them may have waited.
            waited = done.waited * taken / (self._taken + taken)
            waited += done.ours_waited * taken / max(now - self._judged, taken)
            seconds = max(done.ran - self._taken, seconds - waited)
        if seconds > self._late - self.since + _LONG_SECONDS:
            self._costs.keep_away(read.shape, now + self._AWAY_SECONDS)
        elif seconds > SLOW_TIMES * self._costs.cheap_seconds:
            self._costs.keep_away(read.shape, now)

    def _judge(self) -> None:
        """Now and then, by what the last pages have cost: may others wait behind them, and how long is late?"""
        self._costs.lag.look()
        now = self._loop.time()
        mean = self._taken / LOOKED_AT
        # While others wait behind it, nobody is late for a page: PostgreSQL goes on.
        theirs = mean - self._costs.lag.seconds * self._dry / LOOKED_AT
        heavy = theirs > _HEAVY_SECONDS
        if (done := self._account.done(anew=True)) is not None:
            ran, waited = done.ran / LOOKED_AT, done.waited / LOOKED_AT
            theirs -= done.ours_waited * mean / max(now - self._judged, self._taken)
            heavy = ran > _HEAVY_SECONDS or (theirs > _HEAVY_SECONDS and ran + waited < _BUSY_PART * theirs)
        self._pages = self._dry = 0
        self._taken = 0.0
        self._judged = now
        self._heavy = heavy
        self._costs.cheap_seconds = CHEAP_SECONDS if heavy else _limit(theirs)
        self._costs.late_seconds = CHEAP_SECONDS if heavy else _limit(mean)

    def _clear(self) -> list[Waiting]:
        waiting = list(self._queue)[self._answered :]
        self._queue.clear()
        return waiting


def _limit(mean: float) -> float:
    """What is cheap, or not yet late, where pages take so many seconds in the mean."""
    return min(max(CHEAP_SECONDS, _CHEAP_TIMES * mean), _MOST_CHEAP_SECONDS)

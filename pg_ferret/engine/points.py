"""A connection for the point reads of many clients.

One takes PostgreSQL less time than it takes to wake a process up, and hardly more than to begin and end a statement, so
the reads that arrive in one turn of the event loop go out together: one write, one transaction, few statements, one
answer.
"""

from __future__ import annotations

from collections import deque
from typing import ClassVar, Final

import psycopg
from psycopg import pq

from pg_ferret.engine.calls import BYTEA_OID, FIND, FIND_MANY, TEXT_OID, array
from pg_ferret.engine.costs import Costs
from pg_ferret.engine.lines import Owner, Shared
from pg_ferret.engine.pipeline import (
    COMMAND_OK,
    LARGE_BYTES,
    PIPELINE_ABORTED,
    PIPELINE_SYNC,
    TUPLES_OK,
    Row,
    Session,
)
from pg_ferret.engine.shared import READ_ON_BYTES, SLOW_TIMES, ReadLine, Waiting
from pg_ferret.runner import Turn, Waiter

# Reads that may come in one turn, with the batches before.
_MOST_WAITING: Final = 512
# Those of one statement at most: libpq keeps its answer until all of it has come.
_AT_ONCE: Final = 16


class PointLine(ReadLine):
    """The connection: what it is given in one turn of the loop, FIND only, is a batch; none may open a cursor."""

    # They hardly differ in what they cost: it was PostgreSQL's process that stood still.
    _AWAY_SECONDS = 0.0
    # From so many on they are statements for several; arrays are more work than two statements.
    _FEWEST: ClassVar[int] = 3
    __slots__ = ("_batches", "_filling", "_scheduled")

    def __init__(self, conn: Session, turn: Turn, costs: Costs, owner: Owner) -> None:
        self._filling: list[Waiting] = []  # not yet sent
        self._batches: deque[list[Waiting]] = deque()  # on their way, the oldest first
        self._scheduled = False
        super().__init__(conn, turn, costs, owner)

    def takes(self, read: Shared) -> bool:
        batches = self._batches
        if self._leaving or read.shape not in self._costs.cheap or len(self._filling) + len(batches) >= _MOST_WAITING:
            return False
        return not batches or self._loop.time() <= self._late

    @property
    def full(self) -> bool:
        return len(self._filling) + len(self._batches) >= _MOST_WAITING

    @property
    def waiting(self) -> int:
        return len(self._filling) + sum(map(len, self._batches)) - self._answered

    def add(self, read: Shared) -> Waiter[Row]:
        waiter: Waiter[Row] = Waiter(self._turn)
        self._filling.append((read, waiter))
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._send)
        return waiter

    def _send(self) -> None:
        """At the end of the loop's turn: all that have come in it."""
        self._scheduled = False
        batch = self._filling
        if not batch:
            return
        if not self._batches:
            self._begin(self._loop.time(), len(batch))
            self._starts()
        self._batches.append(batch)
        self._filling = []
        try:
            if len(batch) < self._FEWEST:
                for read, _ in batch:
                    self._add_call(FIND, read.params)
            else:
                self._ask(batch)
            self._sync()
        except psycopg.Error:
            self._end()

    def _ask(self, batch: list[Waiting]) -> None:
        """Statements for several each; raises psycopg.Error."""
        for first in range(0, len(batch), _AT_ONCE):
            dbs, specs = zip(*[read.params for read, _ in batch[first : first + _AT_ONCE]], strict=True)
            self._add_call(FIND_MANY, (array(TEXT_OID, dbs), array(BYTEA_OID, specs)))

    def _take(self, result: pq.abc.PGresult, status: int) -> None:
        if status == TUPLES_OK:
            self._read_on = False
            for number in range(result.ntuples):
                self._answer(result, number)
        elif status == PIPELINE_SYNC:
            self._finish(self._batches.popleft())
            if self._read_on:
                self._read_more()
        elif status == COMMAND_OK:
            self._prepared.add(self._preparing.pop(0))
        elif status != PIPELINE_ABORTED:
            self._fail(result)  # and those behind it in the batch are answered elsewhere

    def _answer(self, result: pq.abc.PGresult, number: int) -> None:
        """The next one has its answer: this row of the result."""
        read, waiter = self._batches[0][self._answered]
        self._answered += 1
        get = result.get_value
        page, following = get(number, 0), get(number, 1)
        size = 0 if page is None else len(page)
        if size >= READ_ON_BYTES:
            self._read_on = True
        if size > LARGE_BYTES:
            self.swollen = True
            self._keep_away(read)
        if following is not None:
            # It has opened a cursor, which ends with the transaction unless this is its first statement.
            self._owner.unclaimed(FIND, (page, following, get(number, 2)))
            self._keep_away(read)
            self._elsewhere(read, waiter)
        elif not waiter.done():
            waiter.set_result((page, None))

    def _refused(self) -> tuple[bytes, list[Waiting]]:
        batch, first = self._batches[0], self._answered
        call, served = (FIND, 1) if len(batch) < self._FEWEST else (FIND_MANY, _AT_ONCE)
        refused = batch[first : first + served]
        self._answered += len(refused)
        return call.name, refused

    def _finish(self, batch: list[Waiting]) -> None:
        """The server has done with a batch."""
        now = self._loop.time()
        seconds = (now - self.since) / len(batch)
        if self._batches:
            self._begin(now, len(self._batches[0]))
        else:
            self.busy = False
        if seconds > SLOW_TIMES * self._costs.cheap_seconds:
            for read, _ in batch:  # one of them is to blame: each has to show anew what it costs
                self._costs.keep_away(read.shape, now)
        if self._answered < len(batch):
            for waiting in batch[self._answered :]:
                self._elsewhere(*waiting)
        self._answered = 0
        if self._leaving:
            self.retire()

    def _clear(self) -> list[Waiting]:
        waiting = [*(one for batch in self._batches for one in batch), *self._filling][self._answered :]
        self._batches.clear()
        self._filling = []
        return waiting

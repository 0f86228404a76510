"""A connection to PostgreSQL that one request at a time uses.  The pool (pool.py) owns its life."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import NamedTuple, cast

import psycopg
from psycopg import pq

from pg_ferret.engine.calls import STATEMENT_TIMEOUT, Call
from pg_ferret.engine.pipeline import (
    COMMAND_OK,
    LARGE_BYTES,
    PIPELINE_ABORTED,
    PIPELINE_SYNC,
    TUPLES_OK,
    Params,
    Pipeline,
    Row,
    Session,
)
from pg_ferret.errors import EngineError, EngineLostError
from pg_ferret.runner import Turn, Waiter

_CANCEL_SECONDS = 5.0


class Lender(NamedTuple):
    """What the pool does for a connection that it has leased."""

    released: Callable[[Backend], None]  # a call is over
    ended: Callable[[Backend], None]  # the server has closed the connection; called once
    committed: Callable[[Waiter[Row], Row], None]  # who waits, and the result of a write committed unflushed
    unclaimed: Callable[[Call, Row], None]  # a result for which nobody waits any more


class Backend(Pipeline):
    """A leased connection.  `execute` is the hot path; everything else is life and death."""

    __slots__ = (
        "_call",
        "_committed",
        "_ended",
        "_error",
        "_row",
        "_unclaimed",
        "_waiter",
        "held",
        "released",
    )

    def __init__(self, conn: Session, turn: Turn, lender: Lender) -> None:
        self.released = lender.released
        self._ended = lender.ended
        self._committed = lender.committed
        self._unclaimed = lender.unclaimed
        self._call: Call | None = None  # the one that is under way, or was the last
        self.held = False  # a cancel request is on its way: nobody else may have the connection before it has arrived
        self._row: Row | None = None
        self._error: Exception | None = None
        self._waiter: Waiter[Row] | None = None
        super().__init__(conn, turn)

    def execute(
        self,
        call: Call,
        params: Params,
        timeout_ms: bytes | None = None,
        waiter: Waiter[Row] | None = None,
    ) -> Waiter[Row]:
        """Send one call, bounded by ``timeout_ms`` if given; the future (a new one by default) gets the first row.

        The future raises EngineError when PostgreSQL refuses, EngineLostError when the connection ends.
        """
        if waiter is None:
            waiter = Waiter(self._turn)
        self._waiter = waiter
        self._call = call
        if self.lost:
            self._fail()
            return waiter
        self.busy = True
        try:
            if timeout_ms is not None:
                self._add_call(STATEMENT_TIMEOUT, (timeout_ms,))
            self._add_call(call, params)
            self._sync()
        except psycopg.Error:
            self._end()
        return waiter

    def _take(self, result: pq.abc.PGresult, status: int) -> None:
        if status == TUPLES_OK:
            if not result.ntuples:
                self._row = ()
                return
            get = result.get_value
            first = get(0, 0)
            if first is not None and len(first) > LARGE_BYTES:
                self.swollen = True
            columns = result.nfields
            # The hot paths, spelled out: getMore has two columns, writes and first pages three.
            if columns == 2:
                self._row = (first, get(0, 1))
            elif columns == 3:
                self._row = (first, get(0, 1), get(0, 2))
            else:
                self._row = (first, *[get(0, column) for column in range(1, columns)])
        elif status == PIPELINE_SYNC:
            self.busy = False
            self._finish()
        elif status == COMMAND_OK:
            if self._preparing:
                self._prepared.add(self._preparing.pop(0))
            else:
                self._row = ()
        elif status != PIPELINE_ABORTED:
            self._error = self._error_of(result)
            if isinstance(self._error, EngineLostError):
                # Do not wait for the end of the stream: when the server has left something unread, the kernel reports
                # an error together with these last words, and libuv watches no longer.
                self._end()

    def _finish(self) -> None:
        waiter, self._waiter = self._waiter, None
        row, self._row = self._row, None
        error, self._error = self._error, None
        call = self._call  # before somebody else is given the connection
        if self._preparing:  # what an error kept from being prepared
            self._preparing.clear()
        if not self.lost and not self.held:
            self.released(self)
        if waiter is None or waiter.done():
            if row and call is not None:
                self._unclaimed(call, row)
            return
        if error is not None:
            waiter.set_exception(error)
        elif row is None:
            waiter.set_result(())
        elif call is not None and call.writes and row[-1] is not None and not self.held:
            self._committed(waiter, row)  # a cancelled one has no client
        else:
            waiter.set_result(row)

    def _end(self) -> None:
        if not self.lost:
            self.drop()
            self._ended(self)

    def _fail(self) -> None:
        """End the call at hand, if there is one, with the loss of the connection."""
        if self._error is None:
            text = self._pg.error_message.decode("utf-8", "replace").strip() or "connection to PostgreSQL lost"
            self._error = EngineLostError(text)
        elif isinstance(self._error, EngineError):
            self._error = EngineLostError(self._error.message)
        self._finish()

    def drop(self) -> None:
        """Give the connection up, whatever it does: who waits for it is told that it is lost."""
        if not self.lost:
            self.detach()
            self.lost = True
            self.busy = False
            self._fail()

    @property
    def abandoned(self) -> bool:
        """Whether a call is under way for which nobody waits any more."""
        return self._waiter is not None and self._waiter.cancelled()

    def abandon(self) -> None:
        """The connection comes with calls under way, for which nobody waits here; it is to be cancelled and closed."""
        self._waiter = Waiter(self._turn)
        self._waiter.cancel()
        self.busy = True
        self.held = True
        self.spent = True

    async def cancel(self) -> bool:
        """Ask the server to stop the running call; tells whether the call has ended within the time.

        The connection is not released before the request has arrived: it would hit the next call.
        """
        self.held = True
        if self._waiter is None or self.lost:  # it has ended since
            self.held = False
            if not self.lost:
                self.released(self)
            return True
        self._waiter = ended = Waiter[Row](self._turn)  # the caller has given up
        with contextlib.suppress(psycopg.Error):  # it is the call's end that counts
            await self._conn.cancel_safe(timeout=_CANCEL_SECONDS)
        await asyncio.wait([cast(asyncio.Future[Row], ended)], timeout=_CANCEL_SECONDS)
        self.held = False
        if ended.done():
            if ended.exception() is None and self._call is not None:
                self._unclaimed(self._call, ended.result())
            if not self.lost:
                self.released(self)
        return ended.done()

"""One PostgreSQL connection on the event loop, driven through psycopg's libpq wrapper.

The connection stays in pipeline mode: a batch is [Parse,] Bind, Execute … Sync, sent in one write and answered in
one read.  One permanent reader serves it.  The pool (pool.py) owns its life; one request at a time uses it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import psycopg
from psycopg import pq
from psycopg.rows import TupleRow

from pg_ferret.engine.calls import STATEMENT_TIMEOUT, Call
from pg_ferret.errors import EngineError, EngineLostError

Params = Sequence[bytes | bytearray | memoryview | None]
Row = tuple[bytes | None, ...]

# As plain numbers, which compare faster than enums.
_TUPLES_OK = int(pq.ExecStatus.TUPLES_OK)
_COMMAND_OK = int(pq.ExecStatus.COMMAND_OK)
_PIPELINE_SYNC = int(pq.ExecStatus.PIPELINE_SYNC)
_PIPELINE_ABORTED = int(pq.ExecStatus.PIPELINE_ABORTED)
_BAD = int(pq.ConnStatus.BAD)
_SQLSTATE = pq.DiagnosticField.SQLSTATE
_MESSAGE = pq.DiagnosticField.MESSAGE_PRIMARY
_SEVERITY = pq.DiagnosticField.SEVERITY_NONLOCALIZED
_FATAL = (b"FATAL", b"PANIC")
_CANCEL_SECONDS = 5.0
_PAGE_COLUMNS = 3
_LARGE_BYTES = 1 << 20


class Session(psycopg.AsyncConnection[TupleRow]):
    """A connection that knows what is prepared in it: it may be leased again and again."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.prepared_names: set[bytes] = set()


class Backend:
    """A leased connection.  `execute` is the hot path; everything else is life and death."""

    __slots__ = (
        "_conn",
        "_ended",
        "_error",
        "_last_words",
        "_loop",
        "_pg",
        "_prepared",
        "_preparing",
        "_released",
        "_row",
        "_socket",
        "_waiter",
        "_writing",
        "busy",
        "held",
        "idle_ticks",
        "lost",
        "swollen",
    )

    def __init__(
        self,
        conn: Session,
        loop: asyncio.AbstractEventLoop,
        released: Callable[[Backend], None],
        ended: Callable[[Backend], None],
    ) -> None:
        """``released`` is called when a call is over, ``ended`` once, when the server has closed the connection."""
        self._conn = conn
        self._released = released
        self._ended = ended
        self._pg = pg = conn.pgconn
        self._loop = loop
        self._prepared = conn.prepared_names
        self._preparing: list[bytes] = []  # the statements that this batch prepares, in order
        self.held = False  # a cancel request is on its way: nobody else may have the connection before it has arrived
        self.busy = False  # an answer is still to come
        self._row: Row | None = None
        self._error: Exception | None = None
        self._last_words = False  # the server has said why it ends the connection
        self._waiter: asyncio.Future[Row] | None = None
        self._writing = False
        self.lost = False
        self.swollen = False  # its buffers have grown for a large message, and libpq never gives them back
        self.idle_ticks = 0  # how often the pool has found it idle in a row
        pg.enter_pipeline_mode()
        self._socket = pg.socket
        loop.add_reader(self._socket, self._readable)

    @property
    def connection(self) -> Session:
        """The pool's connection under this lease."""
        return self._conn

    @property
    def pid(self) -> int:
        """The server process's pid."""
        return self._pg.backend_pid

    def execute(self, call: Call, params: Params, timeout_ms: bytes | None = None) -> asyncio.Future[Row]:
        """Send one call, bounded by ``timeout_ms`` if given; the future gets the first row of its result.

        The future raises EngineError when PostgreSQL refuses, EngineLostError when the connection ends.
        """
        self._waiter = waiter = self._loop.create_future()
        if self.lost:
            self._fail()
            return waiter
        pg = self._pg
        self.busy = True
        try:
            if timeout_ms is not None:
                self._send(STATEMENT_TIMEOUT, (timeout_ms,))
            self._send(call, params)
            pg.pipeline_sync()
            if pg.flush():
                self._writing = True
                self.swollen = True
                self._loop.add_writer(self._socket, self._writable)
        except psycopg.Error:
            self._end()
        return waiter

    def _send(self, call: Call, params: Params) -> None:
        name = call.name
        if name not in self._prepared:
            self._pg.send_prepare(name, call.sql)
            self._preparing.append(name)
        self._pg.send_query_prepared(name, params, call.formats, 1)

    def _readable(self) -> None:
        pg = self._pg
        try:
            pg.consume_input()
            if not self.busy:
                pg.consume_input()  # nobody asked: it is the end that follows
            while self.busy and not pg.is_busy():
                result = pg.get_result()
                if result is not None:
                    self._take(result)
                elif pg.status == _BAD:
                    self._end()
            if self._last_words:
                # Do not wait for the end of the stream: when the server has left something unread, the kernel reports
                # an error together with these words, and libuv watches no longer.
                self._end()
        except psycopg.Error:
            self._end()

    def _take(self, result: pq.abc.PGresult) -> None:
        """One result of the batch; the last is the answer to Sync."""
        status = result.status
        if status == _TUPLES_OK:
            get = result.get_value
            if not result.ntuples:
                self._row = ()
            elif result.nfields == _PAGE_COLUMNS:  # the hot path, spelled out
                page = get(0, 0)
                if page is not None and len(page) > _LARGE_BYTES:
                    self.swollen = True
                self._row = (page, get(0, 1), get(0, 2))
            else:
                self._row = tuple([get(0, column) for column in range(result.nfields)])
        elif status == _PIPELINE_SYNC:
            self.busy = False
            self._finish()
        elif status == _COMMAND_OK:
            if self._preparing:
                self._prepared.add(self._preparing.pop(0))
            else:
                self._row = ()
        elif status != _PIPELINE_ABORTED:
            self._error, self._last_words = error_of(self._pg, result)

    def _finish(self) -> None:
        waiter, self._waiter = self._waiter, None
        row, self._row = self._row, None
        error, self._error = self._error, None
        if self._preparing:  # what an error kept from being prepared
            self._preparing.clear()
        if not self.lost and not self.held:
            self._released(self)
        if waiter is None or waiter.done():
            return
        if error is not None:
            waiter.set_exception(error)
        else:
            waiter.set_result(row if row is not None else ())

    def _writable(self) -> None:
        try:
            if self._pg.flush():
                return
        except psycopg.Error:
            self._end()
        self._stop_writing()

    def _stop_writing(self) -> None:
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._socket)

    def _end(self) -> None:
        """The connection is gone: tell whoever waits."""
        if self.lost:
            return
        self.detach()
        self.lost = True
        self.busy = False
        self._fail()
        self._ended(self)

    def _fail(self) -> None:
        """End the call at hand, if there is one, with the loss of the connection."""
        if self._error is None:
            text = self._pg.error_message.decode("utf-8", "replace").strip() or "connection to PostgreSQL lost"
            self._error = EngineLostError(text)
        elif isinstance(self._error, EngineError):
            self._error = EngineLostError(self._error.message)
        self._finish()

    def detach(self) -> None:
        """Stop watching the socket: the pool takes the connection back."""
        if not self.lost:
            self._stop_writing()
            self._loop.remove_reader(self._socket)

    def leave_pipeline(self) -> None:
        """Make the connection an ordinary idle one again."""
        self._pg.exit_pipeline_mode()

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

    async def cancel(self) -> bool:
        """Ask the server to stop the running call; tells whether the call has ended within the time.

        The connection is not released before the request has arrived: it would hit the next call.
        """
        self.held = True
        if self._waiter is None or self.lost:  # it has ended since
            self.held = False
            if not self.lost:
                self._released(self)
            return True
        self._waiter = ended = self._loop.create_future()  # the caller has given up
        with contextlib.suppress(psycopg.Error):  # it is the call's end that counts
            await self._conn.cancel_safe(timeout=_CANCEL_SECONDS)
        await asyncio.wait([ended], timeout=_CANCEL_SECONDS)
        self.held = False
        if ended.done():
            ended.exception()  # seen
            if not self.lost:
                self._released(self)
        return ended.done()


def error_of(pg: pq.abc.PGconn, result: pq.abc.PGresult) -> tuple[Exception, bool]:
    """What a failed result says, and whether it is the last the server says on this connection."""
    sqlstate = result.error_field(_SQLSTATE)
    message = result.error_field(_MESSAGE)
    fatal = result.error_field(_SEVERITY) in _FATAL
    if fatal or pg.status == _BAD or sqlstate is None:
        return EngineLostError((message or pg.error_message or b"connection lost").decode("utf-8", "replace")), fatal
    return EngineError(sqlstate.decode("ascii", "replace"), (message or b"").decode("utf-8", "replace")), False

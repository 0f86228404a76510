"""A libpq connection in pipeline mode on the event loop, as psycopg wraps it: batches out, results in.

A batch is [Parse,] Bind, Execute … Sync, sent in one write and answered in one read.  One permanent reader serves the
connection; what the results mean is the subclasses' business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import psycopg
from psycopg import pq
from psycopg.rows import TupleRow

from pg_ferret.engine.calls import Call
from pg_ferret.errors import EngineError, EngineLostError
from pg_ferret.runner import Turn

Params = Sequence[bytes | bytearray | memoryview | None]
Row = tuple[bytes | None, ...]

# As plain numbers, which compare faster than enums.
TUPLES_OK = int(pq.ExecStatus.TUPLES_OK)
COMMAND_OK = int(pq.ExecStatus.COMMAND_OK)
PIPELINE_SYNC = int(pq.ExecStatus.PIPELINE_SYNC)
PIPELINE_ABORTED = int(pq.ExecStatus.PIPELINE_ABORTED)
_BAD = int(pq.ConnStatus.BAD)
_SQLSTATE = pq.DiagnosticField.SQLSTATE
_MESSAGE = pq.DiagnosticField.MESSAGE_PRIMARY
_SEVERITY = pq.DiagnosticField.SEVERITY_NONLOCALIZED
_FATAL = (b"FATAL", b"PANIC")
# A page beyond this leaves buffers behind that libpq never gives back.
LARGE_BYTES = 1 << 20


class Session(psycopg.AsyncConnection[TupleRow]):
    """A connection that knows what is prepared in it: it may be leased again and again."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.prepared_names: set[bytes] = set()


class Pipeline(ABC):
    """The connection while it is on the loop."""

    __slots__ = (
        "_conn",
        "_loop",
        "_pg",
        "_prepared",
        "_preparing",
        "_socket",
        "_turn",
        "_writing",
        "busy",
        "idle_ticks",
        "lost",
        "spent",
        "swollen",
    )

    def __init__(self, conn: Session, turn: Turn) -> None:
        self._conn = conn
        self._turn = turn
        self._loop = loop = turn.loop
        self._pg = pg = conn.pgconn
        self._writing = False
        self._prepared = conn.prepared_names
        self._preparing: list[bytes] = []  # statements on their way to be, in order
        self.busy = False  # an answer is still to come
        self.lost = False
        self.swollen = False  # its buffers have grown for a large message
        self.spent = False  # it must serve nobody else
        self.idle_ticks = 0  # how often the pool has found it idle in a row
        pg.enter_pipeline_mode()
        self._socket = pg.socket
        loop.add_reader(self._socket, self._readable)

    @property
    def connection(self) -> Session:
        """The pool's connection under it."""
        return self._conn

    @property
    def pid(self) -> int:
        """The server process's pid."""
        return self._pg.backend_pid

    @abstractmethod
    def _take(self, result: pq.abc.PGresult, status: int) -> None:
        """One result of the oldest batch and its status; the last is the answer to Sync."""

    @abstractmethod
    def _end(self) -> None:
        """The connection is gone: tell whoever waits."""

    def _prepare(self, call: Call) -> None:
        """To be called before a call that is not prepared, unless it is on its way to be.  Raises psycopg.Error."""
        if call.name not in self._preparing:
            self._pg.send_prepare(call.name, call.sql)
            self._preparing.append(call.name)

    def _add_call(self, call: Call, params: Params) -> None:
        """Add a call to the batch that libpq collects, prepared if need be.  Raises psycopg.Error."""
        if call.name not in self._prepared:
            self._prepare(call)
        self._pg.send_query_prepared(call.name, params, call.formats, 1)

    def _sync(self) -> None:
        """Send the batch that libpq has collected.  Raises psycopg.Error."""
        self._pg.pipeline_sync()
        if self._pg.flush():
            self._writing = True
            self.swollen = True
            self._loop.add_writer(self._socket, self._writable)

    def _readable(self) -> None:
        pg, turn = self._pg, self._turn
        turn.reading = True
        try:
            pg.consume_input()
            if not self.busy:
                pg.consume_input()  # nobody asked: it is the end that follows
            while self.busy and not pg.is_busy():
                result = pg.get_result()
                if result is not None:
                    status = result.status
                    if status == TUPLES_OK:
                        pg.get_result()  # the end of this call's results, for which libpq waits for nothing
                    self._take(result, status)
                elif pg.status == _BAD:
                    self._end()
        except psycopg.Error:
            self._end()
        finally:
            turn.go_on()

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

    def detach(self) -> None:
        """Stop watching the socket: the pool takes the connection back."""
        if not self.lost:
            self._stop_writing()
            self._loop.remove_reader(self._socket)

    def leave_pipeline(self) -> bool:
        """Make the connection an ordinary idle one again; False if something is left in it."""
        try:
            self._pg.exit_pipeline_mode()
        except psycopg.Error:
            return False
        return True

    def _error_of(self, result: pq.abc.PGresult) -> Exception:
        """What a failed result says: EngineError, or EngineLostError if it is the last the server says here."""
        sqlstate = result.error_field(_SQLSTATE)
        message = result.error_field(_MESSAGE)
        if result.error_field(_SEVERITY) in _FATAL or self._pg.status == _BAD or sqlstate is None:
            return EngineLostError((message or self._pg.error_message or b"connection lost").decode("utf-8", "replace"))
        return EngineError(sqlstate.decode("ascii", "replace"), (message or b"").decode("utf-8", "replace"))

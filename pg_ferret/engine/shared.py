"""One connection for the cheap reads of many clients.

A point read takes PostgreSQL less time than it takes to wake a process up, so the reads that arrive in one turn of the
event loop go out together: one write, one transaction, one answer.  Whoever turns out to be slow is measured on a
connection of its own and stays there until it is cheap again.  While the line stands still nobody new joins it, and if
it does so for long, those who wait in it are served elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import NamedTuple

import psycopg
import structlog
from psycopg import pq

from pg_ferret.engine.backend import Params, Row, Session, error_of
from pg_ferret.engine.calls import Call
from pg_ferret.errors import EngineError, EngineLostError

# Seconds: what takes no longer is cheap; a line that stands still for longer takes nobody.
CHEAP_SECONDS = 0.004
# After so long those who wait are served elsewhere, and the query that holds them up is cancelled.
_STALL_SECONDS = 0.05
# A query that has not heeded its cancel request by then keeps its connection; the line gets another one.
_HOPELESS_SECONDS = 5.0
_MOST_WAITING = 128
# Shapes of reads whose cost is remembered.
_MOST_SHAPES = 10_000

_TUPLES_OK = int(pq.ExecStatus.TUPLES_OK)
_COMMAND_OK = int(pq.ExecStatus.COMMAND_OK)
_PIPELINE_SYNC = int(pq.ExecStatus.PIPELINE_SYNC)
_PIPELINE_ABORTED = int(pq.ExecStatus.PIPELINE_ABORTED)
_BAD = int(pq.ConnStatus.BAD)
_CANCELLED = "57014"
_log = structlog.get_logger()


class _Read(NamedTuple):
    waiter: asyncio.Future[Row]
    call: Call
    params: Params
    shape: bytes


class Costs:
    """Which shapes of reads have been cheap lately."""

    __slots__ = ("_cheap",)

    def __init__(self) -> None:
        self._cheap: set[bytes] = set()

    def cheap(self, shape: bytes) -> bool:
        """Whether the last read of this shape was cheap; one that was never seen is not."""
        return shape in self._cheap

    def note(self, shape: bytes, seconds: float) -> None:
        """A read of this shape has taken so long."""
        if seconds > CHEAP_SECONDS:
            self._cheap.discard(shape)
        elif shape not in self._cheap:
            if len(self._cheap) >= _MOST_SHAPES:
                self._cheap.clear()
            self._cheap.add(shape)


class SharedLine:
    """The connection; a batch is [Parse,] Bind, Execute … for each read, and one Sync."""

    def __init__(
        self,
        conn: Session,
        costs: Costs,
        alone: Callable[[Call, Params], Awaitable[Row]],
        ended: Callable[[], None],
    ) -> None:
        """``alone`` runs a read on a connection of its own; ``ended`` is called once, when this one is lost."""
        self._conn = conn
        self._pg = pg = conn.pgconn
        self._costs = costs
        self._alone = alone
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._prepared = conn.prepared_names
        self._preparing: list[bytes] = []
        self._filling: list[_Read] = []  # sent to libpq, not yet to the server
        self._batches: deque[list[_Read]] = deque()  # on their way, the oldest first
        self._answered = 0  # reads of the oldest batch that have their answer
        self._since = 0.0  # when the server began with the oldest batch
        self._scheduled = False
        self._watched = False
        self._stalled = False
        self._writing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.lost = False
        pg.enter_pipeline_mode()
        self._socket = pg.socket
        self._loop.add_reader(self._socket, self._readable)

    @property
    def connection(self) -> Session:
        """The pool's connection under the line."""
        return self._conn

    @property
    def busy(self) -> bool:
        """Whether anybody waits for an answer."""
        return bool(self._batches or self._filling)

    def takes(self, shape: bytes) -> bool:
        """Whether a read of this shape may join."""
        if not self._costs.cheap(shape) or len(self._filling) >= _MOST_WAITING:
            return False
        return not self._batches or self._loop.time() - self._since <= CHEAP_SECONDS

    def add(self, call: Call, params: Params, shape: bytes) -> asyncio.Future[Row]:
        """The future gets the first row of the result; it raises EngineError or EngineLostError."""
        waiter: asyncio.Future[Row] = self._loop.create_future()
        try:
            name = call.name
            if name not in self._prepared and name not in self._preparing:
                self._pg.send_prepare(name, call.sql)
                self._preparing.append(name)
            self._pg.send_query_prepared(name, params, call.formats, 1)
        except psycopg.Error:
            self._end()
            waiter.set_exception(EngineLostError("connection to PostgreSQL lost"))
            return waiter
        self._filling.append(_Read(waiter, call, params, shape))
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
            self._since = self._loop.time()
        if not self._watched:
            self._watched = True
            self._loop.call_later(_STALL_SECONDS, self._watch)
        self._batches.append(self._filling)
        self._filling = []
        try:
            self._pg.pipeline_sync()
            if self._pg.flush():
                self._writing = True
                self._loop.add_writer(self._socket, self._writable)
        except psycopg.Error:
            self._end()

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

    def _readable(self) -> None:
        pg = self._pg
        try:
            pg.consume_input()
            if not self._batches:
                pg.consume_input()  # nobody asked: it is the end that follows
            while self._batches and not pg.is_busy():
                result = pg.get_result()
                if result is not None:
                    self._take(result)
                elif pg.status == _BAD:
                    self._end()
        except psycopg.Error:
            self._end()

    def _take(self, result: pq.abc.PGresult) -> None:
        status = result.status
        if status == _TUPLES_OK:
            get = result.get_value
            waiter = self._batches[0][self._answered].waiter
            self._answered += 1
            if not waiter.done():
                waiter.set_result((get(0, 0), get(0, 1), get(0, 2)) if result.ntuples else ())
        elif status == _PIPELINE_SYNC:
            self._finish(self._batches.popleft())
        elif status == _COMMAND_OK:
            self._prepared.add(self._preparing.pop(0))
        elif status != _PIPELINE_ABORTED:
            self._fail(result)

    def _fail(self, result: pq.abc.PGresult) -> None:
        """One read is refused; those behind it in the batch are answered elsewhere."""
        error, fatal = error_of(self._pg, result)
        if fatal:
            self._end()
            return
        read = self._batches[0][self._answered]
        self._answered += 1
        if read.waiter.done():
            return
        if isinstance(error, EngineError) and error.sqlstate == _CANCELLED:
            self._spawn(self._again(read))  # it was meant for the one before
        else:
            read.waiter.set_exception(error)

    def _finish(self, batch: list[_Read]) -> None:
        """The server has done with a batch."""
        now = self._loop.time()
        seconds = (now - self._since) / len(batch)
        self._since = now
        self._stalled = False
        if seconds > CHEAP_SECONDS:
            for read in batch:  # one of them is to blame: each has to show anew what it costs
                self._costs.note(read.shape, seconds)
        rest = batch[self._answered :]
        self._answered = 0
        if rest:
            self._preparing.clear()
        for read in rest:
            if not read.waiter.done():
                self._spawn(self._again(read))

    def _watch(self) -> None:
        """While anybody waits: does the line move?"""
        if self.lost or not self._batches:
            self._watched = False
            return
        self._loop.call_later(_STALL_SECONDS, self._watch)
        seconds = self._loop.time() - self._since
        if seconds >= _HOPELESS_SECONDS:
            _log.warning(
                "a query ignores its cancel request; its connection is replaced", backend_pid=self._pg.backend_pid
            )
            self._end()
        elif seconds >= _STALL_SECONDS and not self._stalled:
            self._stalled = True
            self._give_away()

    def _give_away(self) -> None:
        """The first query holds the line up: it is cancelled here, and all who wait, itself included, run elsewhere."""
        nobody: asyncio.Future[Row] = self._loop.create_future()
        nobody.cancel()
        waiting = self._waiting()
        self._costs.note(waiting[0].shape, _STALL_SECONDS)
        for read in waiting:
            if not read.waiter.done():
                self._spawn(self._again(read))
        self._batches = deque([[read._replace(waiter=nobody) for read in batch] for batch in self._batches])
        self._filling = [read._replace(waiter=nobody) for read in self._filling]
        self._spawn(self._cancel())

    async def _cancel(self) -> None:
        with contextlib.suppress(psycopg.Error):
            await self._conn.cancel_safe(timeout=_HOPELESS_SECONDS)

    def _waiting(self) -> list[_Read]:
        """Those who have no answer yet, the first one first."""
        return [*(read for batch in self._batches for read in batch), *self._filling][self._answered :]

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _again(self, read: _Read) -> None:
        """A read that could not be run here."""
        try:
            row = await self._alone(read.call, read.params)
        except Exception as error:
            if not read.waiter.done():
                read.waiter.set_exception(error)
        else:
            if not read.waiter.done():
                read.waiter.set_result(row)

    def _end(self) -> None:
        """The connection is gone: tell whoever waits."""
        if self.lost:
            return
        self.detach()
        self.lost = True
        waiting = self._waiting()
        self._batches.clear()
        self._filling = []
        for read in waiting:
            if not read.waiter.done():
                read.waiter.set_exception(EngineLostError("connection to PostgreSQL lost"))
        self._ended()

    def detach(self) -> None:
        """Stop watching the socket."""
        if not self.lost:
            self._stop_writing()
            self._loop.remove_reader(self._socket)

    def drop(self) -> None:
        """Give the connection up, whatever it does."""
        self._end()

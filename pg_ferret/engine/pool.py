"""Which connection serves the next call.

They are leased (source.py) for as long as they are of use and handed to requests last in, first out, so that few
backends stay warm.  A request that finds none free waits (queue.py), for at most ``ferretdb.query_wait_timeout``.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime

import structlog

from pg_ferret.engine.backend import Backend, Lender
from pg_ferret.engine.calls import FALSE, FIND_AS_EVER, FLUSH_COMMITS, GET_MORE, TRUE, Call
from pg_ferret.engine.commits import Committed, unknown
from pg_ferret.engine.duties import Duties, Duty
from pg_ferret.engine.leftovers import Leftovers
from pg_ferret.engine.limits import Limits
from pg_ferret.engine.lines import Line, Owner, Shared
from pg_ferret.engine.pipeline import LARGE_BYTES, Params, Pipeline, Row, Session
from pg_ferret.engine.queue import Queue, Request
from pg_ferret.engine.scheduling import Stopwatch, schedule
from pg_ferret.engine.shared import Reads
from pg_ferret.engine.source import Source, Tenant
from pg_ferret.engine.sqlstate import EXTENSION_MISSING
from pg_ferret.engine.unheeding import Unheeding
from pg_ferret.engine.writes import Room
from pg_ferret.errors import CommandError, EngineError, EngineLostError
from pg_ferret.runner import Turn, Waiter

TICK_SECONDS = 5.0
_IDLE_TICKS = 120
# How long running calls may take to heed their cancel request when the pool closes.
_CLOSE_SECONDS = 0.5
# How long a request waits for the launcher to install the engine, which takes half a second on a new server.
_INSTALLING_SECONDS = 5.0
_SHORTAGE_LOG_SECONDS = 5.0
# Calls that are not named as the command that makes them.
_NAMES = {GET_MORE: "getMore", FIND_AS_EVER: "find"}
_log = structlog.get_logger()


class Pool:
    """The worker's connections to PostgreSQL."""

    def __init__(
        self, conninfo: str, limits: Limits, trouble: Callable[[str], None], going_on: Callable[[str, bool], None]
    ) -> None:
        """`trouble` is told when PostgreSQL cannot be reached, `going_on` when it begins or ends to ignore a cancel."""
        self._trouble = trouble
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._turn = turn = Turn(self._loop)
        self._idle: list[Backend] = []
        self._all: set[Backend] = set()
        self._queue = Queue(turn, self._overdue)
        self._unheeding = Unheeding(going_on)
        self._leftovers = Leftovers(self.call, self._spawn)
        self._shortage_told = -math.inf
        self._tasks: set[asyncio.Task[None]] = set()
        owner = Owner(self._elsewhere, self._line_ended, self._line_stalled, self._unclaimed)
        room = Room(self._crowded, self._alone, self._apart, self._has_room, self._want, self._apart_now)
        self._duties = duties = Duties(turn, owner, room, self._by_itself, self._flush_elsewhere)
        self._commits = duties.commits
        self.finds, self.pages, self.writes = duties.finds, duties.pages, duties.writes
        duties.allot(limits)
        self._lender = Lender(self._release, self._ended, self._commits.add, self._unclaimed)
        self._elsewhere_now: dict[asyncio.Task[None], Waiter[Row]] = {}
        self._closed = False
        tenant = Tenant(self._spawn, self._arrived, self._grow_if_needed, trouble)
        self._source = Source(conninfo, limits, tenant)

    @property
    def size(self) -> int:
        """Connections leased."""
        return len(self._all) + self._duties.connections

    @property
    def in_use(self) -> int:
        """Connections that serve a request now."""
        flusher = self._commits.backend
        resting = len(self._idle) + (flusher is not None and not flusher.busy)
        return len(self._all) - resting + sum(line.busy for line in self._duties.lines())

    @property
    def waiting(self) -> int:
        """Requests that wait for a connection."""
        return len(self._queue.requests)

    async def open(self) -> None:
        """Start connecting, as soon as the engine is installed; returns at once.  Requests that came before waited."""
        if self._source.opened or self._closed:
            return
        await self._source.open()
        for _ in self._queue.requests:
            self._grow()
        for _ in range(self._limits.smallest):
            self._grow()

    async def close(self) -> None:
        """Give every connection back and close it."""
        self._closed = True
        self._limits = Limits(0, 0, self._limits.wait_seconds)
        for task in tuple(self._tasks):
            task.cancel()
        # PostgreSQL would go on with what nobody waits for any more.
        running = [
            self._loop.create_task(backend.cancel())
            for backend in self._all
            if backend.busy and not backend.held and backend is not self._commits.backend
        ]
        if running:
            await asyncio.wait(running, timeout=_CLOSE_SECONDS)
        self._all.update(self._unheeding.queries)
        for line in self._duties.lines():
            self._duties.remove(line)
            line.drop()
            await self._put_back(line)
        for backend in tuple(self._all):
            await self._give_back(backend)
        await self._source.close()

    async def resize(self, limits: Limits) -> None:
        """Live under new limits; connections above them go when they are next idle."""
        if limits.batch != self._limits.batch:
            for pipeline in (*self._all, *self._unheeding.queries, *self._duties.lines()):
                schedule(pipeline.pid, batch=limits.batch)
        self._limits = limits
        self._duties.allot(limits)
        if not self._commits.apart:
            self._disband()
        if not self._source.opened:
            return
        await self._resize_source()
        while self._idle and self.size > limits.largest:
            await self._give_back(self._idle[0])
        for _ in range(limits.smallest - len(self._all) - self._source.coming):
            self._grow()
        for _ in range(min(self.waiting, limits.largest - len(self._all))):
            self._grow()

    def call(self, call: Call, params: Params, timeout_ms: bytes | None = None) -> Awaitable[Row]:
        """To be awaited at once: the first row of the call's result.

        Raises EngineError, EngineLostError, or CommandError when no connection came free in time.  Whoever cancels
        the waiting task has to call `abandon`.
        """
        if self._idle:
            return self._idle.pop().execute(call, params, timeout_ms)
        return self._wait(call, params, timeout_ms).waiter

    def write(self, call: Call, params: Params) -> Awaitable[Row]:
        """As `call`, for a call that writes, without its last parameter: the result comes when it is durable.

        A write that is alone waits for its own commit, which is a round trip less; several share a flush, if there is a
        connection that does nothing else.
        """
        if self._crowded():
            return self._apart(call, (*params, TRUE))
        return self._alone(call, params)

    def _alone(self, call: Call, params: Params) -> Awaitable[Row]:
        return self.call(call, (*params, FALSE))

    def _apart(self, call: Call, params: Params) -> Awaitable[Row]:
        """A write that does not stand in line while others are under way, with its last parameter."""
        return self.call(call, params) if self._commits.backend is not None else self._alone(call, params[:-1])

    def _crowded(self) -> bool:
        """To be asked once for every write: whether it shares; has who flushes found, if that is due."""
        duties = self._duties
        if not (duties.crowd.there or duties.meet()):
            return False
        if self._commits.backend is not None or (missing := duties.missing()) is None:
            return True
        duties.meet()  # there are no flushes that would tell
        self._want(missing)
        return False

    def _apart_now(self) -> int:
        flusher = self._commits.backend is not None
        return len(self._all) - len(self._idle) - flusher + len(self._queue.requests)

    def _flush_elsewhere(self, committed: Committed) -> None:
        if self._closed:
            committed.tell(unknown(None))
        else:
            self._spawn(self._flush(committed))

    async def _flush(self, committed: Committed) -> None:
        error: Callable[[], Exception] | None = unknown(None)
        params = (committed.incarnation,)
        try:
            if self._idle:
                await self._idle.pop().execute(FLUSH_COMMITS, params)
            else:
                await self._wait(FLUSH_COMMITS, params, None, first=True).waiter
            error = None
        except (CommandError, EngineError, EngineLostError) as refused:
            error = unknown(refused)
        finally:
            committed.tell(error)

    def _flushed(self, flusher: Backend) -> None:
        """The connection that flushes has done so; it serves nobody else."""
        flusher.idle_ticks = 0
        if not self._commits.apart:
            self._disband()

    def _disband(self) -> None:
        """The connection that flushes serves as any other again, unless it is at work."""
        flusher = self._commits.backend
        if flusher is not None and not flusher.busy:
            self._commits.backend = None
            self._duties.idle()
            flusher.released = self._release
            self._release(flusher)

    def _has_room(self) -> bool:
        """Whether a connection is idle or may still be opened."""
        return bool(self._idle) or self._may_grow()

    def _may_grow(self) -> bool:
        return self._source.opened and self.size + self._source.coming < self._limits.largest

    async def _by_itself(self, lines: Reads, read: Shared) -> Row:
        """A read that could share, on a connection of its own."""
        if lines.costs.settled(read.shape, self._loop.time()):
            row = await self.call(read.call, read.params)
        else:
            row = await self._measure(lines, read)
        if lines.due:
            self._want(lines)
        return row

    async def _measure(self, lines: Reads, read: Shared) -> Row:
        watch = Stopwatch()
        lag = lines.costs.lag
        lag.look()
        if self._idle:
            backend = self._idle.pop()
            watch.start(backend.pid)
            row = await backend.execute(read.call, read.params)
        else:
            request = self._wait(read.call, read.params, None)
            request.watch = watch
            row = await request.waiter
        now = self._loop.time()
        page = row[0]
        large = page is not None and len(page) > LARGE_BYTES
        if large or (lines is self.finds and row[1] is not None):  # it opens a cursor
            lines.costs.keep_away(read.shape, now)
        else:
            lag.look()
            lines.costs.note(read.shape, watch.seconds(lag.seconds), now)
        return row

    def _want(self, duty: Duty) -> None:
        if self._duties.want(duty) and self._idle and self._takes_duty(self._idle[-1]):
            self._idle.pop()

    def _takes_duty(self, backend: Backend) -> bool:
        """Have a connection that is free share reads or flush commits from now on, if that is wanted and it fits."""
        duty = self._duties.fitting(backend)
        if duty is None:
            return False
        if len(self._all) - (self._commits.backend is not None) < 2:
            # Never the last one: PostgreSQL might have no other for us.
            if not self._source.coming:
                self._grow()
            return False
        if not self._duties.give(duty, backend):
            return False
        if duty is self._commits:
            backend.released = self._flushed
        else:
            self._all.discard(backend)
        self._grow_if_needed()
        return True

    def _line_ended(self, line: Line) -> None:
        if self._duties.remove(line):
            self._spawn(self._put_back(line))

    def _line_stalled(self, line: Line, request: Shared) -> None:
        """A request on a shared connection goes on and on: it is cancelled there as if its client had gone."""
        if self._duties.remove(line):
            backend = self._backend(line.connection)
            backend.abandon()
            self._all.add(backend)
            command = _NAMES.get(request.call) or request.call.name.decode()
            self._spawn(self._recover(backend, f"{command} {request.namespace.decode('utf-8', 'replace')}"))

    def _backend(self, connection: Session) -> Backend:
        return Backend(connection, self._turn, self._lender)

    def _unclaimed(self, call: Call, row: Row) -> None:
        if not self._closed:
            self._leftovers.note(call, row)

    def _elsewhere(self, request: Shared, waiter: Waiter[Row]) -> None:
        task = self._spawn(self._again(request, waiter))
        self._elsewhere_now[task] = waiter
        task.add_done_callback(self._elsewhere_now.pop)

    async def _again(self, request: Shared, waiter: Waiter[Row]) -> None:
        """A request that could not be served on the shared connection."""
        try:
            row = await self.call(request.call, request.params)
        except Exception as error:
            if not waiter.done():
                waiter.set_exception(error)
        else:
            if waiter.done():
                self._unclaimed(request.call, row)
            else:
                waiter.set_result(row)

    def abandon(self, request: str) -> None:
        """Cancel the calls for which nobody waits any more; ``request`` tells what they were made for."""
        for task, waiter in self._elsewhere_now.items():
            if waiter.cancelled():
                task.cancel()
        for backend in self._all:
            if backend.abandoned and not backend.held:
                backend.held = True  # now: before the task begins, the call may end and the next one be given it
                self._spawn(self._recover(backend, request))

    def _wait(self, call: Call, params: Params, timeout_ms: bytes | None, *, first: bool = False) -> Request:
        """Have a call made on the next connection that comes free; the ``first`` one before others."""
        seconds = self._limits.wait_seconds if self._source.opened else _INSTALLING_SECONDS
        request = self._queue.add(call, params, timeout_ms, seconds, first=first)
        self._grow()
        return request

    def _overdue(self) -> CommandError:
        """What a request is told for which no connection came free in time."""
        if not self._source.opened:
            return CommandError(6, EXTENSION_MISSING)
        self._tell_shortage()
        # ExceededTimeLimit is in the drivers' list of retryable errors.
        return CommandError(262, "no PostgreSQL connection came free in time (ferretdb.query_wait_timeout)")

    def _tell_shortage(self) -> None:
        now = self._loop.time()
        if now - self._shortage_told < _SHORTAGE_LOG_SECONDS:
            return
        self._shortage_told = now
        text = (
            f"no PostgreSQL connection came free within ferretdb.query_wait_timeout:"
            f" {self.in_use} of {self.size} busy, {self.waiting} requests wait"
        )
        _log.warning(text, hint="long queries, or locks? see pg_stat_activity; ferretdb.pool_max_conns")
        self._trouble(text)

    def _release(self, backend: Backend) -> None:
        """A connection has come free."""
        if backend.lost or (self._unheeding.queries and self._end_unheeding(backend)):
            return
        if backend.spent or self.size > self._limits.largest:
            self._spawn(self._give_back(backend))
            return
        if self._duties.wanted and self._takes_duty(backend):
            return
        if self._queue.requests and (request := self._queue.take()) is not None:
            if request.watch is not None:
                request.watch.start(backend.pid)
            backend.execute(request.call, request.params, request.timeout_ms, request.waiter)
            return
        backend.idle_ticks = 0
        self._idle.append(backend)

    async def _recover(self, backend: Backend, request: str) -> None:
        """The client went away in the middle of a call: cancel it, and keep the connection if it listens."""
        since = datetime.now(UTC)
        if await backend.cancel() or backend not in self._all:
            return
        # Its place is another's from now on.
        self._all.discard(backend)
        self._unheeding.add(backend, request, since)
        await self._resize_source()
        self._grow_if_needed()

    async def _resize_source(self) -> None:
        """psycopg_pool counts connections that do not heed us: as many more are allowed, up to twice the limit."""
        await self._source.resize(self._limits, min(len(self._unheeding.queries), self._limits.largest))

    def _end_unheeding(self, backend: Backend) -> bool:
        """If a connection that has come free is one that ignored us, give it back; tells whether it is."""
        if not self._unheeding.ended(backend):
            return False
        self._all.add(backend)
        self._spawn(self._give_back(backend))
        self._spawn(self._resize_source())
        return True

    def _grow_if_needed(self) -> None:
        if self._queue.requests or len(self._all) + self._source.coming < self._limits.smallest:
            self._grow()

    def _grow(self) -> None:
        if self._may_grow():
            self._source.ask()

    def _arrived(self, connection: Session) -> None:
        backend = self._backend(connection)
        schedule(backend.pid, batch=self._limits.batch)
        self._all.add(backend)
        self._release(backend)

    def _ended(self, backend: Backend) -> None:
        """The server closed a connection: it must serve nobody, and psycopg_pool opens another."""
        if self._unheeding.queries and self._end_unheeding(backend):
            return
        _log.info("PostgreSQL has closed a connection", backend_pid=backend.pid)
        if backend in self._idle:
            self._idle.remove(backend)
        self._spawn(self._give_back(backend))

    async def _give_back(self, backend: Backend) -> None:
        if backend not in self._all:
            return
        self._all.discard(backend)
        if backend in self._idle:
            self._idle.remove(backend)
        if backend is self._commits.backend:
            self._commits.backend = None
        if backend.busy:
            backend.drop()
        backend.detach()
        await self._put_back(backend)

    async def _put_back(self, pipeline: Pipeline) -> None:
        """As the source's; then the connection's place may be another's."""
        await self._source.put_back(pipeline)
        self._grow_if_needed()

    async def tend(self) -> None:
        """To be called every `TICK_SECONDS`: let go what is lost and what has been idle for long."""
        for backend in tuple(self._idle):
            if backend not in self._idle:
                continue  # it has been taken while another one was given back
            backend.idle_ticks += 1
            spare = len(self._all) > self._limits.smallest and backend.idle_ticks > _IDLE_TICKS
            if backend.lost or spare or backend.swollen:
                await self._give_back(backend)
        flusher = self._commits.backend
        if flusher is not None and not flusher.busy:
            flusher.idle_ticks += 1
            if flusher.idle_ticks > _IDLE_TICKS:
                self._disband()
        for line in self._duties.lines():
            if not line.busy:
                line.idle_ticks += 1
                if line.swollen or line.idle_ticks > _IDLE_TICKS:
                    line.retire()

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

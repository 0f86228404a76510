"""Which connection serves the next call.

psycopg_pool opens, checks, backs off and replaces connections; this pool leases them from it for as long as they
are of use and hands them to requests last in, first out, so that few backends stay warm.  A request that finds none
free waits in line, for at most ``ferretdb.query_wait_timeout``.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime
from functools import partial
from typing import NamedTuple

import psycopg
import psycopg_pool
import structlog

from pg_ferret.engine.backend import Backend, Lender
from pg_ferret.engine.calls import DELETE_CURSORS, FALSE, FLUSH_COMMITS, GET_MORE, TRUE, Call, id_array, streams
from pg_ferret.engine.commits import Commits, Committed, unknown
from pg_ferret.engine.costs import Costs
from pg_ferret.engine.limits import Limits
from pg_ferret.engine.lines import Line, Lines, Owner, Shared
from pg_ferret.engine.pages import PageLine
from pg_ferret.engine.pipeline import LARGE_BYTES, Params, Pipeline, Row, Session
from pg_ferret.engine.points import PointLine
from pg_ferret.engine.scheduling import Stopwatch, schedule
from pg_ferret.engine.shared import ReadLine, Reads
from pg_ferret.engine.sqlstate import EXTENSION_MISSING
from pg_ferret.engine.writes import Room, Shapes, WriteLine, Writes
from pg_ferret.errors import CommandError, EngineError, EngineLostError

TICK_SECONDS = 5.0
_IDLE_TICKS = 120
# psycopg_pool tries again after one second, then after two, after four …: rather begin anew, so that the service is
# back within a second of PostgreSQL.
_CONNECT_SECONDS = 2.0
_GIVEN_BACK_SECONDS = 1.0
# How long running calls may take to heed their cancel request when the pool closes.
_CLOSE_SECONDS = 0.5
# How long a request waits for the launcher to install the engine, which takes half a second on a new server.
_INSTALLING_SECONDS = 5.0
_SHORTAGE_LOG_SECONDS = 5.0
# How often somebody looks after the requests that wait for a connection.
_LOOK_SECONDS = 0.05
# A page takes PostgreSQL ten times a point read's time: one of its processes keeps a processor busy, and more of them
# than the worker's share of processors only take turns.  A write takes as long as it takes the worker to serve it; one
# line is enough until many wait in it.
_LINES_OF_FINDS = 1
_MOST_LINES_OF_PAGES = 2
_MOST_LINES_OF_WRITES = 2
# A flush of its own is a round trip more, which pays when it serves many writes: from so many others under way on,
# until there are so few. A mixture of both would be slower than either.
_CROWD = 6
_NO_CROWD = 2
_log = structlog.get_logger()


Duty = Lines[ReadLine] | Lines[WriteLine] | Commits


class _Unheeding(NamedTuple):
    """A query that goes on though nobody waits for it: what was shown, and the time of the cancel request."""

    text: str
    since: datetime


class _Request:
    """A call that waits for a connection."""

    __slots__ = ("call", "deadline", "params", "timeout_ms", "waiter", "watch")

    def __init__(
        self, call: Call, params: Params, timeout_ms: bytes | None, waiter: asyncio.Future[Row], deadline: float
    ) -> None:
        self.call = call
        self.params = params
        self.timeout_ms = timeout_ms
        self.waiter = waiter
        self.deadline = deadline  # on the loop's clock; infinity: it waits for ever
        self.watch: Stopwatch | None = None  # to be started when it gets its connection


class Pool:
    """The worker's connections to PostgreSQL."""

    def __init__(
        self, conninfo: str, limits: Limits, trouble: Callable[[str], None], going_on: Callable[[str, bool], None]
    ) -> None:
        """`trouble` is told when PostgreSQL cannot be reached, `going_on` when it begins or ends to ignore a cancel."""
        self._trouble = trouble
        self._going_on = going_on
        self._unheeding: dict[Backend, _Unheeding] = {}
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._idle: list[Backend] = []
        self._all: set[Backend] = set()
        self._waiting: deque[_Request] = deque()
        self._shortage_told = -math.inf
        self._watching = False  # whether anybody looks after those who wait
        self._growing = 0
        self._reachable = True
        self._open = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._bereft: list[int] = []  # cursors whose clients have gone
        self._commits = Commits(self._loop, self._flush_elsewhere, self._writes_in_line)
        shapes = Shapes()
        self._lender = Lender(self._release, self._ended, self._commits.add, self._unclaimed)
        owner = Owner(self._elsewhere, self._line_ended, self._line_stalled, self._unclaimed)

        def reads(line: type[PointLine] | type[PageLine]) -> Reads:
            costs = Costs()
            make = partial(line, loop=self._loop, costs=costs, owner=owner)
            return Reads(make, costs, self._measure, self._has_room)

        self.finds = reads(PointLine)
        self.pages = reads(PageLine)
        make = partial(WriteLine, loop=self._loop, shapes=shapes, committed=self._commits.add, owner=owner)
        self.writes = Writes(make, shapes, Room(self._crowded, self._alone, self.call, self._has_room, self._want))
        self._crowd = False  # whether writes share
        self._sharing = 0  # connections that are lines
        self._wanted: list[Duty] = []  # each is to get the next connection that comes free and fits
        self._allot_lines()
        self._elsewhere_now: dict[asyncio.Task[None], asyncio.Future[Row]] = {}
        self._closed = False
        self._source = psycopg_pool.AsyncConnectionPool(
            conninfo,
            connection_class=Session,
            min_size=limits.smallest,
            max_size=max(limits.largest, limits.smallest, 1),
            kwargs={"autocommit": True},
            open=False,
            reconnect_timeout=_CONNECT_SECONDS,
            timeout=_CONNECT_SECONDS * 1.25,
            # What is idle there has been given back: psycopg_pool closes one connection each time.
            max_idle=_GIVEN_BACK_SECONDS,
        )

    @property
    def size(self) -> int:
        """Connections leased."""
        return len(self._all) + self._sharing

    @property
    def in_use(self) -> int:
        """Connections that serve a request now."""
        flusher = self._commits.backend
        resting = len(self._idle) + (flusher is not None and not flusher.busy)
        return len(self._all) - resting + sum(line.busy for line in self._lines())

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return len(self._waiting)

    async def open(self) -> None:
        """Start connecting, as soon as the engine is installed; returns at once.  Requests that came before waited."""
        if self._open or self._closed:
            return
        self._open = True
        await self._source.open(wait=False)
        for _ in self._waiting:
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
        self._all.update(self._unheeding)
        for line in self._lines():
            self._remove_line(line)
            line.drop()
            await self._put_back(line)
        for backend in tuple(self._all):
            await self._give_back(backend)
        await self._source.close()

    async def resize(self, limits: Limits) -> None:
        """Live under new limits; connections above them go when they are next idle."""
        if limits.batch != self._limits.batch:
            for pipeline in (*self._all, *self._unheeding, *self._lines()):
                schedule(pipeline.pid, batch=limits.batch)
        self._limits = limits
        self._allot_lines()
        if not self._open:
            return
        await self._resize_source()
        while self._idle and self.size > limits.largest:
            await self._give_back(self._idle[0])
        for _ in range(limits.smallest - len(self._all) - self._growing):
            self._grow()
        for _ in range(min(len(self._waiting), limits.largest - len(self._all))):
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

        A write that is alone waits for its own commit, which is a round trip less; several share a flush.
        """
        if self._crowded():
            return self.call(call, (*params, TRUE))
        return self._alone(call, params)

    def _alone(self, call: Call, params: Params) -> Awaitable[Row]:
        commits = self._commits
        if commits.backend is None and commits.allowed and self._under_way() >= _CROWD:
            self._want(commits)
        return self.call(call, (*params, FALSE))

    def _under_way(self) -> int:
        """Requests that have a connection of their own or wait for one."""
        flusher = self._commits.backend is not None
        return len(self._all) - len(self._idle) - flusher + len(self._waiting)

    def _crowded(self) -> bool:
        """Whether so many others are under way that the next write had better share connection and flush with them."""
        commits = self._commits
        if commits.backend is None or not commits.allowed:
            self._crowd = False
            return False
        others = self._under_way() + commits.pending + self._writes_in_line()
        if others >= _CROWD:
            self._crowd = True
        elif others <= _NO_CROWD:
            self._crowd = False
        return self._crowd

    def _writes_in_line(self) -> int:
        waiting = 0
        for line in self.writes.all:
            waiting += len(line.queue)
        return waiting

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
        except (EngineError, EngineLostError) as refused:
            error = unknown(refused)
        finally:
            committed.tell(error)

    def _lines(self) -> list[Line]:
        return [*self.finds.all, *self.pages.all, *self.writes.all]

    def _allot_lines(self) -> None:
        """Half of the connections are for those who need one of their own."""
        processors = self._limits.processors
        room = self._limits.largest // 2
        finds = min(_LINES_OF_FINDS, room)
        # Beside the first line of writes one to flush what they commit, and one for pages.
        writes = min(_MOST_LINES_OF_WRITES, processors, max(0, room - finds - 2))
        flush = writes > 0
        self.finds.allot(finds)
        self.writes.allot(writes)
        self.pages.allot(min(_MOST_LINES_OF_PAGES, processors, room - finds - writes - flush))
        self._commits.allowed = flush
        if not flush:
            self._disband()

    def _flushed(self, flusher: Backend) -> None:
        """The connection that flushes has done so; it serves nobody else."""
        flusher.idle_ticks = 0
        if not self._commits.allowed:
            self._disband()

    def _disband(self) -> None:
        """The connection that flushes serves as any other again, unless it is at work."""
        flusher = self._commits.backend
        if flusher is not None and not flusher.busy:
            self._commits.backend = None
            flusher.released = self._release
            self._release(flusher)

    def _has_room(self) -> bool:
        """Whether a connection is idle or may still be opened."""
        return bool(self._idle) or self._may_grow()

    def _may_grow(self) -> bool:
        return self._open and self.size + self._growing < self._limits.largest

    async def _measure(self, lines: Reads, read: Shared) -> Row:
        watch = Stopwatch()
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
            lines.costs.note(read.shape, watch.seconds(), now)
        if lines.due:
            self._want(lines)
        return row

    def _want(self, duty: Duty) -> None:
        """Another connection is to serve in this way."""
        if duty not in self._wanted:
            self._wanted.append(duty)
            if self._idle and self._takes_duty(self._idle[-1]):
                self._idle.pop()

    def _takes_duty(self, backend: Backend) -> bool:
        """Have a connection that is free share reads or flush commits from now on, if that is wanted and it fits."""
        for duty in self._wanted:
            if not duty.fits(backend):
                continue
            if (
                len(self._all) - (self._commits.backend is not None) < 2
            ):  # never the last one: PostgreSQL might have no other for us
                if not self._growing:
                    self._grow()
                return False
            self._wanted.remove(duty)
            if isinstance(duty, Commits):
                if not duty.allowed or duty.backend is not None:
                    return False
                duty.backend = backend
                backend.released = self._flushed
            elif duty.due:
                self._all.discard(backend)
                backend.detach()
                duty.add(backend.connection)
                self._sharing += 1
            else:
                return False
            self._grow_if_needed()
            return True
        return False

    def _remove_line(self, line: Line) -> bool:
        found = self.finds.remove(line) or self.pages.remove(line) or self.writes.remove(line)
        self._sharing -= found
        return found

    def _line_ended(self, line: Line) -> None:
        if self._remove_line(line):
            self._spawn(self._put_back(line))

    def _line_stalled(self, line: Line, request: Shared) -> None:
        """A request on a shared connection goes on and on: it is cancelled there as if its client had gone."""
        if self._remove_line(line):
            backend = self._backend(line.connection)
            backend.abandon()
            self._all.add(backend)
            command = "getMore" if request.call is GET_MORE else request.call.name.decode()
            self._spawn(self._recover(backend, f"{command} {request.namespace.decode('utf-8', 'replace')}"))

    def _backend(self, connection: Session) -> Backend:
        return Backend(connection, self._loop, self._lender)

    def _unclaimed(self, call: Call, row: Row) -> None:
        """Nobody waits for a row any more: if it has opened a cursor, the engine may keep the result in a file."""
        if self._closed or not call.opens or not row or row[1] is None or row[2] is None or streams(row[1]):
            return
        if not self._bereft:
            self._spawn(self._delete_bereft())
        self._bereft.append(int.from_bytes(row[2], "big"))

    async def _delete_bereft(self) -> None:
        taken, self._bereft = self._bereft, []
        with contextlib.suppress(CommandError, EngineError, EngineLostError):  # else the housekeeper finds the files
            await self.call(DELETE_CURSORS, (id_array(taken),))

    def _elsewhere(self, request: Shared, waiter: asyncio.Future[Row]) -> None:
        task = self._spawn(self._again(request, waiter))
        self._elsewhere_now[task] = waiter
        task.add_done_callback(self._elsewhere_now.pop)

    async def _again(self, request: Shared, waiter: asyncio.Future[Row]) -> None:
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

    def _wait(self, call: Call, params: Params, timeout_ms: bytes | None, *, first: bool = False) -> _Request:
        """Have a call made on the next connection that comes free; the ``first`` one before others."""
        seconds = self._limits.wait_seconds if self._open else _INSTALLING_SECONDS
        deadline = math.inf if seconds is None else self._loop.time() + seconds
        request = _Request(call, params, timeout_ms, self._loop.create_future(), deadline)
        if first:
            self._waiting.appendleft(request)
        else:
            self._waiting.append(request)
        self._grow()
        if not self._watching:
            self._watching = True
            self._loop.call_later(_LOOK_SECONDS, self._look_after_waiting)
        return request

    def _look_after_waiting(self) -> None:
        """Those go whose time is up, and those for whom nobody waits any more."""
        now = self._loop.time()
        waiting = self._waiting
        for _ in range(len(waiting)):
            request = waiting.popleft()
            if request.waiter.done():
                continue
            if request.deadline > now:
                waiting.append(request)
            elif self._open:
                # ExceededTimeLimit is in the drivers' list of retryable errors.
                text = "no PostgreSQL connection came free in time (ferretdb.query_wait_timeout)"
                request.waiter.set_exception(CommandError(262, text))
                self._tell_shortage(now)
            else:
                request.waiter.set_exception(CommandError(6, EXTENSION_MISSING))
        self._watching = bool(waiting)
        if waiting:
            self._loop.call_later(_LOOK_SECONDS, self._look_after_waiting)

    def _tell_shortage(self, now: float) -> None:
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
        if backend.lost or (self._unheeding and not self._heeds(backend)):
            return
        if backend.spent or self.size > self._limits.largest:
            self._spawn(self._give_back(backend))
            return
        if self._wanted and self._takes_duty(backend):
            return
        while self._waiting:
            request = self._waiting.popleft()
            if not request.waiter.done():
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
        # Its place is another's from now on.  We stay connected to see it end: hanging up would not stop it either.
        text = f"{request}: PostgreSQL backend {backend.pid} ignores its cancel request since {since:%H:%M:%S} UTC"
        _log.warning("a query ignores its cancel request", request=request, backend_pid=backend.pid, since=since)
        self._going_on(text, True)
        self._all.discard(backend)
        self._unheeding[backend] = _Unheeding(text, since)
        await self._resize_source()
        self._grow_if_needed()

    async def _resize_source(self) -> None:
        """psycopg_pool counts connections that do not heed us: as many more are allowed, up to twice the limit."""
        limits = self._limits
        extra = min(len(self._unheeding), limits.largest)
        await self._source.resize(limits.smallest, max(limits.largest, limits.smallest, 1) + extra)

    def _heeds(self, backend: Backend) -> bool:
        """Whether a connection that has come free may serve on; one that ignored us has just ended its query."""
        late = self._unheeding.pop(backend, None)
        if late is None:
            return True
        seconds = (datetime.now(UTC) - late.since).total_seconds()
        _log.info("a query that ignored its cancel request has ended", backend_pid=backend.pid, seconds=round(seconds))
        self._going_on(late.text, False)
        self._all.add(backend)
        self._spawn(self._give_back(backend))
        self._spawn(self._resize_source())
        return False

    def _grow_if_needed(self) -> None:
        if self._waiting or len(self._all) + self._growing < self._limits.smallest:
            self._grow()

    def _grow(self) -> None:
        if self._may_grow():
            self._growing += 1
            self._spawn(self._lease())

    async def _lease(self) -> None:
        try:
            connection = await self._source.getconn()
        except (psycopg_pool.PoolTimeout, psycopg.Error):
            self._growing -= 1
            if self._reachable:  # psycopg_pool logs the reason
                self._reachable = False
                self._trouble("cannot connect to PostgreSQL; its log tells why")
            self._grow_if_needed()
            return
        except asyncio.CancelledError:
            self._growing -= 1
            raise
        self._growing -= 1
        if not self._reachable:
            self._reachable = True
            _log.info("connected to PostgreSQL again")
        backend = self._backend(connection)
        schedule(backend.pid, batch=self._limits.batch)
        self._all.add(backend)
        self._release(backend)

    def _ended(self, backend: Backend) -> None:
        """The server closed a connection: it must serve nobody, and psycopg_pool opens another."""
        if self._unheeding and not self._heeds(backend):
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
        broken = backend.lost or backend.busy or backend.swollen or backend.spent
        if backend.busy:
            backend.drop()
        backend.detach()
        await self._put_back(backend, broken=broken)

    async def _put_back(self, pipeline: Pipeline, broken: bool | None = None) -> None:
        """Return a connection that is off the loop to psycopg_pool, which replaces it if it is closed."""
        usable = not (pipeline.lost or pipeline.swollen or pipeline.spent) if broken is None else not broken
        if not (usable and pipeline.leave_pipeline()):
            await pipeline.connection.close()
        await self._source.putconn(pipeline.connection)
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
        for line in self._lines():
            if not line.busy:
                line.idle_ticks += 1
                if line.swollen or line.idle_ticks > _IDLE_TICKS:
                    line.retire()

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

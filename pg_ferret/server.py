"""A worker: one event loop, the sockets it was given, its share of connections to PostgreSQL.

The supervisor calls `serve` in a freshly forked process and talks to it through the control socket and SIGTERM.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Coroutine
from dataclasses import dataclass
from itertools import islice
from typing import Any

import structlog
import uvloop

from config.settings import Config
from pg_ferret import log
from pg_ferret.connection import Connection
from pg_ferret.engine.limits import conninfo, pool_limits
from pg_ferret.engine.pool import TICK_SECONDS, Pool
from pg_ferret.engine.scheduling import schedule
from pg_ferret.housekeeping import Housekeeper
from pg_ferret.listener import Adopter, Balance, Listener
from pg_ferret.parking import Parking
from pg_ferret.refusal import WAITING_AT_MOST, Refusal
from pg_ferret.state import backlog, directory
from pg_ferret.state.client import Client, Services
from pg_ferret.state.cursors import Cursors
from pg_ferret.status import State, StatusTable

_log = structlog.get_logger()
_BEAT_SECONDS = 0.25
# A client that has asked nothing for so long looks at its connection before it asks again.
_QUIET_SECONDS = 1.0
# How often a worker that leaves looks for clients that have not moved yet.
_MOVE_SECONDS = 0.05
_LAST_REQUEST_SECONDS = 1.0
_CONTROL_BYTES = 1 << 18
_MAX_LISTENERS = 250
_REFUSAL_LOG_SECONDS = 5.0
_MANY_CLIENTS = 256
_TRIM_SECONDS = 10.0
_NO_DESCRIPTORS = "too many connections for the limit of file descriptors (ulimit -n)"
# Beside clients and the pool: the loop's own, the registry, listeners old and new, clients that are being refused.
_KEPT_DESCRIPTORS = 64 + WAITING_AT_MOST
_libc = ctypes.CDLL(None)
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


if sys.version_info >= (3, 12):

    def _start(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that runs at once, up to its first wait."""
        return asyncio.Task(work, loop=loop, eager_start=True)

else:

    def _start(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task; it runs in the next turn of the loop."""
        return loop.create_task(work)


@dataclass(frozen=True, slots=True)
class Boot:
    """What the supervisor gives a worker at its birth."""

    slot: int
    config: Config
    listeners: dict[str, socket.socket]  # address as written -> listening socket
    control: socket.socket  # SEQPACKET: the new configuration, with the sockets that belong to it
    status: StatusTable
    channel: socket.socket  # to the launcher, for log lines
    handover: tuple[socket.socket, socket.socket]  # shared by all workers: clients go in at [0] and come out at [1]


def serve(boot: Boot) -> int:
    """Serve until SIGTERM and the end of the drain; returns the exit status."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(Worker(boot).run())
    return 0


class Worker:
    """The process's one object: starts, beats, changes its configuration, drains."""

    def __init__(self, boot: Boot) -> None:
        self._boot = boot
        self._slot = boot.status[boot.slot]
        self._clients: set[Connection] = set()
        self._arriving: set[asyncio.Task[None]] = set()
        self._listeners: dict[str, Listener] = {}
        self._accepted = 0
        self._number = boot.slot  # of the latest client
        self._most_clients = 0
        self._peak = 0  # clients with a transport at a time, since memory was given back
        self._trim_at = 0.0  # on the loop's clock: when memory is given back at the latest
        self._refusal_told = -_REFUSAL_LOG_SECONDS
        self._stop = asyncio.Event()
        self._fast = asyncio.Event()
        self._gone = asyncio.Event()
        self._when_left = self._left  # one for all clients: each would keep a bound method of its own

    async def run(self) -> None:
        """From birth to the end of the drain."""
        boot = self._boot
        self._loop = loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop.set)
        loop.add_signal_handler(signal.SIGINT, self._hurry)
        place = directory.path(boot.config)
        pool = Pool(conninfo(boot.config), pool_limits(boot.config), self._trouble, self._going_on)
        self._services = Services(boot.config, pool, Cursors(place), boot.status, boot.slot)
        self._balance = Balance(boot.status, boot.slot)
        self._set_limits(boot.config)
        if boot.config.server.documentdb is not None:
            await pool.open()
        keeper = Housekeeper(self._services, place)
        tasks = [loop.create_task(work) for work in (keeper.run(), self._tend())]
        self._parking = Parking(loop, self._connect)
        sweeping = loop.create_task(self._parking.run(self._clients))
        self._beat()
        self._watch_clients()
        loop.add_reader(boot.control.fileno(), self._controlled)
        self._listen(boot.listeners)
        adopter = Adopter("other workers", boot.handover[1].dup(), loop, self._balance, self._take_over)
        self._slot.set(state=State.READY)
        _log.info("ready")
        await self._stop.wait()
        adopter.close()
        sweeping.cancel()
        await self._drain()
        for task in tasks:
            task.cancel()
        keeper.close()
        self._parking.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(pool.close(), 1.0)
        self._next_beat.cancel()
        self._services.cursors.close()

    def _trouble(self, text: str) -> None:
        self._services.trouble(text)

    def _going_on(self, text: str, begins: bool) -> None:
        self._services.going_on(text, begins)

    # Clients.

    def _listen(self, sockets: dict[str, socket.socket]) -> None:
        """Accept on exactly these sockets."""
        for listener in self._listeners.values():
            listener.close()
        self._listeners = {
            address: Listener(address, listening, self._loop, self._balance, self._welcome)
            for address, listening in sockets.items()
        }

    def _welcome(self, accepted: socket.socket, peer: str) -> None:
        reason = self._reason_to_refuse()
        if reason:
            self._refuse(accepted, reason)
            return
        self._accepted += 1
        self._adopt(accepted, peer)

    def _take_over(self, accepted: socket.socket, peer: str) -> None:
        if len(self._clients) >= self._most_clients:
            self._refuse(accepted, _NO_DESCRIPTORS)
        else:
            self._adopt(accepted, peer)

    def _adopt(self, accepted: socket.socket, peer: str) -> None:
        """Serve a client, a new one or another worker's."""
        self._number += len(self._boot.status)
        self._count(+1)
        # Unique among the connections that are open at the same time.
        client = Client(self._services, self._number & 0x7FFFFFFF, peer)
        connection = Connection(client, self._loop, self._when_left)
        self._clients.add(connection)
        self._connect(connection, accepted)

    def _connect(self, connection: Connection, accepted: socket.socket) -> None:
        self._arrive(_start(self._loop, self._attach(connection, accepted)))

    def _reason_to_refuse(self) -> str:
        """Why there is no room for one more client; empty if there is."""
        if len(self._clients) >= self._most_clients:
            return _NO_DESCRIPTORS
        connections = sum(slot.get("connections") for slot in self._balance.workers())
        if connections >= self._services.config.settings.max_connections:
            return "too many connections (ferretdb.max_connections)"
        return ""

    def _refuse(self, accepted: socket.socket, reason: str) -> None:
        now = self._loop.time()
        if now >= self._refusal_told + _REFUSAL_LOG_SECONDS:
            self._refusal_told = now
            _log.warning("refusing clients", reason=reason)
            self._trouble(reason)
        self._services.counters.errors += 1
        if Refusal.waiting >= WAITING_AT_MOST:
            accepted.close()
            return
        work = self._loop.connect_accepted_socket(lambda: Refusal(reason, self._loop), accepted)
        self._arrive(self._loop.create_task(_attempt(work, accepted)))

    def _arrive(self, task: asyncio.Task[None]) -> None:
        self._arriving.add(task)
        task.add_done_callback(self._arriving.discard)

    async def _attach(self, connection: Connection, accepted: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: connection, accepted)
        except BaseException as error:
            accepted.close()
            self._left(connection)
            if not isinstance(error, OSError):  # the client may be gone already
                raise

    def _left(self, connection: Connection) -> None:
        if connection not in self._clients:
            return
        self._clients.discard(connection)
        self._count(-1)
        if not self._clients and self._stop.is_set():
            self._gone.set()

    def _count(self, change: int) -> None:
        # At once, not with the next heartbeat: the balance between workers depends on it.
        self._slot.add("connections", change)

    async def _drain(self) -> None:
        """Accept nobody and let every client go.

        Clients move to other workers between two requests and notice nothing.  If there is no other worker, closing a
        connection under a client's hands would cost it a failed request: those that have been quiet for a while go
        first (drivers look at such a connection before they use it again), and the others when they have become quiet
        or the time is up.
        """
        self._slot.set(state=State.DRAINING)
        self._listen({})
        for connection in self._clients:
            connection.touch()  # the last sweep may have asked a moment ago
        deadline = self._loop.time() + self._services.config.settings.graceful_timeout / 1000
        while self._clients and not self._fast.is_set() and self._loop.time() < deadline:
            if self._balance.others():
                seconds = _MOVE_SECONDS
                self._move(len(self._clients))
            else:
                seconds = _QUIET_SECONDS
                self._parking.touch_stirred()
                for connection in tuple(self._clients):
                    connection.stay()
                    connection.close_if_quiet()
            await self._pause(min(seconds, deadline - self._loop.time()), self._gone, self._fast)
        for connection in tuple(self._clients):
            connection.drain()
        await self._pause(_LAST_REQUEST_SECONDS, self._gone)
        for connection in tuple(self._clients):
            connection.abort()
        self._close_unadopted()
        self._slot.set(state=State.STOPPING)

    def _move(self, most: int) -> None:
        """Have so many clients go to other workers, as soon as each is between two requests."""
        for connection in tuple(islice(self._clients, most)):
            connection.move(self._hand_over)

    def _hand_over(self, descriptor: int) -> bool:
        try:
            socket.send_fds(self._boot.handover[0], [b"c"], [descriptor], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            return False  # too many are under way
        return True

    def _close_unadopted(self) -> None:
        """The last worker to leave takes along those that were handed over to one that then left as well."""
        while not self._balance.others():
            try:
                _, descriptors, _, _ = socket.recv_fds(self._boot.handover[1], 16, 1, socket.MSG_DONTWAIT)
            except OSError:
                return
            for descriptor in descriptors:
                os.close(descriptor)

    async def _pause(self, seconds: float, *events: asyncio.Event) -> None:
        """Until one of the events or the time."""
        if not self._clients:
            return
        waits = [self._loop.create_task(event.wait()) for event in events]
        await asyncio.wait(waits, timeout=max(0.0, seconds), return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    def _hurry(self) -> None:
        """PostgreSQL is stopping: only the requests at hand count."""
        self._fast.set()
        self._stop.set()

    # The supervisor.

    def _controlled(self) -> None:
        """A new configuration, or the end of the supervisor."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._boot.control, _CONTROL_BYTES, _MAX_LISTENERS)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data, descriptors = b"", []
        if not data:
            self._loop.remove_reader(self._boot.control.fileno())
            self._stop.set()
            return
        message = json.loads(data)
        sockets = [socket.socket(fileno=descriptor) for descriptor in descriptors]
        for inherited in sockets:
            inherited.setblocking(False)
        if not self._stop.is_set():
            self._listen(dict(zip(message["listeners"], sockets, strict=True)))
        self._configure(Config.of(message["config"]))

    def _configure(self, config: Config) -> None:
        services = self._services
        services.config = config
        self._set_limits(config)
        log.configure(self._boot.channel, config.settings.log_level, f"worker {self._boot.slot}")
        self._arrive(self._loop.create_task(self._follow(config)))

    def _set_limits(self, config: Config) -> None:
        settings = config.settings
        account = self._services.backlog
        account.timeout = settings.client_timeout / 1000
        account.limit = (settings.client_memory << 20) // settings.worker_count()
        schedule(0, batch=settings.batch_scheduling)
        # Some descriptors are kept back, so that a client too many can be told and PostgreSQL be reached.
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most_clients = descriptors - _KEPT_DESCRIPTORS - pool_limits(config).largest

    async def _follow(self, config: Config) -> None:
        """Bring the pool in line with a new configuration."""
        engine = self._services.engine
        if config.server.documentdb is not None:
            await engine.open()
        await engine.resize(pool_limits(config))

    # The status table.

    def _beat(self) -> None:
        """Tell that the loop turns, and what it has done."""
        self._next_beat = self._loop.call_later(_BEAT_SECONDS, self._beat)
        self._slot.beat()
        services = self._services
        counters, engine = services.counters, services.engine
        self._slot.set(
            connections_total=self._accepted,
            requests=counters.requests,
            errors=counters.errors,
            in_flight=counters.in_flight,
            bytes_in=counters.bytes_in,
            bytes_out=counters.bytes_out,
            cursors=services.cursors.count(),
            pool_size=engine.size,
            pool_in_use=engine.in_use,
            pool_waiting=engine.waiting,
            rss=_resident_bytes(),
        )

    async def _tend(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._services.unordered.clear()
            try:
                await self._services.engine.tend()
            except Exception:  # it is needed for ever
                _log.exception("tending the connections to PostgreSQL failed and will be tried again")

    def _watch_clients(self) -> None:
        self._loop.call_later(backlog.TICK_SECONDS, self._watch_clients)
        self._services.backlog.tick()
        self._give_back()
        if self._balance.ahead() and not self._stop.is_set():
            self._move(self._balance.excess())

    def _give_back(self) -> None:
        """Memory of past peaks goes back to the system: glibc alone would keep it for the next ones."""
        count = len(self._clients) - len(self._parking)
        self._peak = max(self._peak, count)
        now = self._loop.time()
        if self._peak - count >= _MANY_CLIENTS or now >= self._trim_at:
            self._peak = count
            self._trim_at = now + _TRIM_SECONDS
            _libc.malloc_trim(0)


async def _attempt(work: Coroutine[Any, Any, object], accepted: socket.socket) -> None:
    """A client may be gone before it is attached."""
    try:
        await work
    except OSError:
        accepted.close()


def _resident_bytes() -> int:
    statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)  # open() would make seven calls of three
    try:
        return int(os.read(statm, 128).split()[1]) * _PAGE_BYTES
    finally:
        os.close(statm)

"""The workers as processes: carries out what supervisor/plan.py decides, and keeps their status slots.

``supervisor/prefork.py`` owns the one Crew.  fork, kill, waitpid and the clock come from outside (``System``), so
that tests need no process and no sleep.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import structlog

from config.settings import Config
from pg_ferret.status import NULL, Kind, State, StatusTable
from supervisor import child, plan
from supervisor.plan import Action, Drain, Kill, Limits, Process, Release, Seat, Start

logger = structlog.get_logger()

# One decision may follow from another (a worker has left its place to its successor), but never for ever.
_FOLLOW_UPS = 3


@dataclass(frozen=True, slots=True)
class System:
    """The operating system, as far as the supervisor uses it."""

    fork: Callable[[], int] = os.fork
    kill: Callable[[int, int], None] = os.kill
    waitpid: Callable[[int, int], tuple[int, int]] = os.waitpid
    clock: Callable[[], float] = time.monotonic


@dataclass(frozen=True, slots=True)
class Orders:
    """What every worker works by: the newest configuration and the sockets to accept on."""

    config: Config
    listeners: Mapping[str, socket.socket] = field(default_factory=dict)

    def message(self, addresses: list[str]) -> bytes:
        """The control message; the descriptors of ``addresses`` ride along in the same order."""
        return json.dumps({"config": self.config.plain(), "listeners": addresses}).encode()


class Crew:
    """The worker seats and what belongs to a living worker: its process and its control socket."""

    def __init__(self, table: StatusTable, channel: socket.socket, work: child.Work, system: System) -> None:
        self.seats = tuple(Seat(index) for index in range(1, len(table)))
        self.orders: Orders | None = None
        # What a child must not keep open, besides the other workers' control sockets.
        self.private: list[socket.socket] = []
        self._table = table
        self._channel = channel
        self._work = work
        self._system = system
        self._controls: dict[int, socket.socket] = {}
        # Through it a worker that leaves hands its clients to the others; datagrams, so that one is one client.
        self._handover = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._untold: set[int] = set()
        self._reported = ""
        self._farewell = signal.SIGTERM  # drain: clients are left time to go

    def hurry(self) -> None:
        """From now on workers are told to finish their requests and go, not to wait for quiet clients."""
        self._farewell = signal.SIGINT

    @property
    def alive(self) -> int:
        """How many workers exist, draining ones included."""
        return sum(seat.process is not None for seat in self.seats)

    def booting(self, now: float) -> bool:
        """Whether a worker was started lately and isn't ready yet."""
        processes = [seat.process for seat in self.seats if seat.process]
        return any(not process.ready and now - process.born < plan.BOOT_TIMEOUT for process in processes)

    def observe(self) -> None:
        """Read what the workers say of themselves."""
        for seat in self.seats:
            if seat.process:
                slot = self._table[seat.slot]
                seat.process.ready = seat.process.ready or slot.get("state") == State.READY
                seat.process.beat = slot.get("heartbeat") / 1e9
                seat.process.requests = slot.get("requests")

    def step(self, limits: Limits) -> None:
        """Do all that is due; needs ``orders`` once a worker is wanted."""
        now = self._system.clock()
        for _ in range(_FOLLOW_UPS):
            actions = plan.decide(self.seats, limits, now)
            for action in actions:
                self._carry_out(action, now)
            if not actions:
                break
        self._tell()

    def _carry_out(self, action: Action, now: float) -> None:
        match action:
            case Start(seat):
                self._start(seat, now)
            case Drain(seat):
                self._drain(seat, now)
            case Release(seat):
                self._release(seat)
            case Kill(seat, number, reason):
                self._kill(seat, number, reason, now)

    def replace_all(self) -> None:
        """Have every worker there is replaced, each when its successor serves."""
        for seat in self.seats:
            if seat.process:
                seat.process.outdated = True

    def give(self, orders: Orders) -> None:
        """New orders, for the workers there are and for those to come; `step` passes them on."""
        self.orders = orders
        self._untold = set(self._controls)

    def retry_now(self) -> None:
        """Forget every wait: whoever changed the configuration may have mended what was wrong."""
        self._reported = ""
        for seat in self.seats:
            if seat.retry is not None:
                seat.retry, seat.failures = self._system.clock(), 0

    def reap(self) -> bool:
        """Bury the workers that have ended; tells whether one of them had not even been able to start."""
        unable = False
        for seat in self.seats:
            if seat.process:
                pid, wait_status = self._system.waitpid(seat.process.pid, os.WNOHANG)
                if pid:
                    self._bury(seat, seat.process, wait_status)
                    unable |= os.WIFEXITED(wait_status) and os.WEXITSTATUS(wait_status) == plan.BOOT_FAILED
        return unable

    def close(self) -> None:
        """Close the control sockets and the one between the workers."""
        while self._controls:
            self._controls.popitem()[1].close()
        for sock in self._handover:
            sock.close()

    # -- one worker ---------------------------------------------------------------------------------------------

    def _start(self, seat: Seat, now: float) -> None:
        assert self.orders is not None
        seat.retry = None
        seat.generation += 1
        seat.process = Process(pid=0, born=now, luck=random.random())
        self._mark_starting(seat, now)
        try:
            pid, control = self._fork(seat)
        except OSError as error:  # out of processes, memory or descriptors: some may be given back soon
            logger.error("cannot fork a worker", slot=seat.slot, error=error.strerror)
            self._leave(seat, None, f"fork: {error.strerror}", now)
            return
        seat.process.pid = pid
        self._table[seat.slot].set(pid=pid)
        self._controls[seat.slot] = control
        logger.debug("worker started", slot=seat.slot, pid=pid, generation=seat.generation)

    def _fork(self, seat: Seat) -> tuple[int, socket.socket]:
        """The worker's pid and our end of its control socket; in the worker this never returns."""
        assert self.orders is not None
        parent = os.getpid()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        theirs.setblocking(False)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = self._system.fork()
            if pid == 0:
                config, listeners = self.orders.config, dict(self.orders.listeners)
                spawn = child.Spawn(seat.slot, config, listeners, theirs, self._table, self._channel, self._handover)
                child.enter(spawn, self._work, parent, [ours, *self._controls.values(), *self.private])
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pid, ours

    def _mark_starting(self, seat: Seat, now: float) -> None:
        """Before the fork, so that nothing the worker writes is overwritten."""
        slot = self._table[seat.slot]
        last_exit = slot.last_exit
        slot.clear()
        slot.last_exit = last_exit
        slot.set(
            kind=Kind.WORKER,
            slot=seat.slot,
            state=State.STARTING,
            started=time.time_ns() // 1000,
            heartbeat=int(now * 1e9),
            generation=seat.generation,
            restarts=seat.restarts,
        )

    def _drain(self, seat: Seat, now: float) -> None:
        assert seat.process is not None
        seat.process.draining = now
        self._table[seat.slot].set(state=State.DRAINING)
        self._signal(seat.process, self._farewell)

    def _release(self, seat: Seat) -> None:
        seat.retry = None
        seat.failures = 0
        self._table[seat.slot].clear()

    def _kill(self, seat: Seat, number: signal.Signals, reason: str, now: float) -> None:
        process = seat.process
        assert process is not None
        if number == signal.SIGKILL:
            process.killed = True
        else:
            process.aborted = now
        logger.warning("ending worker", slot=seat.slot, pid=process.pid, signal=number.name, reason=reason)
        self._signal(process, number)
        if number == signal.SIGABRT:
            self._signal(process, signal.SIGCONT)  # a stopped process could not write its stack

    def _signal(self, process: Process, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._system.kill(process.pid, number)

    def _bury(self, seat: Seat, process: Process, wait_status: int) -> None:
        how = plan.exit_text(wait_status)
        status = os.WEXITSTATUS(wait_status) if os.WIFEXITED(wait_status) else None
        words = self._last_words(seat)
        asked = self._leave(seat, status, how, self._system.clock())
        if asked:
            logger.info("worker left", slot=seat.slot, pid=process.pid, exit=how)
        elif status == plan.BOOT_FAILED and words and words == self._reported:
            logger.debug("worker cannot start, as before", slot=seat.slot, pid=process.pid)
        elif status == plan.BOOT_FAILED and words:
            self._reported = words
            logger.error("worker cannot start, will be retried", slot=seat.slot, pid=process.pid, exception=words)
        else:
            logger.warning("worker ended unexpectedly", slot=seat.slot, pid=process.pid, exit=how)

    def _leave(self, seat: Seat, status: int | None, how: str, now: float) -> bool:
        """Empty the seat and show it; True if the worker had been asked to leave."""
        asked = not plan.bury(seat, status, now)
        slot = self._table[seat.slot]
        message = slot.message
        slot.clear()
        if not asked:
            slot.set(kind=Kind.WORKER, slot=seat.slot, state=State.BACKOFF, heartbeat=NULL)
            slot.set(generation=seat.generation, restarts=seat.restarts)
            slot.message, slot.last_exit = message, how
        return asked

    # -- control sockets ----------------------------------------------------------------------------------------

    def _last_words(self, seat: Seat) -> str:
        """The trace a worker left that could not start; its control socket is closed."""
        control = self._controls.pop(seat.slot, None)
        self._untold.discard(seat.slot)
        if control is None:
            return ""
        with control:
            for _ in range(2):  # ECONNRESET comes once, before the message, if the worker had unread mail
                try:
                    return control.recv(child.LAST_WORDS_BYTES).decode("utf-8", "replace")
                except ConnectionResetError:
                    continue
                except OSError:
                    break
        return ""

    def _tell(self) -> None:
        """Send the orders to those who don't have them; a full control socket is tried again next round."""
        if not self._untold or self.orders is None:
            return
        # Those who leave must neither begin to accept again nor take a larger part of the connections.
        leaving = {seat.slot for seat in self.seats if seat.process and seat.process.draining is not None}
        self._untold -= leaving
        for index in sorted(self._untold):
            listeners = self.orders.listeners
            message = self.orders.message(list(listeners))
            descriptors = [sock.fileno() for sock in listeners.values()]
            try:
                socket.send_fds(self._controls[index], [message], descriptors, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                continue
            except OSError:
                pass  # it has just died: reap() will tell
            self._untold.discard(index)

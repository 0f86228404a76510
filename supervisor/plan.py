"""What to do with the workers: pure decisions over the seats, a clock and the limits in force.

A seat is one worker slot of the status table.  Nothing here forks, kills, sleeps or looks at a real clock;
supervisor/crew.py carries the actions out and tells the seats what came of them.  Times are seconds of one
monotonic clock.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# A worker that could not start says so by this exit status.
BOOT_FAILED = 3
# A process that lives shorter than this died early.  Short, so that kill -9 in a test or by a nervous
# operator is not taken for a crash loop.
EARLY_DEATH = 2.0
CRASH_BACKOFF = 0.25
BOOT_BACKOFF = 1.0
LONGEST_BACKOFF = 30.0
# From SIGABRT (the stack goes to the log) to SIGKILL.
ABORT_GRACE = 1.0
# A machine too busy to start Python quickly is no hung worker, however small worker_timeout is.
BOOT_TIMEOUT = 10.0


@dataclass(slots=True)
class Process:
    """A living worker."""

    pid: int
    born: float
    ready: bool = False  # observed in the status table
    beat: float = 0.0  # its last heartbeat, observed in the status table
    draining: float | None = None  # asked to leave at this time
    aborted: float | None = None  # found hung at this time
    killed: bool = False
    requests: int = 0  # answered so far, observed in the status table
    luck: float = 0.0  # its part of the jitter, from 0 to 1
    outdated: bool = False  # somebody asked for its replacement


@dataclass(slots=True)
class Seat:
    """One worker slot: its process, or the time until which it waits for the next one, or neither."""

    slot: int
    process: Process | None = None
    retry: float | None = None
    generation: int = 0
    restarts: int = 0
    failures: int = 0  # early deaths in a row

    @property
    def serving(self) -> bool:
        """Whether the seat counts as one of the wanted workers."""
        return self.retry is not None or (self.process is not None and self.process.draining is None)

    @property
    def free(self) -> bool:
        """Whether a new worker may take the seat."""
        return self.process is None and self.retry is None


@dataclass(frozen=True, slots=True)
class Limits:
    """What the settings say; ``awake`` is when the supervisor itself last came back from a long sleep."""

    wanted: int
    worker_timeout: float
    graceful_timeout: float
    awake: float = 0.0
    max_requests: int = 0
    max_requests_jitter: int = 0


@dataclass(frozen=True, slots=True)
class Start:
    """Fork a worker into the seat."""

    seat: Seat


@dataclass(frozen=True, slots=True)
class Drain:
    """Ask the worker to finish its requests and leave."""

    seat: Seat


@dataclass(frozen=True, slots=True)
class Release:
    """Stop waiting to start the seat's next worker: it isn't wanted any more."""

    seat: Seat


@dataclass(frozen=True, slots=True)
class Kill:
    """End the worker by a signal; ``reason`` is for the log."""

    seat: Seat
    signal: signal.Signals
    reason: str


Action = Start | Drain | Release | Kill


def decide(seats: Sequence[Seat], limits: Limits, now: float) -> list[Action]:
    """Everything that is due now, kills first; nothing is changed."""
    overdue = (_overdue(seat, seat.process, limits, now) for seat in seats if seat.process)
    return [*(kill for kill in overdue if kill), *_staff(seats, limits, now)]


def _overdue(seat: Seat, process: Process, limits: Limits, now: float) -> Kill | None:
    if process.killed:
        return None
    if process.draining is not None and now - process.draining >= limits.graceful_timeout:
        return Kill(seat, signal.SIGKILL, "still there after ferretdb.graceful_timeout")
    if process.aborted is not None:
        return Kill(seat, signal.SIGKILL, "hung") if now - process.aborted >= ABORT_GRACE else None
    silent = now - max(process.beat, process.born, limits.awake)
    patience = limits.worker_timeout if process.ready else max(limits.worker_timeout, BOOT_TIMEOUT)
    if silent <= patience:
        return None
    return Kill(seat, signal.SIGABRT, f"no heartbeat for {silent:.1f} s, see ferretdb.worker_timeout")


def _staff(seats: Sequence[Seat], limits: Limits, now: float) -> Iterable[Action]:
    """Grow into the lowest free seats; shrink from those that wait to start, then from the highest.

    Workers that are to be replaced leave one by one, each only when its successor serves.
    """
    wanted = limits.wanted
    serving = [seat for seat in seats if seat.serving]
    free = [seat for seat in seats if seat.free]
    retiring = [seat for seat in serving if seat.process and retires(seat.process, limits)]
    ready = sum(seat.process is not None and seat.process.ready for seat in serving)
    most = wanted + 1 if retiring and wanted else wanted
    # A successor is started when everybody is there.
    yield from (Start(seat) for seat in free[: max(0, (most if ready >= wanted else wanted) - len(serving))])
    if ready > wanted < most:
        yield Drain(retiring[0])
    else:
        serving.sort(key=lambda seat: (seat.retry is not None, seat in retiring, seat.slot))
        yield from (Release(seat) if seat.process is None else Drain(seat) for seat in serving[most:])
        serving = serving[:most]
    yield from (Start(seat) for seat in serving if seat.retry is not None and seat.retry <= now)


def retires(process: Process, limits: Limits) -> bool:
    """Whether the process is to be replaced, though nothing is wrong with it."""
    most = limits.max_requests + process.luck * limits.max_requests_jitter
    return process.outdated or (limits.max_requests > 0 and process.requests >= most)


def deadline(seats: Iterable[Seat], limits: Limits) -> float:
    """When ``decide`` next has something to do for which no signal comes; infinity if nothing is planned.

    A heartbeat that stops is found at the supervisor's once-a-second look, not here.
    """
    times = [float("inf")]
    for seat in seats:
        process = seat.process
        if process is None:
            times += [] if seat.retry is None else [seat.retry]
        elif not process.killed:
            times += [] if process.draining is None else [process.draining + limits.graceful_timeout]
            times += [] if process.aborted is None else [process.aborted + ABORT_GRACE]
    return min(times)


def bury(seat: Seat, exit_status: int | None, now: float) -> bool:
    """Note that the seat's process has ended; True if it had not been asked to.

    ``exit_status`` is None for a death by signal.
    """
    process = seat.process
    assert process is not None
    seat.process = None
    if process.draining is not None:
        seat.failures = 0
        return False
    seat.restarts += 1
    boot_failed = exit_status == BOOT_FAILED
    early = boot_failed or now - process.born < EARLY_DEATH
    seat.failures = seat.failures + 1 if early else 0
    seat.retry = now + backoff(seat.failures, boot_failed)
    return True


def backoff(failures: int, boot_failed: bool) -> float:
    """Seconds to wait after so many early deaths in a row: the first crash is replaced at once."""
    if boot_failed:
        return min(LONGEST_BACKOFF, BOOT_BACKOFF * 2.0 ** min(failures - 1, 10))
    return min(LONGEST_BACKOFF, CRASH_BACKOFF * 2.0 ** min(failures - 2, 10)) if failures > 1 else 0.0


def exit_text(wait_status: int) -> str:
    """``exit 3`` or ``signal KILL``, as last_exit shows it."""
    code = os.waitstatus_to_exitcode(wait_status)
    if code >= 0:
        return f"exit {code}"
    try:
        return f"signal {signal.Signals(-code).name.removeprefix('SIG')}"
    except ValueError:
        return f"signal {-code}"

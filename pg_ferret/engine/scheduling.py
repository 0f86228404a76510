"""How the kernel schedules the worker and the PostgreSQL backends that serve it, and what it tells of them."""

from __future__ import annotations

import contextlib
import os
from time import monotonic, thread_time
from typing import NamedTuple


def schedule(pid: int, *, batch: bool) -> None:
    """Have process ``pid`` (0: this one) scheduled as batch work, or ordinarily again; see sched(7).

    A batch process does not interrupt another one the moment it is woken.  A request goes from client to worker to
    backend and back: if each of them interrupts the one before, every wakeup costs two switches and serves a single
    request; if not, what has come in the meantime is served in one go.  Any other policy was chosen by somebody and
    stays.  A backend belongs to the same user as the worker, so no privilege is needed; one that has just ended is
    passed over.
    """
    now, wanted = (os.SCHED_OTHER, os.SCHED_BATCH) if batch else (os.SCHED_BATCH, os.SCHED_OTHER)
    with contextlib.suppress(OSError):
        if os.sched_getscheduler(pid) == now:
            os.sched_setscheduler(pid, wanted, os.sched_param(0))


class Work(NamedTuple):
    """What a process has done so far, in seconds; the rest of its life it has slept."""

    ran: float
    waited: float  # it could have run, and others did


def work_of(pid: int) -> Work | None:
    """What process ``pid`` has done; None if it has ended, or the kernel keeps no account.

    These are the first two numbers of proc_pid_schedstat(5), in nanoseconds.
    """
    try:
        file = os.open(f"/proc/{pid}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        ran, waited, _ = map(int, os.read(file, 128).split())
    except (OSError, ValueError):
        return None
    finally:
        os.close(file)
    return Work(ran * 1e-9, waited * 1e-9) if ran else None


class Stopwatch:
    """How long PostgreSQL takes for something: the time it works, and what it waits for a disk or a lock.

    On a slow or busy machine most of the time passes otherwise, and says nothing of what was asked for: PostgreSQL
    waits for a processor, or its answer waits until this process comes to read it.  The latter can be told from a disk
    only while this process sleeps, so whoever has been busy all the time learns of no disk.
    """

    __slots__ = ("_awake", "_began", "_pid", "_work")

    def start(self, pid: int) -> None:
        """It begins now, in process ``pid``."""
        self._pid = pid
        self._work = work_of(pid)
        self._awake = awake()
        self._began = monotonic()

    def seconds(self) -> float:
        """From the start until now."""
        taken = monotonic() - self._began
        before, after = self._work, work_of(self._pid)
        if before is None or after is None:
            return taken
        ran = after.ran - before.ran
        asleep = taken - ran - (after.waited - before.waited)
        return ran + max(0.0, asleep - (awake() - self._awake))


def awake() -> float:
    """For how long this process has not slept so far, in seconds."""
    work = work_of(os.getpid())
    # What a process has run is accounted for when it is interrupted: not up to now, if it is this one.
    return thread_time() + (0.0 if work is None else work.waited)

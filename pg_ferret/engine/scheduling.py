"""How the kernel schedules the worker and the PostgreSQL backends that serve it, and what it tells of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
from functools import cache
from time import monotonic, thread_time
from typing import NamedTuple

# The longest turn of the loop is remembered for once or twice as long.
_SPAN_SECONDS = 0.25


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


def _open(pid: int) -> int:
    return os.open(f"/proc/{pid}/schedstat", os.O_RDONLY | os.O_CLOEXEC)


# This process's own stays open: to open it takes five times as long as to read it.
_open_own = cache(_open)


def work_of(pid: int) -> Work | None:
    """What process ``pid`` has done; None if it has ended, or the kernel keeps no account.

    These are the first two numbers of proc_pid_schedstat(5), in nanoseconds.
    """
    own = pid == os.getpid()
    try:
        file = _open_own(pid) if own else _open(pid)
    except OSError:
        return None
    try:
        ran, waited, _ = map(int, os.pread(file, 128, 0).split())
    except (OSError, ValueError):
        return None
    finally:
        if not own:
            os.close(file)
    return Work(ran * 1e-9, waited * 1e-9) if ran else None


class Done(NamedTuple):
    """What PostgreSQL and this process have done in some time, in seconds."""

    ran: float  # PostgreSQL
    waited: float  # it, for a processor
    ours_waited: float  # this process, for a processor


class Account:
    """What a process of PostgreSQL and this one do from now on."""

    __slots__ = ("_its", "_ours", "_pid")

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._its, self._ours = work_of(pid), work_of(os.getpid())

    def done(self, *, anew: bool = False) -> Done | None:
        """So far; ``anew``: the next time it is from now on.  None as `work_of`."""
        before, ours = self._its, self._ours
        after, ours_after = work_of(self._pid), work_of(os.getpid())
        if anew:
            self._its, self._ours = after, ours_after
        if before is None or after is None or ours is None or ours_after is None:
            return None
        return Done(after.ran - before.ran, after.waited - before.waited, ours_after.waited - ours.waited)


class Lag:
    """For how long an answer may lie in its socket before this process reads it: one turn of its event loop.

    A process that is busy is not late for that, if its turns are short.  What it waits for a processor comes on top of
    that.
    """

    __slots__ = ("_before", "_longest", "_looking", "_loop", "_since", "_until", "seconds")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._looking = False
        self._since = 0.0
        self._until = 0.0  # the end of this span
        self._longest = self._before = 0.0  # in this span, and in the one before
        self.seconds = 0.0  # that it worked in the longest turn of these, as far as turns have been seen

    def look(self) -> None:
        """See for how long it works in the next turn."""
        if not self._looking:
            self._looking = True
            self._loop.call_soon(self._begin)

    def _begin(self) -> None:
        self._since = thread_time()
        self._loop.call_soon(self._seen)

    def _seen(self) -> None:
        self._looking = False
        now = monotonic()
        if now >= self._until:
            self._before = self._longest if now < self._until + _SPAN_SECONDS else 0.0
            self._longest = 0.0
            self._until = now + _SPAN_SECONDS
        self._longest = max(self._longest, thread_time() - self._since)
        self.seconds = max(self._longest, self._before)


class Stopwatch:
    """How long PostgreSQL takes for something: the time it works, and what it waits for a disk or a lock.

    On a slow or busy machine most of the time passes otherwise, and says nothing of what was asked for: PostgreSQL or
    this process waits for a processor, or the answer lies there until this process comes to read it.
    """

    __slots__ = ("_account", "_began", "_cpu")

    def start(self, pid: int) -> None:
        """It begins now, in process ``pid``."""
        self._account = Account(pid)
        self._cpu = thread_time()
        self._began = monotonic()

    def seconds(self, lag: float) -> float:
        """From the start until now, when an answer is read that may have come so much earlier."""
        taken = monotonic() - self._began
        done = self._account.done()
        if done is None:
            return taken
        return done.ran + max(0.0, taken - sum(done) - min(lag, thread_time() - self._cpu))

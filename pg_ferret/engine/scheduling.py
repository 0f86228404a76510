"""How the kernel schedules the worker and the PostgreSQL backends that serve it."""

from __future__ import annotations

import contextlib
import os
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
    """What a process has done so far."""

    seconds: float  # on a processor
    sleeps: int  # waits for anything else: a request, a lock, a disk


def work(pid: int) -> Work | None:
    """What process ``pid`` has done; None if it has ended, or the kernel does not say.

    See proc_pid_schedstat(5) and proc_pid_status(5).
    """
    try:
        seconds = int(_read(pid, "schedstat").split(maxsplit=1)[0]) * 1e-9
        sleeps = int(_read(pid, "status").rpartition(b"\nvoluntary_ctxt_switches:")[2].split(maxsplit=1)[0])
    except (OSError, ValueError, IndexError):
        return None
    return Work(seconds, sleeps)


def _read(pid: int, name: str) -> bytes:
    file = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(file, 4096)
    finally:
        os.close(file)

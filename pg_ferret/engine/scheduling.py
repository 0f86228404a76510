"""How the kernel schedules the worker and the PostgreSQL backends that serve it."""

from __future__ import annotations

import contextlib
import os


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

"""A worker's first steps after the fork: become an independent process, then serve, and never return."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import structlog

from config.settings import Config
from pg_ferret import log
from pg_ferret.status import State, StatusTable
from supervisor.plan import BOOT_FAILED

# Fits into one log line; the end of a trace says more than its beginning.
LAST_WORDS_BYTES = log.MAX_LINE_BYTES // 2
_PR_SET_PDEATHSIG = 1
# Loaded before any fork: the child should do as little as it can before it is tied to its parent's life.
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Spawn:
    """What a worker is given: the fields of ``pg_ferret.server.Boot``."""

    slot: int
    config: Config
    listeners: Mapping[str, socket.socket]
    control: socket.socket
    status: StatusTable
    channel: socket.socket
    handover: tuple[socket.socket, socket.socket]


Work = Callable[[Spawn], int]


def die_with_parent() -> None:
    """Have the kernel send SIGKILL when the parent dies: it ends a stopped process too, SIGTERM would not."""
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def enter(spawn: Spawn, work: Work, parent: int, others: Iterable[socket.socket]) -> NoReturn:
    """Run ``work`` in the process just forked and exit with what it returns.

    ``parent`` is the supervisor's pid, ``others`` its ends of control sockets and its wakeup pipe.  Call with all
    signals blocked: until the handlers are the default ones again, a SIGTERM would go to the supervisor's queue.
    """
    status = BOOT_FAILED
    try:
        die_with_parent()
        if os.getppid() != parent:
            os._exit(status)  # it died before prctl: no signal will come
        _forget_supervisor(others)
        log.configure(spawn.channel, spawn.config.settings.log_level, f"worker {spawn.slot}")
        status = work(spawn)
    except BaseException as error:  # SystemExit and KeyboardInterrupt as well: nothing may climb back into the loop
        status = _report(spawn, error)
    finally:
        _exit(status)


def _exit(status: int) -> NoReturn:
    try:
        sys.stderr.flush()
    finally:
        os._exit(status)  # whatever happens: the supervisor's loop is further up this stack


def _forget_supervisor(others: Iterable[socket.socket]) -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    for sock in others:
        sock.close()
    faulthandler.enable()  # SIGABRT, with which a hung worker is ended, then writes every stack to stderr
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _report(spawn: Spawn, error: BaseException) -> int:
    """Show the error in the slot; give the trace of a failed start to the supervisor, which logs it once for all."""
    slot = spawn.status[spawn.slot]
    slot.message = f"{type(error).__name__}: {error}"
    if slot.get("state") != State.STARTING:
        structlog.get_logger().exception("worker failed", exc_info=error)
        return 1
    trace = "".join(traceback.format_exception(error))
    try:
        spawn.control.send(trace.encode("utf-8", "backslashreplace")[-LAST_WORDS_BYTES:])
    except OSError:
        structlog.get_logger().error("worker cannot start", exc_info=error)
    return BOOT_FAILED

"""A settings message is checked in a process of its own, which ends with it.

The checks are pydantic's: neither the supervisor nor a worker needs it for anything else, and it would take 10 MB of
them.  It is loaded anew for each message, so an upgrade of it on disk meets the settings' definitions in memory: if the
two do not fit, the running configuration stays in force until the supervisor is started anew.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import time
from typing import NoReturn

from config.settings import Config
from supervisor.child import die_with_parent
from supervisor.plan import exit_text

# A machine too busy to import a library in this time is too busy to change its settings.
PATIENCE_SECONDS = 10.0
_VALID, _REFUSED, _FAILED = b"+", b"-", b"!"


class Vetting:
    """One message under examination: `result` or `end` must be called, once."""

    def __init__(self, text: bytes) -> None:
        """Begin.  Raises OSError when there can be no process."""
        self.text = text
        self.deadline = time.monotonic() + PATIENCE_SECONDS
        self._answer = bytearray()
        self._complete = False
        parent = os.getpid()
        self.socket, answer = socket.socketpair()
        self.socket.setblocking(False)
        # They stay blocked in the new process: a signal there would be queued here, by the socket that both have.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._pid = os.fork()
            if self._pid == 0:
                _vet(text, answer, parent)
        except OSError:
            self.socket.close()
            raise
        finally:
            answer.close()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def done(self) -> bool:
        """Whether the verdict is there, or the time is up; to be asked when `socket` can be read, and at `deadline`."""
        while not self._complete:
            try:
                piece = self.socket.recv(1 << 16)
            except BlockingIOError:
                return time.monotonic() >= self.deadline
            self._answer += piece
            self._complete = not piece
        return True

    def result(self) -> Config:
        """Wait until it is done.  Raises ValueError for a message that is refused, RuntimeError for one that cannot be
        checked."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        while not self.done():
            poll.poll(max(0.0, self.deadline - time.monotonic()) * 1000)
        status = self.end()
        if not self._complete:
            raise RuntimeError(f"this took more than {PATIENCE_SECONDS:g} s")
        if status:
            raise RuntimeError(f"the process that does it ended by {exit_text(status)}")
        verdict, text = self._answer[:1], self._answer[1:]
        if verdict == _VALID:
            return Config.of(json.loads(text))
        if verdict == _REFUSED:
            raise ValueError(text.decode("utf-8", "replace"))
        raise RuntimeError(text.decode("utf-8", "replace"))

    def end(self) -> int:
        """Have the process gone, whether it is done or not; its wait status."""
        self.socket.close()
        if not self._complete:
            os.kill(self._pid, signal.SIGKILL)
        return os.waitpid(self._pid, 0)[1]


def _vet(text: bytes, answer: socket.socket, parent: int) -> NoReturn:
    status = 1
    try:
        die_with_parent()
        # An address that is closed meanwhile must not seem open because of us.
        os.closerange(3, answer.fileno())
        os.closerange(answer.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        if os.getppid() == parent:
            answer.sendall(_verdict(text))
            status = 0
    finally:
        os._exit(status)


def _verdict(text: bytes) -> bytes:
    try:
        from config.check import checked

        return _VALID + json.dumps(checked(text).plain()).encode()
    except ValueError as error:
        return _REFUSED + str(error).encode("utf-8", "backslashreplace")
    except Exception as error:
        return _FAILED + f"{type(error).__name__}: {error}".encode("utf-8", "backslashreplace")

"""A settings message is checked in a process of its own, which ends with it.

The checks are pydantic's, 10 MB that neither the supervisor nor a worker needs for anything else.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
from typing import NoReturn

from config.settings import Config
from supervisor.child import die_with_parent

# A machine too busy to import a library in this time is too busy to change its settings.
_SECONDS = 20.0
_VALID, _REFUSED, _FAILED = b"+", b"-", b"!"


class Vetting:
    """One message under examination; `result` must be called once."""

    def __init__(self, text: bytes) -> None:
        """Begin.  Raises OSError when there can be no process."""
        parent = os.getpid()
        self._answer, answer = os.pipe()
        # They stay blocked in the new process: a signal there would be queued here, by the pipe that both have.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._pid = os.fork()
            if self._pid == 0:
                _vet(text, answer, parent)
        except OSError:
            os.close(self._answer)
            raise
        finally:
            os.close(answer)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def result(self) -> Config:
        """Wait for the end.  Raises ValueError for a message that is refused, RuntimeError if it cannot be checked."""
        try:
            answer = self._read(time.monotonic() + _SECONDS)
        finally:
            os.close(self._answer)
            os.kill(self._pid, signal.SIGKILL)  # it has no more to say
            os.waitpid(self._pid, 0)
        verdict, text = answer[:1], answer[1:]
        if verdict == _VALID:
            return Config.of(json.loads(text))
        if verdict == _REFUSED:
            raise ValueError(text.decode("utf-8", "replace"))
        raise RuntimeError(text.decode("utf-8", "replace") or "the settings could not be checked in time")

    def _read(self, deadline: float) -> bytes:
        """All that the other process says until its end; nothing if that does not come in time."""
        answer = bytearray()
        poll = select.poll()
        poll.register(self._answer, select.POLLIN)
        while poll.poll(max(0, deadline - time.monotonic()) * 1000):
            piece = os.read(self._answer, 1 << 16)
            if not piece:
                return bytes(answer)
            answer += piece
        return b""


def vetted(text: bytes) -> Config:
    """Check a message and wait for it; raises as `Vetting` does."""
    return Vetting(text).result()


def _vet(text: bytes, answer: int, parent: int) -> NoReturn:
    try:
        die_with_parent()
        if os.getppid() == parent:
            with open(answer, "wb") as pipe:
                pipe.write(_verdict(text))
    finally:
        os._exit(0)


def _verdict(text: bytes) -> bytes:
    try:
        from config.check import checked

        return _VALID + json.dumps(checked(text).plain()).encode()
    except ValueError as error:
        return _REFUSED + str(error).encode("utf-8", "backslashreplace")
    except Exception as error:
        return _FAILED + f"{type(error).__name__}: {error}".encode("utf-8", "backslashreplace")

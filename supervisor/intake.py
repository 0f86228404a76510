"""The way of a settings message to the running configuration."""

from __future__ import annotations

import math
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass

from config.settings import Config
from supervisor.vetting import Vetting

AGAIN_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Watch:
    """Sockets that wake the loop up and that its children must not have."""

    poll: select.poll
    private: list[socket.socket]

    def add(self, sock: socket.socket) -> None:
        """One more."""
        self.poll.register(sock, select.POLLIN)
        self.private.append(sock)

    def remove(self, sock: socket.socket) -> None:
        """It no longer is one."""
        self.poll.unregister(sock)
        self.private.remove(sock)


class Intake:
    """Has the newest message checked, without waiting; one that could not be checked again after a while."""

    def __init__(self, vet: Callable[[bytes], Vetting], watch: Watch) -> None:
        """``vet`` begins to check a message; it may raise OSError."""
        self._vet = vet
        self._watch = watch
        self._vetting: Vetting | None = None
        self._next: bytes | None = None  # the newest message, if its check is still to begin
        self._begin_at = 0.0

    def put(self, text: bytes, now: float) -> None:
        """A message has come; those before it no longer count."""
        self._next, self._begin_at = text, now

    def take(self, now: float) -> Config | None:
        """The configuration whose check has ended, once.

        Raises ValueError for a message that is refused, RuntimeError for one that cannot be checked: it is tried again.
        """
        if self._next is not None and now >= self._begin_at:
            self._begin(self._next, now)
        vetting = self._vetting
        if vetting is None or not vetting.done():
            return None
        self._forget(vetting)
        try:
            return vetting.result()
        except RuntimeError:
            self._again(vetting.text, now)
            raise

    def _begin(self, text: bytes, now: float) -> None:
        self.end()
        try:
            self._vetting = self._vet(text)
        except OSError as error:
            self._again(text, now)
            raise RuntimeError(error.strerror) from None
        self._watch.add(self._vetting.socket)

    def _again(self, text: bytes, now: float) -> None:
        """The launcher will not send it another time."""
        if self._next is None:
            self._next, self._begin_at = text, now + AGAIN_SECONDS

    @property
    def due(self) -> float:
        """When there is something to do, whatever arrives."""
        begin = math.inf if self._next is None else self._begin_at
        return min(begin, math.inf if self._vetting is None else self._vetting.deadline)

    def end(self) -> None:
        """Check nothing any more."""
        self._next = None
        if vetting := self._vetting:
            self._forget(vetting)
            vetting.end()

    def _forget(self, vetting: Vetting) -> None:
        self._watch.remove(vetting.socket)
        self._vetting = None

"""Accepting clients on sockets that all workers share, so that every worker gets its fair part of them.

The kernel wakes all workers for a new client and the quickest wins, which alone would give one worker most of the
long-lived connections.  So each worker publishes how many it has, and one that is ahead of the least loaded steps
back for a moment.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from collections.abc import Callable
from typing import Any

import structlog

from pg_ferret.sockets import plain
from pg_ferret.status import Kind, Slot, State, StatusTable

_log = structlog.get_logger()
# A worker that is ahead lets so many turns of its loop pass, microseconds each, before it sleeps: the one whose turn it
# is has been woken by the same client and is about to accept it.  A sleep each time would cap the rate of connects.
_TURNS_TO_LET_PASS = 20
_STEP_BACK_SECONDS = 0.001
# How many clients ahead of the least loaded a worker may be, beside a sixteenth.
_LEAD = 1
_OUT_OF_DESCRIPTORS_SECONDS = 1.0
# Clients taken before the loop turns to those it has.
_AT_ONCE = 8
# How old the list of workers may be.
_LOOK_SECONDS = 0.05
# A worker that has not beaten for so long takes nobody, so nobody waits for it.
_STALE_SECONDS = 1.0


def peer_text(address: str | tuple[Any, ...]) -> str:
    """`host:port`, or the path of the Unix socket, of an address as the socket module gives it."""
    if isinstance(address, str):
        return address
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Listener:
    """One listening socket in one worker; ``accepted`` gets each new socket and `peer_text`."""

    def __init__(
        self,
        address: str,
        listening: socket.socket,
        loop: asyncio.AbstractEventLoop,
        balance: Balance,
        accepted: Callable[[socket.socket, str], None],
    ) -> None:
        self.address = address
        self._socket = plain(listening)
        self._loop = loop
        self._balance = balance
        self._accepted = accepted
        self._timer: asyncio.TimerHandle | None = None
        self._passed = 0
        self._resume()

    def _resume(self) -> None:
        self._timer = None
        self._loop.add_reader(self._socket.fileno(), self._accept)

    def _pause(self, seconds: float) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._timer = self._loop.call_later(seconds, self._resume)

    def _accept(self) -> None:
        room = self._room()
        if room <= 0:
            self._passed += 1
            if self._passed >= _TURNS_TO_LET_PASS:
                self._passed = 0
                self._pause(_STEP_BACK_SECONDS)
            return
        for _ in range(min(room, _AT_ONCE)):
            try:
                arrival = self._take()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                _log.warning("cannot accept a client", address=self.address, error=error.strerror)
                self._pause(_OUT_OF_DESCRIPTORS_SECONDS)
                return
            self._passed = 0
            if arrival is not None:
                self._accepted(*arrival)

    def _room(self) -> int:
        """How many clients to take before it is another worker's turn."""
        return self._balance.room()

    def _take(self) -> tuple[socket.socket, str] | None:
        client, address = self._socket.accept()
        return plain(client), peer_text(address or self._socket.getsockname())

    def close(self) -> None:
        """Stop accepting; the other workers' sockets stay open."""
        if self._timer is not None:
            self._timer.cancel()
        else:
            self._loop.remove_reader(self._socket.fileno())
        self._socket.close()


class Adopter(Listener):
    """Takes the clients that other workers hand over, which leave or have too many of them."""

    def _room(self) -> int:
        return self._balance.room(lead=0)  # stricter: nobody takes back what it has just given away

    def _take(self) -> tuple[socket.socket, str] | None:
        _, descriptors, _, _ = socket.recv_fds(self._socket, 16, 1, socket.MSG_DONTWAIT)
        if not descriptors:
            return None
        client = plain(socket.socket(fileno=descriptors[0]))
        try:
            return client, peer_text(client.getpeername() or client.getsockname())
        except OSError:  # it is gone
            return client, "unknown"


class Balance:
    """Whose turn it is to accept."""

    def __init__(self, status: StatusTable, slot: int) -> None:
        self._status = status
        self._mine = status[slot]
        self._workers: list[Slot] = []
        self._looked = -_LOOK_SECONDS

    def workers(self) -> list[Slot]:
        """The slots with a worker, this one's included; most slots of the table are free, so they are looked up anew
        only now and then."""
        if time.monotonic() - self._looked >= _LOOK_SECONDS:
            self._look()
        return self._workers

    def _look(self) -> None:
        self._looked = time.monotonic()
        self._workers = [slot for slot in self._status.slots[1:] if slot.get("kind") == Kind.WORKER]

    def _takes_clients(self, other: Slot) -> bool:
        return other.get("state") == State.READY and other.heartbeat_age() < _STALE_SECONDS

    def others(self) -> bool:
        """Whether another worker takes clients, at this very moment: a successor has only just come."""
        self._look()
        return any(self._takes_clients(slot) for slot in self._workers if slot is not self._mine)

    def room(self, lead: int = _LEAD) -> int:
        """How many clients this worker may take before it is clearly ahead of the least loaded one, by ``lead`` and a
        sixteenth; 0 or less if it is."""
        least = min(self._loads(but=self._mine), default=None)
        if least is None:
            return _AT_ONCE
        allowed = least + lead + least // 16 if lead else least
        return allowed + 1 - self._mine.get("connections")

    def ahead(self) -> bool:
        """Whether another worker should take the next client."""
        return self.room() <= 0

    def excess(self) -> int:
        """How many clients this worker has beyond the mean."""
        loads = self._loads()
        return max(0, self._mine.get("connections") - -(-sum(loads) // max(1, len(loads))))

    def _loads(self, but: Slot | None = None) -> list[int]:
        return [slot.get("connections") for slot in self.workers() if slot is not but and self._takes_clients(slot)]

"""What clients make a worker keep: messages that are not complete yet and replies that are not taken.

Each connection tells how much it holds; small requests that are answered at once are never counted.  Whoever does not
move for ``ferretdb.client_timeout`` is disconnected, and when all together hold more than their share of
``ferretdb.client_memory``, those go that have not moved for the longest.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import structlog

_log = structlog.get_logger()
TICK_SECONDS = 1.0
# Each with a line of its own; of more, only the number is told.
_LINES = 3
# Who holds less is disconnected last when memory is short: a small request that has come in two pieces is no offender.
_SMALL_BYTES = 64 * 1024


class Holder(Protocol):
    """A connection, as it is seen here."""

    @property
    def peer(self) -> str: ...

    def unsent(self) -> int:
        """Bytes of replies that the client has not taken."""

    def abort(self) -> None: ...


class _Hold:
    __slots__ = ("moved", "size", "stuck", "unsent")

    def __init__(self) -> None:
        self.size = 0
        self.stuck = False  # it is the client's turn
        self.moved = 0.0
        self.unsent = 0


class Backlog:
    """One worker's account."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = 0  # bytes
        self.timeout = 0.0  # seconds; 0 is for ever
        self.held = 0
        self._holds: dict[Holder, _Hold] = {}
        self._clock = clock

    def hold(self, client: Holder, size: int, stuck: bool) -> None:
        """``client`` holds ``size`` bytes from now on; ``stuck``: nothing happens until it sends or reads."""
        hold = self._holds.get(client)
        if hold is None:
            if not size and not stuck:
                return
            hold = self._holds[client] = _Hold()
        self.held += size - hold.size
        hold.size = size
        hold.stuck = stuck
        hold.moved = self._clock()
        if not size and not stuck:
            del self._holds[client]
        elif self.held > self.limit:
            self._shed()

    def tick(self) -> None:
        """To be called every ``TICK_SECONDS``: disconnect those whose time is up, or who have no room any more."""
        now = self._clock()
        late = []
        for client, hold in self._holds.items():
            unsent = client.unsent()
            if unsent < hold.unsent:
                hold.moved = now
            hold.unsent = unsent
            if hold.stuck and self.timeout and now - hold.moved >= self.timeout:
                late.append(client)
        self._disconnect(late, "it stopped in the middle of a message or a reply (ferretdb.client_timeout)")
        if self.held > self.limit:
            self._shed()

    def _shed(self) -> None:
        """Make room, at the cost of those that hold much and have not moved for the longest."""
        victims = []
        stuck = sorted((client for client in self._holds if self._holds[client].stuck), key=self._order)
        excess = self.held - self.limit
        for client in stuck:
            if excess <= 0:
                break
            excess -= self._holds[client].size
            victims.append(client)
        self._disconnect(victims, "messages under way take too much memory (ferretdb.client_memory)")

    def _order(self, client: Holder) -> tuple[bool, float]:
        hold = self._holds[client]
        return hold.size < _SMALL_BYTES, hold.moved

    def _disconnect(self, clients: list[Holder], reason: str) -> None:
        for number, client in enumerate(clients, 1):
            self.held -= self._holds.pop(client).size
            if number <= _LINES:
                _log.warning("closing a connection", peer=client.peer, reason=reason)
            client.abort()
        if len(clients) > _LINES:
            _log.warning("closing more connections", connections=len(clients) - _LINES, reason=reason)

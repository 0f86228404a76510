"""Quiet clients, kept at the price of a descriptor.

Drivers keep many connections, most of them idle, and a transport takes two thirds of the memory that an idle one costs.
So the transport of a client that has been quiet for a while is given up, and one epoll instance watches all of them.
Who sends something, or goes, gets a transport again first.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
from collections.abc import Callable, Collection
from typing import Any

import structlog

from pg_ferret.connection import Connection
from pg_ferret.sockets import plain

_log = structlog.get_logger()
# Whoever has sent nothing from one sweep to the next is quiet.
SWEEP_SECONDS = 5.0
# Clients looked at, or given a transport again, before others have a turn.
_AT_ONCE = 16


class Parked(asyncio.Transport):
    """What a parked client has for a transport: it can be given away and closed."""

    __slots__ = ("_descriptor", "_parking", "connection")

    def __init__(self, parking: Parking, connection: Connection, descriptor: int) -> None:
        # Without super().__init__(): it would make a dictionary for each.
        self._parking = parking
        self.connection = connection  # whose it is
        self._descriptor = descriptor

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """As far as `Connection` asks: this is the ``socket``, which has a `fileno`."""
        return self if name in ("socket", "parked") else default

    def fileno(self) -> int:
        """The client's descriptor."""
        return self._descriptor

    def is_closing(self) -> bool:
        """Whether it is closed, or about to be replaced by a transport."""
        return self._descriptor < 0

    def get_write_buffer_size(self) -> int:
        """Whoever is quiet has taken all replies."""
        return 0

    def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        if self._descriptor >= 0:
            os.close(self.leave())
            self._parking.loop.call_soon(self.connection.connection_lost, None)

    def leave(self) -> int:
        """The descriptor, which is watched no longer."""
        descriptor, self._descriptor = self._descriptor, -1
        self._parking.forget(descriptor)
        return descriptor


class Parking:
    """One worker's quiet clients."""

    def __init__(self, loop: asyncio.AbstractEventLoop, attach: Callable[[Connection, socket.socket], None]) -> None:
        """``attach`` gives a client that stirs a transport."""
        self.loop = loop
        self._attach = attach
        self._parked: dict[int, Parked] = {}  # by descriptor
        self._epoll = select.epoll()
        loop.add_reader(self._epoll.fileno(), self._look)

    def __len__(self) -> int:
        return len(self._parked)

    async def run(self, clients: Collection[Connection]) -> None:
        """Park those of ``clients`` that are quiet, until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            for number, connection in enumerate(tuple(clients), 1):
                try:
                    if connection.quiet():
                        self.park(connection)
                except Exception:  # the others are to be parked all the same
                    _log.exception("a quiet client could not be parked", peer=connection.peer)
                if number % _AT_ONCE == 0:
                    await asyncio.sleep(0)

    def park(self, connection: Connection) -> None:
        """Give a client's transport up, if nothing is under way."""
        connection.park(self._keep)

    def _keep(self, connection: Connection, descriptor: int) -> Parked | None:
        try:
            own = os.dup(descriptor)
        except OSError:  # there are as many descriptors as there may be
            return None
        try:
            self._epoll.register(own, select.EPOLLIN)  # what has come by now counts as well
        except OSError:
            os.close(own)
            return None
        parked = self._parked[own] = Parked(self, connection, own)
        return parked

    def forget(self, descriptor: int) -> None:
        """Watch no longer; closing alone would not do, another process may have the connection, too."""
        self._epoll.unregister(descriptor)
        del self._parked[descriptor]

    def _look(self) -> None:
        for descriptor, _ in self._epoll.poll(0, _AT_ONCE):
            parked = self._parked[descriptor]
            parked.connection.touch()
            stirred = plain(socket.socket(fileno=descriptor))  # first, because it may fail
            parked.leave()
            self._attach(parked.connection, stirred)

    def touch_stirred(self) -> None:
        """Whoever has sent something, or gone, is not quiet, though it may be some turns until it has a transport."""
        for descriptor, _ in self._epoll.poll(0, max(1, len(self._parked))):
            self._parked[descriptor].connection.touch()

    def close(self) -> None:
        """Watch nobody any more."""
        self.loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

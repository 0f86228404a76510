"""Sockets of clients."""

from __future__ import annotations

import socket


class Plain(socket.socket):
    """A socket that tells family and type as the numbers they are.

    The event loop asks for them five times for each client that connects; to make enums of them took longer than
    accept() itself.
    """

    __slots__ = ()
    family = socket.SocketType.family  # type: ignore[assignment]
    type = socket.SocketType.type  # type: ignore[assignment]

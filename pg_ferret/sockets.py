"""Sockets of clients."""

from __future__ import annotations

import socket


class _Plain(socket.socket):
    __slots__ = ()
    # The numbers, where the class promises enums of them.
    family = socket.SocketType.family  # type: ignore[assignment]
    type = socket.SocketType.type  # type: ignore[assignment]


def plain(sock: socket.socket) -> socket.socket:
    """The same socket, of no derived class, which from now on tells family and type as the numbers they are.

    For each client that connects they are looked at five times; to make enums of them took longer than accept().
    """
    sock.__class__ = _Plain
    return sock

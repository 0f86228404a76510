"""Clients without a driver: bytes out, bytes in, and what a driver would never do."""

from __future__ import annotations

import socket
import struct
from contextlib import ExitStack

from tests.faults.load import DATABASE
from tests.faults.stage import Missed, Stage
from tests.wire import message

FIND = message({"find": "rows", "filter": {"_id": 1}, "limit": 1, "singleBatch": True, "$db": DATABASE})


def client(stage: Stage, stack: ExitStack) -> socket.socket:
    return stack.enter_context(socket.create_connection(("127.0.0.1", stage.cluster.port), 20))


def answer(sock: socket.socket) -> bytes:
    """One whole answer; raises Missed when the connection ends."""
    data = b""
    while len(data) < 4 or len(data) < struct.unpack_from("<i", data)[0]:
        more = sock.recv(1 << 20)
        if not more:
            raise Missed("a connection was closed instead of answered")
        data += more
    return data


def closed(sock: socket.socket) -> bool:
    """Whether the server has closed the connection; whatever it has sent before is read."""
    sock.setblocking(False)
    try:
        while sock.recv(1 << 20):
            pass
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def connections(stage: Stage) -> int:
    return sum(int(row["connections"]) for row in stage.workers().values())

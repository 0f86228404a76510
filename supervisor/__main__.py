"""Start: take the launcher's channel, read the settings, load the gateway, supervise.

Exit status: 0 after a stop asked for, 1 when the launcher is gone, 3 when the supervisor can't boot.
"""

from __future__ import annotations

import socket
import sys
import traceback

CHANNEL_DESCRIPTOR = 3
CANNOT_BOOT = 3


def main() -> int:
    """Run the supervisor on descriptor 3."""
    sock = socket.socket(fileno=CHANNEL_DESCRIPTOR)
    sock.set_inheritable(False)
    try:
        # Here, so that a missing package is told through the channel as well.
        from supervisor.boot import boot

        return boot(sock)
    except Exception as error:
        _last_words(sock, error)
        return CANNOT_BOOT


def _last_words(sock: socket.socket, error: Exception) -> None:
    """Log the trace and show the error in slot 0, with the standard library alone."""
    from pg_ferret.status import SLOT_BYTES, Kind, Slot, State

    text = f"the supervisor cannot start: {type(error).__name__}: {error}"
    slot = Slot(memoryview(bytearray(SLOT_BYTES)))
    slot.set(kind=Kind.SUPERVISOR, state=State.FAILED)
    slot.message = text
    trace = "".join(traceback.format_exception(error))[-8000:]
    line = f"lEpg_ferret supervisor: {text}\n{trace}".encode("utf-8", "backslashreplace")
    for message in (line, b"s" + bytes(4) + slot.raw()):
        try:
            sock.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            sys.stderr.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())

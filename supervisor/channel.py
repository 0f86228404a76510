"""The supervisor's end of the SEQPACKET channel to the launcher; one message is one verb.

Nothing here blocks.  The descriptor itself stays in blocking mode: O_NONBLOCK would be shared with the workers,
which inherit it to log, so each call asks for MSG_DONTWAIT instead.
"""

from __future__ import annotations

import enum
import socket
import struct
from collections.abc import Iterable, Iterator

from config.settings import SettingError

# The launcher can't send more: a message is bounded by SO_SNDBUF (208 kB by default).
MAX_MESSAGE_BYTES = 256 * 1024
# The launcher's room for them (FerretShared in extension/pg_ferret.h).
SETTING_ERRORS_BYTES = 8192
# A flood of messages must not keep the loop from its heartbeats.
MESSAGES_PER_ROUND = 100
_QUIET = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_pack_slot = struct.Struct("<ci").pack


class Verb(enum.Enum):
    """What the launcher can ask for, by the first byte of a message."""

    SETTINGS = b"S"
    ROLE = b"R"
    QUIT = b"Q"
    ROLL = b"W"


class Closed(Exception):
    """The launcher is gone."""


class Channel:
    """Receives the launcher's messages; sends it the status slots and what is wrong with the settings."""

    __slots__ = ("socket",)

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock

    def receive(self) -> Iterator[tuple[Verb, bytes]]:
        """The messages that have arrived, without their verb byte; unknown and cut ones are passed over.

        Raises Closed once the launcher is gone and everything it sent has been read.
        """
        for _ in range(MESSAGES_PER_ROUND):
            try:
                data, _, flags, _ = self.socket.recvmsg(MAX_MESSAGE_BYTES, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except ConnectionResetError:
                continue  # told once when the peer died with unread mail; what it sent before can still be read
            if not data:
                raise Closed
            if not flags & socket.MSG_TRUNC and data[:1] in _VERBS:
                yield _VERBS[data[:1]], data[1:]

    def send_slot(self, index: int, raw: bytes) -> bool:
        """Send one packed status slot; False if the launcher has no room for it now."""
        return self._send(_pack_slot(b"s", index) + raw)

    def send_setting_errors(self, errors: Iterable[SettingError]) -> bool:
        """Send all that is wrong with the settings, as far as it fits; False if there is no room for it now."""
        body = b""
        for item in errors:
            texts = (item.name, item.setting, item.error)
            entry = b"".join(text.replace("\0", " ").encode("utf-8", "backslashreplace") + b"\0" for text in texts)
            if len(body) + len(entry) <= SETTING_ERRORS_BYTES:
                body += entry
        return self._send(b"e" + body)

    def _send(self, message: bytes) -> bool:
        try:
            self.socket.send(message, _QUIET)
        except OSError:
            return False  # full: try again next round; gone: receive() tells
        return True


_VERBS = {verb.value: verb for verb in Verb}

"""structlog for the supervisor and the workers: one event, one line in PostgreSQL's own log.

An event becomes one ``log`` message on the channel to the launcher, which gives it to ereport, so that
log_min_messages, log_line_prefix, csvlog and jsonlog apply.  Logging never blocks: when the channel is full
the line is dropped, counted, and the count is told with the next line that fits.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections import Counter, deque
from datetime import UTC, datetime
from typing import Any

import structlog

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
# SO_SNDBUF bounds a SEQPACKET message; a traceback longer than this says nothing more.
MAX_LINE_BYTES = 16_000
# At most so many lines of one event in so many seconds.
_LINES_IN_WINDOW = 20
_WINDOW_SECONDS = 10.0
# A library that tries again every second says so only now and then.
_SAME_LINE_SECONDS = 30.0
# psycopg_pool about a connection that we have closed ourselves.
_UNINTERESTING = frozenset(("discarding closed connection: %s",))
# This process's latest lines as MongoDB writes them, for getLog.
recent: deque[str] = deque(maxlen=1024)


class _Limit:
    """So many lines of one event in a while: no client may fill the disk that holds the log, and the data perhaps."""

    def __init__(self) -> None:
        self._window = 0
        self._counts: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()

    def admit(self, text: str) -> dict[str, int]:
        """What to add to the line; raises structlog.DropEvent when there have been too many like it."""
        window = int(time.monotonic() / _WINDOW_SECONDS)
        if window != self._window:
            self._window = window
            self._counts.clear()
        self._counts[text] += 1
        if self._counts[text] > _LINES_IN_WINDOW:
            self._left_out[text] += 1
            raise structlog.DropEvent
        left_out = self._left_out.pop(text, 0)
        return {"similar_lines_left_out": left_out} if left_out else {}


class ChannelLogger:
    """The last step of structlog's chain: sends finished lines to the launcher."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._dropped = 0

    def _send(self, letter: bytes, line: str) -> None:
        if self._dropped:
            line = f"{line} dropped_log_lines={self._dropped}"
        data = line.encode("utf-8", "backslashreplace")[:MAX_LINE_BYTES]
        try:
            self._channel.send(b"l" + letter + data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            self._dropped += 1
        else:
            self._dropped = 0

    def debug(self, line: str) -> None:
        self._send(b"D", line)

    def info(self, line: str) -> None:
        self._send(b"I", line)

    def warning(self, line: str) -> None:
        self._send(b"W", line)

    def error(self, line: str) -> None:
        self._send(b"E", line)

    critical = exception = error


class _Forwarder(logging.Handler):
    """What libraries log by the standard library, psycopg_pool and asyncio above all."""

    def __init__(self) -> None:
        super().__init__()
        self._last = ""
        self._last_at = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg in _UNINTERESTING:
            return
        text = f"{record.name}: {record.getMessage()}"
        if text == self._last and record.created - self._last_at < _SAME_LINE_SECONDS:
            return
        self._last, self._last_at = text, record.created
        event = structlog.get_logger().warning if record.levelno >= logging.WARNING else structlog.get_logger().debug
        event(text, exc_info=record.exc_info or None)


def configure(channel: socket.socket, level: str, process: str) -> None:
    """Send every event to ``channel`` as ``process[pid]: event key=value``; may be called again to change the level.

    ``level`` is one of ``LEVELS``; ``process`` is ``supervisor`` or ``worker 2``.
    """
    prefix = f"pg_ferret {process}[{os.getpid()}]: "
    logger = ChannelLogger(channel)
    render = structlog.processors.LogfmtRenderer(key_order=["event"], drop_missing=True)

    limit = _Limit()

    def line(_logger: Any, method: str, event: Any) -> str:
        text = str(event.pop("event", ""))
        event |= limit.admit(text)
        trace = event.pop("exception", None)
        recent.append(_mongo_line(method, process, text, event))
        fields = render(_logger, method, event)
        return prefix + text + (" " + str(fields) if fields else "") + (f"\n{trace}" if trace else "")

    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, structlog.processors.format_exc_info, line],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=lambda *_: logger,
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    if not any(isinstance(handler, _Forwarder) for handler in root.handlers):
        root.addHandler(_Forwarder())


def _mongo_line(method: str, context: str, text: str, fields: dict[str, Any]) -> str:
    """One line of MongoDB's structured log format."""
    return json.dumps(
        {
            "t": {"$date": datetime.now(UTC).isoformat(timespec="milliseconds")},
            "s": {"debug": "D1", "info": "I", "warning": "W"}.get(method, "E"),
            "c": "-",
            "id": 0,
            "ctx": context,
            "msg": text,
            "attr": {name: str(value) for name, value in fields.items()},
        }
    )

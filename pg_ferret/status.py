"""The status table: one fixed-size slot per process, shared by fork through an anonymous mmap.

Workers write their own slot, the supervisor reads all of them once a second and passes the same bytes to
the launcher, which copies them into PostgreSQL's shared memory.  ``extension/status_layout.h`` is generated
from this module (``python3 -m config``), so that the C struct and these offsets cannot drift apart.

A slot is 512 bytes: the numbers of ``NUMBERS`` as native int64, then two NUL-padded UTF-8 texts.
A number of ``NULL`` is shown as SQL NULL.
"""

from __future__ import annotations

import enum
import mmap
import time

NUMBERS = (
    "kind",  # Kind
    "slot",  # 0 is the supervisor, 1.. are workers
    "pid",
    "state",  # State
    "started",  # microseconds since the Unix epoch
    "heartbeat",  # nanoseconds of CLOCK_MONOTONIC
    "generation",  # how many processes this slot has had, this one included
    "restarts",  # how many of them ended without being asked to
    "connections",
    "connections_total",
    "requests",
    "errors",
    "in_flight",
    "bytes_in",
    "bytes_out",
    "cursors",  # open cursors, shared by all workers: on the supervisor's row only
    "pool_size",
    "pool_in_use",
    "pool_waiting",
    "rss",  # bytes
)
LAST_EXIT_BYTES = 32
MESSAGE_BYTES = 320
SLOT_BYTES = 8 * len(NUMBERS) + LAST_EXIT_BYTES + MESSAGE_BYTES
NULL = -1

_INDEX = {name: index for index, name in enumerate(NUMBERS)}
_LAST_EXIT_AT = 8 * len(NUMBERS)
_MESSAGE_AT = _LAST_EXIT_AT + LAST_EXIT_BYTES


class Kind(enum.IntEnum):
    """What kind of process a slot describes."""

    FREE = 0
    SUPERVISOR = 1
    WORKER = 2


class State(enum.IntEnum):
    """The life of a process, as ``ferretdb.status`` names it."""

    NONE = 0
    STARTING = 1
    READY = 2
    DRAINING = 3
    STOPPING = 4
    BACKOFF = 5
    FAILED = 6


class Slot:
    """One process's row; every write is visible at once to all processes that share the table."""

    __slots__ = ("_bytes", "_numbers")

    def __init__(self, view: memoryview) -> None:
        self._bytes = view
        self._numbers = view[:_LAST_EXIT_AT].cast("q")

    def get(self, name: str) -> int:
        """The number called ``name`` (one of ``NUMBERS``)."""
        return self._numbers[_INDEX[name]]

    def set(self, **values: int) -> None:
        """Store numbers by name."""
        for name, value in values.items():
            self._numbers[_INDEX[name]] = value

    def add(self, name: str, change: int) -> None:
        """Change a number that only one process stores."""
        self._numbers[_INDEX[name]] += change

    def beat(self) -> None:
        """Say that this process's loop is turning."""
        self._numbers[_INDEX["heartbeat"]] = time.monotonic_ns()

    def heartbeat_age(self) -> float:
        """Seconds since the last beat."""
        return (time.monotonic_ns() - self._numbers[_INDEX["heartbeat"]]) / 1e9

    @property
    def last_exit(self) -> str:
        """How the slot's previous process ended, as ``exit 3`` or ``signal KILL``; empty if there was none."""
        return _text(self._bytes[_LAST_EXIT_AT:_MESSAGE_AT])

    @last_exit.setter
    def last_exit(self, text: str) -> None:
        self._bytes[_LAST_EXIT_AT:_MESSAGE_AT] = _padded(text, LAST_EXIT_BYTES)

    @property
    def message(self) -> str:
        """One line for the DBA: addresses and version, or the last error."""
        return _text(self._bytes[_MESSAGE_AT:])

    @message.setter
    def message(self, text: str) -> None:
        self._bytes[_MESSAGE_AT:] = _padded(text, MESSAGE_BYTES)

    def clear(self) -> None:
        """Forget everything: the slot is free."""
        self._bytes[:] = bytes(SLOT_BYTES)

    def raw(self) -> bytes:
        """The slot's bytes, as the launcher takes them."""
        return bytes(self._bytes)


class StatusTable:
    """The slots of a supervisor (0) and ``max_workers`` workers (1..), in memory that survives a fork."""

    __slots__ = ("_map", "slots")

    def __init__(self, max_workers: int) -> None:
        self._map = mmap.mmap(-1, SLOT_BYTES * (max_workers + 1))
        view = memoryview(self._map)
        self.slots = tuple(
            Slot(view[index * SLOT_BYTES : (index + 1) * SLOT_BYTES]) for index in range(max_workers + 1)
        )

    def __getitem__(self, index: int) -> Slot:
        return self.slots[index]

    def __len__(self) -> int:
        return len(self.slots)


def _text(view: memoryview) -> str:
    return bytes(view).split(b"\0", 1)[0].decode("utf-8", "replace")


def _padded(text: str, size: int) -> bytes:
    """UTF-8 of ``text``, cut at a character so that one NUL always ends it."""
    data = text.replace("\0", " ").encode("utf-8", "backslashreplace")[: size - 1]
    return data.decode("utf-8", "ignore").encode().ljust(size, b"\0")

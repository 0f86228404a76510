"""What the supervisor shows: its own status slot, its problems, and the slots' way to the launcher."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

import structlog

import pg_ferret
from config.settings import SettingError
from pg_ferret.status import NULL, NUMBERS, SLOT_BYTES, Kind, Slot, State, StatusTable
from supervisor.channel import Channel

logger = structlog.get_logger()

# Slots are sent this often, and at once when something changed that a DBA waits for.
REPORT_SECONDS = 1.0
_NOT_OURS = dict.fromkeys(NUMBERS[NUMBERS.index("restarts") :], NULL)
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Problems:
    """What is wrong at present, by subject; each text is logged once, when it appears."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._values: dict[str, str] = {}
        self._logged: dict[str, str] = {}

    def set(self, subject: str, text: str, hint: str = "", value: object = "") -> None:
        """``subject`` has the problem ``text``, which begins with the setting whose ``value`` is not in force."""
        if self._logged.get(subject) != text:
            logger.warning(text, **({"hint": hint} if hint else {}))
        self._texts[subject] = self._logged[subject] = text
        self._values[subject] = str(value)

    def solved(self, subject: str) -> None:
        """``subject`` has no problem (any more)."""
        self._texts.pop(subject, None)
        self._logged.pop(subject, None)

    def __contains__(self, subject: str) -> bool:
        return subject in self._texts

    @property
    def texts(self) -> list[str]:
        """All there are."""
        return list(self._texts.values())

    @property
    def values(self) -> list[tuple[str, str]]:
        """Text and value of each."""
        return [(text, self._values[subject]) for subject, text in self._texts.items()]


class Reporter:
    """Keeps slot 0 and sends the slots that have changed; never blocks."""

    def __init__(self, channel: Channel, table: StatusTable) -> None:
        self._channel = channel
        self._table = table
        self._sent = [bytes(SLOT_BYTES)] * len(table)
        self._told: list[tuple[object, ...]] = [()] * len(table)
        self._setting_errors: list[SettingError] | None = None
        self._due = 0.0
        table[0].set(kind=Kind.SUPERVISOR, pid=os.getpid(), started=time.time_ns() // 1000, generation=1)
        table[0].set(**_NOT_OURS)

    @property
    def due(self) -> float:
        """When the next report is due, on the supervisor's clock."""
        return self._due

    def own(self, state: State, message: str) -> None:
        """The supervisor's row."""
        self._table[0].set(state=state)
        if self._table[0].message != message:
            self._table[0].message = message

    def setting_errors(self, errors: list[SettingError]) -> None:
        """Send what is wrong with the settings, if that has changed."""
        if errors != self._setting_errors and self._channel.send_setting_errors(errors):
            self._setting_errors = errors

    def report(self, now: float) -> None:
        """Send every changed slot once a second, and at any time those whose state or message changed."""
        whole = now >= self._due
        if whole:
            self._due = now + REPORT_SECONDS
            own = self._table[0]
            own.set(heartbeat=int(now * 1e9), rss=resident_bytes(), cursors=self._cursors())
        for index, slot in enumerate(self._table.slots):
            headline = _headline(slot)
            if not whole and headline == self._told[index]:
                continue
            raw = _sendable(slot) if index else slot.raw()
            if raw != self._sent[index] and not self._channel.send_slot(index, raw):
                self._due = min(self._due, now + REPORT_SECONDS / 10)
                return
            self._sent[index], self._told[index] = raw, headline

    def _cursors(self) -> int:
        """Open cursors: every ready worker publishes the same shared count."""
        ready = (slot for slot in self._table.slots[1:] if slot.get("state") == State.READY)
        return max((slot.get("cursors") for slot in ready), default=NULL)


def serving_message(addresses: Iterable[str]) -> str:
    """Slot 0's message when all is well."""
    return f"pg_ferret {pg_ferret.__version__} on {', '.join(addresses) or 'no address'}"


def resident_bytes() -> int:
    """Resident memory of this process."""
    with open("/proc/self/statm", "rb") as statm:
        return int(statm.read().split()[1]) * _PAGE


def _headline(slot: Slot) -> tuple[object, ...]:
    return (slot.get("kind"), slot.get("pid"), slot.get("state"), slot.get("generation"), slot.message)


def _sendable(slot: Slot) -> bytes:
    """A worker's slot as it is shown: the count of all workers' cursors is on the supervisor's row only."""
    copy = bytearray(slot.raw())
    if slot.get("kind"):
        Slot(memoryview(copy)).set(cursors=NULL)
    return bytes(copy)

"""Connections that requests of many clients share: what reads (shared.py) and writes (writes.py) have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from pg_ferret.engine.backend import Backend
from pg_ferret.engine.calls import Call
from pg_ferret.engine.pipeline import Params, Pipeline, Row, Session
from pg_ferret.runner import Turn, Waiter

# How long a line may go without an answer while somebody waits for one.
STALL_SECONDS = 0.1


@dataclass(slots=True, eq=False)  # one for each request: to make a named tuple takes twice as long
class Shared:
    """A request that may share a connection."""

    call: Call
    params: Params
    namespace: bytes
    shape: int  # the same for requests that may be expected to cost the same


class Line(Pipeline):
    """One of the connections, which is watched while anybody waits at it."""

    __slots__ = ("_seen", "_watched", "since")

    def __init__(self, conn: Session, turn: Turn) -> None:
        self._seen: object = None  # how far it was when it was last looked at
        self._watched = False
        self.since = 0.0  # when the server began with what it is at, or was at last
        super().__init__(conn, turn)

    @abstractmethod
    def _progress(self) -> object:
        """Something that changes with each answer."""

    @abstractmethod
    def _stands_still(self) -> None:
        """There has been no answer for `STALL_SECONDS`."""

    def _starts(self) -> None:
        """To be called when it has something to do again."""
        self.busy = True
        self.idle_ticks = 0
        if not self._watched:
            self._watched = True
            self._look_again()

    def _look_again(self) -> None:
        self._seen = self._progress()
        self._loop.call_later(STALL_SECONDS, self._watch)

    def _watch(self) -> None:
        """While anybody waits: does the line move?"""
        if self.lost or not self.busy:
            self._watched = False
        elif not self.waiting or self._seen != self._progress():
            self._look_again()
        else:
            self._stands_still()

    @property
    @abstractmethod
    def waiting(self) -> int:
        """Requests without an answer."""

    @abstractmethod
    def retire(self) -> None:
        """Take nobody any more, and end when those who wait have their answers."""

    @abstractmethod
    def drop(self) -> None:
        """Give the connection up, whatever it does."""


class Owner(NamedTuple):
    """What the pool does for a line, of reads or of writes."""

    elsewhere: Callable[[Shared, Waiter[Row]], None]  # run a request on a connection of its own
    ended: Callable[[Line], None]  # the line serves no more; called once
    stalled: Callable[[Line, Shared], None]  # instead: it was given up with this request under way
    unclaimed: Callable[[Call, Row], None]  # nobody waits for this row any more


AnyLine = TypeVar("AnyLine", bound=Line)


class Lines(Generic[AnyLine]):
    """The connections of one kind: more than one only if there is work for more."""

    __slots__ = ("_make", "all", "most")

    def __init__(self, make: Callable[[Session], AnyLine]) -> None:
        self.all: list[AnyLine] = []
        self._make = make
        self.most = 0  # so many there may be

    def fits(self, backend: Backend) -> bool:
        """Whether a connection may become one of them."""
        return not backend.swollen

    @staticmethod
    def shortest(lines: Iterable[AnyLine]) -> AnyLine | None:
        """Of these the one where the fewest wait."""
        return min(lines, key=_waiting, default=None)

    @property
    def due(self) -> bool:
        """Whether there may be another one."""
        return len(self.all) < self.most

    @property
    def busy(self) -> int:
        """How many of them have something to do."""
        return sum(line.busy for line in self.all)

    def allot(self, most: int) -> None:
        """So many there may be; those beyond take nobody any more."""
        self.most = most
        self._changed()
        for line in self.all[most:]:
            line.retire()

    def add(self, connection: Session) -> None:
        """One more; the connection is off the loop."""
        self.all.append(self._make(connection))
        self._changed()

    def remove(self, line: Line) -> bool:
        """It is gone; tells whether it was one of these."""
        if line not in self.all:
            return False
        self.all = [other for other in self.all if other is not line]
        self._changed()
        return True

    def _changed(self) -> None:
        """Their number or how many there may be is another."""


def _waiting(line: Line) -> int:
    return line.waiting

"""Connections that requests of many clients share: what reads (shared.py) and writes (writes.py) have in common."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from pg_ferret.engine.backend import Backend
from pg_ferret.engine.calls import Call
from pg_ferret.engine.pipeline import Params, Pipeline, Row, Session


class Shared(NamedTuple):
    """A request that may share a connection."""

    call: Call
    params: Params
    namespace: bytes
    shape: int  # the same for requests that may be expected to cost the same


class Line(Pipeline):
    """One of the connections."""

    __slots__ = ()

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

    elsewhere: Callable[[Shared, asyncio.Future[Row]], None]  # run a request on a connection of its own
    ended: Callable[[Line], None]  # the line serves no more; called once
    stalled: Callable[[Line, Shared], None]  # instead: it was given up with this request under way


AnyLine = TypeVar("AnyLine", bound=Line)


class Lines(Generic[AnyLine]):
    """The connections of one kind: more than one only if there is work for more."""

    __slots__ = ("_make", "_most", "all")

    def __init__(self, make: Callable[[Session], AnyLine]) -> None:
        self.all: list[AnyLine] = []
        self._make = make
        self._most = 0

    def fits(self, backend: Backend) -> bool:
        """Whether a connection may become one of them."""
        return not backend.swollen

    @property
    def due(self) -> bool:
        """Whether there may be another one."""
        return len(self.all) < self._most

    @property
    def busy(self) -> int:
        """How many of them have something to do."""
        return sum(line.busy for line in self.all)

    def allot(self, most: int) -> None:
        """So many there may be; those beyond take nobody any more."""
        self._most = most
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

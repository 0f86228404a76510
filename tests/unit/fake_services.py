"""A worker without PostgreSQL, as far as a client's connection needs one, and messages for it."""

from __future__ import annotations

from typing import Any, cast

from pg_ferret.state.backlog import Backlog
from pg_ferret.state.client import Client, Counters
from pg_ferret.state.client import Services as RealServices
from tests import wire


class Services:
    """What dispatch touches of a worker."""

    def __init__(self) -> None:
        self.counters = Counters()
        self.troubles: list[str] = []
        self.engine = self
        self.abandoned: list[str] = []
        self.backlog = Backlog()
        self.backlog.limit = 1 << 40

    def client(self, number: int = 1) -> Client:
        """One of its clients."""
        return Client(cast(RealServices, self), number, "peer")

    def abandon(self, request: str) -> None:
        self.abandoned.append(request)

    def trouble(self, text: str) -> None:
        self.troubles.append(text)


def message(command: dict[str, Any], number: int = 1, flags: int = 0) -> bytes:
    return wire.message(command | {"$db": "admin"}, number, flags)

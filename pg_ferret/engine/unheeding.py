"""Queries that go on though they were asked to end."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import NamedTuple

import structlog

from pg_ferret.engine.backend import Backend

_log = structlog.get_logger()


class _Query(NamedTuple):
    """What was shown of it, and the time of the cancel request."""

    text: str
    since: datetime


class Unheeding:
    """The connections whose queries do so.

    They stay open to see the end: hanging up would not stop a query either.
    """

    __slots__ = ("_going_on", "queries")

    def __init__(self, going_on: Callable[[str, bool], None]) -> None:
        """`going_on` is told when PostgreSQL begins or ends to ignore a cancel request."""
        self._going_on = going_on
        self.queries: dict[Backend, _Query] = {}

    def add(self, backend: Backend, request: str, since: datetime) -> None:
        """It was asked then to end what was made for this request."""
        text = f"{request}: PostgreSQL backend {backend.pid} ignores its cancel request since {since:%H:%M:%S} UTC"
        _log.warning("a query ignores its cancel request", request=request, backend_pid=backend.pid, since=since)
        self.queries[backend] = _Query(text, since)
        self._going_on(text, True)

    def ended(self, backend: Backend) -> bool:
        """A call has ended there; tells whether it was such a query."""
        query = self.queries.pop(backend, None)
        if query is None:
            return False
        seconds = round((datetime.now(UTC) - query.since).total_seconds())
        _log.info("a query that ignored its cancel request has ended", backend_pid=backend.pid, seconds=seconds)
        self._going_on(query.text, False)
        return True

"""Calls that wait for a connection of their own."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Final

from pg_ferret.engine.calls import Call
from pg_ferret.engine.pipeline import Params, Row
from pg_ferret.engine.scheduling import Stopwatch
from pg_ferret.errors import CommandError
from pg_ferret.runner import Turn, Waiter

# How often somebody looks after them.
_LOOK_SECONDS: Final = 0.05


class Request:
    """One of them."""

    __slots__ = ("call", "deadline", "params", "timeout_ms", "waiter", "watch")

    def __init__(
        self, call: Call, params: Params, timeout_ms: bytes | None, waiter: Waiter[Row], deadline: float
    ) -> None:
        self.call = call
        self.params = params
        self.timeout_ms = timeout_ms
        self.waiter = waiter
        self.deadline = deadline  # on the loop's clock; infinity: it waits for ever
        self.watch: Stopwatch | None = None  # to be started when it gets its connection


class Queue:
    """All of them, in the order in which they are served."""

    __slots__ = ("_loop", "_overdue", "_turn", "_watched", "requests")

    def __init__(self, turn: Turn, overdue: Callable[[], CommandError]) -> None:
        """`overdue` says what one is told that has waited in vain."""
        self._turn = turn
        self._loop = turn.loop
        self._overdue = overdue
        self._watched = False
        self.requests: deque[Request] = deque()

    def add(
        self, call: Call, params: Params, timeout_ms: bytes | None, seconds: float | None, *, first: bool = False
    ) -> Request:
        """One more, which waits for so long at most; the ``first`` one stands before others."""
        deadline = math.inf if seconds is None else self._loop.time() + seconds
        request = Request(call, params, timeout_ms, Waiter(self._turn), deadline)
        if first:
            self.requests.appendleft(request)
        else:
            self.requests.append(request)
        if not self._watched:
            self._watched = True
            self._loop.call_later(_LOOK_SECONDS, self._look)
        return request

    def take(self) -> Request | None:
        """The first one for which anybody still waits; it is to be served now."""
        while self.requests:
            request = self.requests.popleft()
            if not request.waiter.done():
                return request
        return None

    def _look(self) -> None:
        """Those go whose time is up, and those for whom nobody waits any more."""
        now = self._loop.time()
        requests = self.requests
        for _ in range(len(requests)):
            request = requests.popleft()
            if request.waiter.done():
                continue
            if request.deadline > now:
                requests.append(request)
            else:
                request.waiter.set_exception(self._overdue())
        self._watched = bool(requests)
        if requests:
            self._loop.call_later(_LOOK_SECONDS, self._look)

"""An event loop and a connection to PostgreSQL that do what a test wants, and nothing by themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, cast

from psycopg import pq

from pg_ferret.engine.pipeline import Pipeline, Row
from pg_ferret.runner import Turn


class Timer:
    """What is to be done later, unless it is cancelled."""

    def __init__(self, at: float, call: Callable[[], None]) -> None:
        self.at = at
        self.call = call
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Loop:
    """An event loop in which nothing happens by itself."""

    def __init__(self) -> None:
        self.now = 100.0
        self.soon: list[Callable[[], None]] = []
        self.later: list[Timer] = []
        self.turn = Turn(cast(Any, self))

    def time(self) -> float:
        return self.now

    def get_debug(self) -> bool:
        return False

    def call_soon(self, call: Callable[..., None], *arguments: Any, context: Any = None) -> None:
        self.soon.append(lambda: call(*arguments))

    def create_task(self, work: Coroutine[Any, Any, None]) -> asyncio.Future[None]:
        """The work is done at once; it must not wait for anything."""
        done: asyncio.Future[None] = asyncio.Future(loop=cast(Any, self))
        try:
            work.send(None)
        except StopIteration:
            done.set_result(None)
        return done

    def call_later(self, seconds: float, call: Callable[[], None]) -> Timer:
        self.later.append(Timer(self.now + seconds, call))
        return self.later[-1]

    def add_reader(self, *_: Any) -> None: ...

    def remove_reader(self, *_: Any) -> None: ...

    def run(self, seconds: float = 0.0) -> None:
        """What is to be done at once, and what is due so much later."""
        while self.soon:
            self.soon.pop(0)()
        self.now += seconds
        due = [timer for timer in self.later if timer.at <= self.now]
        self.later = [timer for timer in self.later if timer.at > self.now]
        for timer in due:
            if not timer.cancelled:
                timer.call()


class Result:
    """A result of libpq."""

    def __init__(self, status: pq.ExecStatus, *rows: Row, sqlstate: bytes = b"", severity: bytes = b"") -> None:
        self.status = int(status)
        self.nfields = len(rows[0]) if rows else 0
        self.ntuples = len(rows)
        self._rows = rows
        self._sqlstate = sqlstate
        self._severity = severity

    def get_value(self, number: int, column: int) -> bytes | None:
        return self._rows[number][column]

    def error_field(self, field: pq.DiagnosticField) -> bytes:
        if field == pq.DiagnosticField.SQLSTATE:
            return self._sqlstate
        return self._severity if field == pq.DiagnosticField.SEVERITY_NONLOCALIZED else b"message"


class Server:
    """A connection in pipeline mode: results arrive when the test says so."""

    socket = 0
    backend_pid = 0  # of no process
    status = int(pq.ConnStatus.OK)
    error_message = b""

    def __init__(self) -> None:
        self.pgconn = self
        self.prepared_names: set[bytes] = set()
        self.prepared: list[bytes] = []  # the statements prepared
        self.sent: list[bytes] = []  # and executed
        self.syncs = 0
        self.cancelled = 0
        self.results: list[Result] = []  # that have arrived
        self._between = False  # a call's results end with None

    def enter_pipeline_mode(self) -> None: ...

    def send_prepare(self, name: bytes, _: bytes) -> None:
        self.prepared.append(name)

    def send_query_prepared(self, name: bytes, *_: Any) -> None:
        self.sent.append(name)

    def pipeline_sync(self) -> None:
        self.syncs += 1

    def flush(self) -> int:
        return 0

    def consume_input(self) -> None: ...

    def is_busy(self) -> int:
        return not self.results and not self._between

    def get_result(self) -> Result | None:
        if self._between:
            self._between = False
            return None
        result = self.results.pop(0)
        self._between = result.status != int(pq.ExecStatus.PIPELINE_SYNC)
        return result

    async def cancel_safe(self, **_: Any) -> None:
        self.cancelled += 1

    def give(self, line: Pipeline, *results: Result) -> None:
        """These results arrive."""
        self.results += results
        line._readable()


def row(*columns: bytes | None) -> Result:
    """A result of one row."""
    return rows(columns)


def rows(*given: Row) -> Result:
    """A result of several rows."""
    return Result(pq.ExecStatus.TUPLES_OK, *given)


def refusal(sqlstate: bytes, severity: bytes = b"ERROR") -> Result:
    """An error."""
    return Result(pq.ExecStatus.FATAL_ERROR, sqlstate=sqlstate, severity=severity)


def prepared() -> Result:
    """A statement has been prepared."""
    return Result(pq.ExecStatus.COMMAND_OK)


def sync() -> Result:
    """The end of a transaction."""
    return Result(pq.ExecStatus.PIPELINE_SYNC)

"""Load by a stock driver, with a memory: what was acknowledged, what failed and how, how long everything took."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from pymongo import MongoClient
from pymongo.errors import OperationFailure, PyMongoError

Document = dict[str, Any]

# No driver's retries: every failed request is to be seen.
OPTIONS: dict[str, Any] = {
    "retryReads": False,
    "retryWrites": False,
    "serverSelectionTimeoutMS": 2_000,
    "connectTimeoutMS": 2_000,
    "socketTimeoutMS": 20_000,
}
DATABASE = "faults"
_ROWS = 120
_BATCH = 20


def code_of(error: PyMongoError) -> str:
    """How a failed request is counted: the server's code and codeName, or the driver's class of network errors."""
    details = getattr(error, "details", None)
    if isinstance(error, OperationFailure) or (isinstance(details, dict) and details.get("code")):
        found = details if isinstance(details, dict) else {}
        if found.get("code") == 1:
            return str(error)  # InternalError: what it says is what is to be mended
        return f"{found.get('code')} {found.get('codeName', '')}".strip()
    return type(error).__name__


class Load:
    """Writers with a ledger, readers of sorted cursors and of single rows, idle clients; ``stop`` ends them all."""

    def __init__(self, uri: str, *, writers: int = 4, readers: int = 3, finders: int = 3, idle: int = 50) -> None:
        self._client: MongoClient[Document] = MongoClient(uri, maxPoolSize=writers + readers + finders, **OPTIONS)
        self._port = urlsplit(uri).port
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.acknowledged: set[str] = set()
        self.increments: Counter[int] = Counter()  # acknowledged, by writer
        self.doubtful: Counter[int] = Counter()  # failed, and perhaps done all the same
        self.failures: list[tuple[float, str]] = []  # when, and which
        self.latencies: list[tuple[float, float]] = []  # when it ended, and seconds
        self._under_way: dict[int, float] = {}  # thread -> when it began
        self.wrong: list[str] = []
        self._writers = writers
        tasks: list[Callable[[], None]] = [lambda number=number: self._write(number) for number in range(writers)]  # type: ignore[misc]
        tasks += [self._read] * readers + [self._find] * finders
        self._threads = [threading.Thread(target=self._repeat, args=(task,)) for task in tasks]
        self._idle_wanted = idle
        self._idle: list[socket.socket] = []

    def start(self) -> None:
        """Prepare the collections and begin."""
        database = self._client[DATABASE]
        if database.rows.estimated_document_count() == 0:
            database.rows.insert_many([{"_id": number, "r": number * 7 % _ROWS} for number in range(_ROWS)])
        database.ledger.drop()
        database.counters.delete_many({})
        if self._writers:
            database.counters.insert_many([{"_id": number, "n": 0} for number in range(self._writers)])
        self._idle = [socket.create_connection(("127.0.0.1", self._port)) for _ in range(self._idle_wanted)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the load and wait for the last request."""
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
            if thread.is_alive():
                self.wrong.append("a request did not end")
        self._client.close()
        for idle in self._idle:
            idle.close()

    def failed(self, since: float = 0.0) -> Counter[str]:
        """Failed requests by code."""
        return Counter(code for at, code in self.failures if at >= since)

    def p99(self, last: float) -> float:
        """Seconds that the slowest hundredth of the successful requests of the last seconds took at least.

        One that waits still has taken as long as it has waited: those that are never answered are the slowest.
        """
        with self._lock:
            now = time.monotonic()
            found = [seconds for at, seconds in self.latencies if at >= now - last]
            found += [now - began for began in self._under_way.values()]
        return percentile(found, 0.99)

    def lost(self, uri: str) -> int:
        """Acknowledged writes that are not there, asked of a fresh client."""
        with MongoClient[Document](uri, **OPTIONS) as client:
            database = client[DATABASE]
            present = {row["_id"] for row in database.ledger.find({}, {"_id": 1}, batch_size=10_000)}
            counters = {row["_id"]: row["n"] for row in database.counters.find()}
        missing = len(self.acknowledged - present)
        for number, done in self.increments.items():
            n = counters.get(number, 0)
            missing += max(0, done - n)
            if n > done + self.doubtful[number]:
                self.wrong.append(f"writer {number}: {n} increments, {done} acknowledged")
        return missing

    def _repeat(self, task: Callable[[], None]) -> None:
        thread = threading.get_ident()
        while not self._stop.is_set():
            with self._lock:
                started = self._under_way[thread] = time.monotonic()
            try:
                task()
            except PyMongoError as error:
                with self._lock:
                    del self._under_way[thread]
                    self.failures.append((started, code_of(error)))
                # A client whose server is away does not spin.
                self._stop.wait(0.02)
            else:
                with self._lock:
                    ended = time.monotonic()
                    del self._under_way[thread]
                    self.latencies.append((ended, ended - started))

    def _write(self, number: int) -> None:
        database = self._client[DATABASE]
        name = f"{number}-{time.monotonic_ns()}"
        database.ledger.insert_one({"_id": name})
        self.acknowledged.add(name)
        try:
            database.counters.update_one({"_id": number}, {"$inc": {"n": 1}})
        except PyMongoError:
            self.doubtful[number] += 1
            raise
        self.increments[number] += 1

    def _read(self) -> None:
        rows: list[int] = []
        try:
            rows.extend(row["r"] for row in self._client[DATABASE].rows.find(sort=[("r", 1)], batch_size=_BATCH))
        finally:
            # A cursor that was cut short has given a beginning of the truth, in order, without gaps.
            if rows != list(range(len(rows))):
                self.wrong.append(f"a cursor gave {len(rows)} rows in a wrong order")
        if len(rows) != _ROWS:
            self.wrong.append(f"a cursor ended after {len(rows)} of {_ROWS} rows")

    def _find(self) -> None:
        """Point reads, which share connections to PostgreSQL."""
        for number in range(_BATCH):
            row = self._client[DATABASE].rows.find_one({"_id": number})
            if row != {"_id": number, "r": number * 7 % _ROWS}:
                self.wrong.append(f"row {number} was answered by {row}")


def serves(port: int, write: bool = True) -> bool:
    """Whether a new client's request is answered, and answered well."""
    options = OPTIONS | {"serverSelectionTimeoutMS": 200, "connectTimeoutMS": 200, "socketTimeoutMS": 1_000}
    with suppress(PyMongoError), MongoClient[Document](f"mongodb://127.0.0.1:{port}/", **options) as client:
        if write:
            client[DATABASE].probes.insert_one({})
        else:
            client[DATABASE].rows.find_one()
        return True
    return False


def percentile(values: Iterable[float], part: float) -> float:
    """The value below which ``part`` of all lie; infinity of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))] if ordered else float("inf")

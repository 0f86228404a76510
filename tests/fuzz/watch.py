"""What live.py keeps an eye on while it fuzzes: another client, the workers, PostgreSQL, and what is stored."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from pymongo import MongoClient
from pymongo.errors import PyMongoError

from dev.cluster import Cluster
from tests.fuzz.lenient import Document, decoded
from tests.fuzz.traffic import OVERDUE_SECONDS, Findings
from tests.wire import frame

Command = list[tuple[bytes, int | str]]
DATABASE = "watchdog"
_PROBE_SECONDS = 5.0
_PAUSE_SECONDS = 0.05
_MEASUREMENTS = 5
_CRASH = re.compile(r"was terminated by signal|all server processes terminated|PANIC: ")
_TRACEBACK = "Traceback (most recent call last)"
# With log_line_prefix '%m [%p] %b: '; what belongs to an entry is indented by a tab.
_ENTRY = re.compile(r"^\d{4}-\d\d-\d\d ")


class Watchdog(threading.Thread):
    """A client of PyMongo that must not notice anything."""

    def __init__(self, uri: str, findings: Findings) -> None:
        super().__init__(daemon=True)
        self._uri = uri
        self._findings = findings
        self._over = threading.Event()
        self.probes = 0
        self.longest = 0.0

    def run(self) -> None:
        """Insert and find until told to stop."""
        limit = int(OVERDUE_SECONDS * 1000)
        with MongoClient[Document](self._uri, socketTimeoutMS=limit, serverSelectionTimeoutMS=limit) as client:
            collection = client[DATABASE]["c"]
            while not self._over.wait(_PAUSE_SECONDS):
                started = time.monotonic()
                document = {"_id": self.probes, "x": "y" * (self.probes % 1000)}
                try:
                    collection.insert_one(document)
                    if collection.find_one({"_id": self.probes}) != document:
                        self._findings.add("the watchdog did not find what it had stored", str(self.probes))
                except PyMongoError as error:
                    self._findings.add("the watchdog got an error", f"{type(error).__name__}: {error}")
                self._judge(time.monotonic() - started)

    def _judge(self, seconds: float) -> None:
        self.probes += 1
        self.longest = max(self.longest, seconds)
        if seconds > _PROBE_SECONDS:
            self._findings.add(f"a probe took more than {_PROBE_SECONDS:.0f} s", f"{seconds:.1f} s")

    def stop(self) -> None:
        """End, and wait for it."""
        self._over.set()
        self.join(2 * OVERDUE_SECONDS)


class Log:
    """PostgreSQL's log, read as it grows."""

    def __init__(self, path: Path, findings: Findings) -> None:
        self._findings = findings
        self._file = path.open(errors="replace")
        self._entry: list[str] = []
        self.crashed = False

    def look(self) -> None:
        """Read on, and judge what has come."""
        for line in self._file:
            if _ENTRY.match(line):
                self._judge()
            self._entry.append(line)

    def close(self) -> None:
        """Read to the end."""
        self.look()
        self._judge()
        self._file.close()

    def _judge(self) -> None:
        text = "".join(self._entry)
        self._entry = []
        if _CRASH.search(text):
            self.crashed = True
            self._findings.add("PostgreSQL crashed", text.rstrip())
        elif _TRACEBACK in text:
            *lines, last = map(str.strip, text.rstrip().splitlines())
            ours = [line for line in lines if "/pg_ferret/" in line]
            self._findings.add(f"a traceback: {last.partition(':')[0]}, {(ours or lines)[-1]}", text.rstrip())


class Workers:
    """Their identity and their memory."""

    def __init__(self, cluster: Cluster, findings: Findings) -> None:
        self._cluster = cluster
        self._findings = findings
        self._at_first = self._identity()
        self._pids = [int(pid) for kind, pid, *_ in self._at_first if kind == "worker"]
        self.sizes: dict[int, list[int]] = {}

    def _identity(self) -> list[tuple[str, ...]]:
        names = ("kind", "pid", "generation", "restarts")
        return [tuple(row[name] or "" for name in names) for row in self._cluster.status()]

    def look(self, sent: int) -> None:
        """Measure, and tell whether they are still the same."""
        now = self._identity()
        if now != self._at_first:
            self._findings.add("a worker is not what it was", f"{self._at_first} -> {now}")
        self.sizes[sent] = [pss(pid) for pid in self._pids]

    def judge_growth(self, warm: int, percent: int) -> None:
        """Compare the last measurements with the first ones after ``warm`` messages, by their medians."""
        after = [sizes for sent, sizes in self.sizes.items() if sent >= warm]
        if len(after) < 2 * _MEASUREMENTS:
            return
        for slot, sizes in enumerate(zip(*after, strict=True), 1):
            first, last = median(sizes[:_MEASUREMENTS]), median(sizes[-_MEASUREMENTS:])
            if last > first * (1 + percent / 100):
                self._findings.add(f"a worker grew by more than {percent} %", f"worker {slot}: {first} -> {last} kB")


def pss(pid: int) -> int:
    """A process's memory in kB, what it shares in proportion; 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(text.split("\nPss:", 1)[1].split()[0])


class Reader:
    """Reads everything back, by bare messages: drivers would not send every name that the server may have taken."""

    def __init__(self, port: int, findings: Findings) -> None:
        self._findings = findings
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=OVERDUE_SECONDS)
        self.documents = 0
        self.collections = 0

    def read_all(self) -> None:
        """Every document of every collection; views may be as broken as what was made of them."""
        listed = self._ask([(b"listDatabases", 1), (b"$db", "admin")])
        for database in _items(listed, "databases"):
            name = str(database["name"])
            for found in self._documents([(b"listCollections", 1), (b"$db", name)], name):
                if found.get("type") == "collection":
                    self.collections += 1
                    self._read(name, str(found["name"]))
        self._socket.close()

    def _read(self, database: str, collection: str) -> None:
        started: Command = [(b"find", collection), (b"$db", database)]
        for _ in self._documents(started, database, collection):
            self.documents += 1
        self._ask([(b"listIndexes", collection), (b"$db", database)])

    def _documents(self, command: Command, database: str, collection: str = "") -> Iterator[Document]:
        batch, answer = "firstBatch", self._ask(command)
        while isinstance(cursor := answer.get("cursor"), dict):
            yield from _items(cursor, batch)
            if not cursor["id"]:
                return
            more: Command = [(b"getMore", int(cursor["id"])), (b"collection", collection), (b"$db", database)]
            batch, answer = "nextBatch", self._ask(more)

    def _ask(self, command: Command) -> Document:
        """The answer; one that is an error or cannot be read is a finding, and empty."""
        self._socket.sendall(frame(bytes(5) + encoded(command)))
        (length,) = struct.unpack("<i", head := self._exactly(4))
        answer = (head + self._exactly(length - 4))[21:]
        try:
            document = decoded(answer)
        except ValueError as error:
            self._findings.add("what is stored cannot be read back", f"{command}: {error}")
            return {}
        if document.get("ok") != 1.0:
            self._findings.add("what is stored cannot be read back", f"{command}: {document}")
        return document

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            more = self._socket.recv(size - len(data))
            if not more:
                raise ConnectionError("the gateway hung up while everything was read back")
            data += more
        return bytes(data)


def _items(document: Document, name: str) -> list[Document]:
    found = document.get(name)
    return found if isinstance(found, list) else []


def encoded(command: Command) -> bytes:
    """A command with names as they are stored, which need not be UTF-8: PyMongo would not write them."""
    elements = b""
    for name, value in command:
        if isinstance(value, int):
            elements += b"\x12" + name + b"\0" + struct.pack("<q", value)
        else:
            text = value.encode("utf-8", "surrogateescape") + b"\0"
            elements += b"\x02" + name + b"\0" + struct.pack("<i", len(text)) + text
    return struct.pack("<i", len(elements) + 5) + elements + b"\0"

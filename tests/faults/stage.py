"""What a fault works with: a cluster under load, eyes on its processes, and a stopwatch."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

from dev.cluster import Cluster, ClusterError
from tests.faults.load import Load, serves

Row = dict[str, Any]
_PATIENCE = 30.0
_POLL_SECONDS = 0.004


class Missed(Exception):
    """What a fault expects did not come true; the text says what."""


@dataclass
class Resources:
    """What the gateway holds; compared before and after."""

    pss: int = 0  # bytes, of supervisor and workers
    descriptors: int = 0  # without the connections to PostgreSQL
    cursors: int = 0  # in the registry
    cursor_files: int = 0


@dataclass
class Stage:
    """One cluster, its load, and what was seen."""

    cluster: Cluster
    load: Load
    limit: float  # seconds within which each recovery has to come
    patience: float = 1.0  # multiplies what else has a time limit
    recoveries: list[float] = field(default_factory=list)
    notes: dict[str, float] = field(default_factory=dict)  # other figures, by name
    problems: list[str] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)  # every process of the gateway that ferretdb.status ever showed
    _connection: psycopg.Connection[Row] | None = None

    # -- eyes -----------------------------------------------------------------------------------------------------

    def sql(self, text: str) -> list[Row]:
        """Rows of a query; a new connection is made when PostgreSQL has ended the last one."""
        for attempt in range(2):
            try:
                if self._connection is None or self._connection.closed:
                    self._connection = connect(self.cluster)
                return self._connection.execute(text).fetchall()
            except psycopg.OperationalError as error:
                self.hang_up()
                if attempt:
                    raise ClusterError(str(error)) from None
        raise AssertionError

    def hang_up(self) -> None:
        """Close our own connection to PostgreSQL."""
        if self._connection is not None:
            with suppress(psycopg.Error):
                self._connection.close()
            self._connection = None

    def status(self) -> list[Row]:
        """The rows of ferretdb.status."""
        rows = self.sql("select * from ferretdb.status")
        self.seen.update(row["pid"] for row in rows if row["pid"])
        return rows

    def workers(self) -> dict[int, Row]:
        """Slot -> row of the workers that are ready."""
        return {row["slot"]: row for row in self.status() if row["kind"] == "worker" and row["state"] == "ready"}

    def ready(self, count: int = 2) -> bool:
        """Whether the supervisor and exactly ``count`` workers are ready and there is nobody else."""
        return [row["state"] for row in self.status()] == ["ready"] * (count + 1)

    def supervisor(self) -> int:
        """The supervisor's pid; ClusterError between two of them."""
        pid = self.status()[0]["pid"]
        if not pid:
            raise ClusterError("there is no supervisor")
        return int(pid)

    def some_worker(self) -> tuple[int, int]:
        """Slot and pid of a worker."""
        slot, row = random.choice(sorted(self.workers().items()))
        return slot, int(row["pid"])

    def pids(self) -> list[int]:
        """Every process of the gateway."""
        return [row["pid"] for row in self.status() if row["pid"]]

    def launcher(self) -> int:
        """The launcher's pid."""
        return int(self.sql("select pid from pg_stat_activity where backend_type = 'pg_ferret launcher'")[0]["pid"])

    def backends(self) -> list[int]:
        """The pids of the gateway's connections to PostgreSQL."""
        return [row["pid"] for row in self.sql(GATEWAY_SQL)]

    def message(self) -> str:
        """The supervisor's message."""
        return str(self.status()[0]["message"] or "")

    def resources(self) -> Resources:
        """What the gateway holds at the moment, without clients."""
        self.until(lambda: all(not row["connections"] for row in self.workers().values()), "clients are gone")
        pids = self.pids()
        files = Path(self.cluster.data) / "pg_documentdb_cursor_files"
        return Resources(
            pss=sum(pss(pid) for pid in pids),
            descriptors=sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids) - len(self.backends()),
            cursors=int(self.status()[0]["cursors"] or 0),
            cursor_files=len(list(files.iterdir())) if files.is_dir() else 0,
        )

    # -- the stopwatch --------------------------------------------------------------------------------------------

    def until(self, condition: Callable[[], object], what: str, seconds: float = _PATIENCE) -> float:
        """Seconds until ``condition`` is true; Missed when it does not become so. A server that is away is a no."""
        started = time.monotonic()
        while True:
            try:
                if condition():
                    return time.monotonic() - started
            except (ClusterError, psycopg.Error, OSError, IndexError):
                pass
            if time.monotonic() - started > seconds:
                raise Missed(f"not within {seconds:g} s: {what}")
            time.sleep(_POLL_SECONDS)

    def recovers(self, condition: Callable[[], object], what: str, since: float | None = None) -> None:
        """Measure one recovery, from ``since`` (now, if not given); Missed when it takes longer than the limit."""
        started = time.monotonic() if since is None else since
        self.until(condition, what)
        took = time.monotonic() - started
        self.recoveries.append(took)
        if took > self.limit:
            self.problems.append(f"{what}: took {took:.2f} s, not {self.limit:g} s")

    def serving(self, write: bool = True) -> bool:
        """Whether a new client is served."""
        return serves(self.cluster.port, write)

    def check(self, fine: object, problem: str) -> None:
        """Note a problem unless all is fine."""
        if not fine:
            self.problems.append(problem)

    def note(self, name: str, value: float) -> None:
        """Keep the largest figure of its name."""
        self.notes[name] = max(value, self.notes.get(name, 0.0))

    def gone(self, pids: list[int], seconds: float = 2.0) -> None:
        """None of these processes is left after so many seconds."""
        self.until(lambda: not any(map(lives, pids)), "no process is left", seconds)

    def configure(self, **settings: str) -> None:
        """Change settings of ferretdb and reload."""
        self.cluster.configure(**{f"ferretdb__{name}": value for name, value in settings.items()})

    def supervisor_anew(self, condition: Callable[[], object], what: str) -> None:
        """Kill the supervisor until ``condition`` is true of its successor.

        The first successor may have been started by a launcher that had not read the settings yet.
        """
        kill(self.supervisor())

        def true_of_successor() -> bool:
            if condition():
                return True
            if self.ready():
                kill(self.supervisor())
            return False

        self.until(true_of_successor, what)

    @contextmanager
    def calm(self) -> Iterator[None]:
        """No request of the load fails in here."""
        started = time.monotonic()
        yield
        failed = self.load.failed(started)
        self.check(not failed, f"requests failed: {dict(failed)}")


GATEWAY_SQL = "select pid, state, query from pg_stat_activity where application_name = 'pg_ferret' order by pid"


def connect(cluster: Cluster) -> psycopg.Connection[Row]:
    """A superuser's connection to the cluster."""
    host, port = str(cluster.socket_dir), cluster.pg_port
    return psycopg.connect(
        host=host, port=port, user="postgres", dbname="postgres", autocommit=True, connect_timeout=5,
        row_factory=dict_row,
    )  # fmt: skip


def lives(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """A signal to a process that may have gone by itself."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def pss(pid: int) -> int:
    """The process's share of memory, in bytes; 0 if it has just gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def new_cluster(settings: dict[str, str]) -> Cluster:
    """A cluster of its own, not started."""
    directory = Path(tempfile.mkdtemp(prefix="pgf-fault-", dir="/tmp"))
    return Cluster(directory, settings={"ferretdb.workers": "2", **settings})

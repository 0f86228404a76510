"""The servers that are measured: gateways with processes of their own, in front of one PostgreSQL."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from pathlib import Path
from typing import Any, Final

from bench import procfs
from bench.generator import Load
from bench.plan import PAUSE_SECONDS, WARM_UP, WARM_UP_SECONDS, Point, paced
from bench.sample import Cpu, Sample
from dev.cluster import PG_BIN, SERVER_USER, Cluster, answers_hello, free_port, server_user, wait_for

# All targets read and write the same documents: copies, by where they happen to lie in memory, differ by a tenth.
DATABASE: Final = "bench"
# pgbench's connections are PostgreSQL's; more than that are not what a gateway would open.
_PGBENCH_CLIENTS: Final = 64


class Target:
    """A gateway on ``uri`` in front of ``cluster``."""

    name: str
    uri: str

    def __init__(self, cluster: Cluster, bin_dir: Path) -> None:
        self.cluster = cluster
        self.bin_dir = bin_dir

    def start(self) -> None:
        """Begin to serve, on a cluster that runs."""

    def stop(self) -> None:
        """End what start began."""

    def gateway(self) -> set[int]:
        """Process ids of the gateway."""
        raise NotImplementedError

    def postgres(self) -> set[int]:
        """Process ids of PostgreSQL: the postmaster and all below, but for pg_ferret's Python."""
        pid = self.cluster.pid
        assert pid is not None
        launcher = pg_ferret_launcher(self.cluster)
        return procfs.tree(pid) - (procfs.tree(launcher) - {launcher} if launcher else set())

    def can(self, point: Point) -> bool:
        """Whether this target knows the operation."""
        return True

    def setup(self) -> None:
        """Load the documents, in place of those that are there. CalledProcessError if that fails."""
        command: list[str | Path] = [self.bin_dir / "load", "-setup", "-uri", self.uri, "-db", DATABASE]
        subprocess.run(command, check=True)

    def load(self, point: Point, seconds: float, pace: int = 0, turns: int = 1) -> Load:
        """Start the load generator, which is to run for so long in so many equal turns.

        It then sends ``pace`` requests a second, if that is not 0.
        """
        numbers = {"clients": point.clients, "seconds": seconds, "rate": pace, "turns": turns}
        command: list[str | Path] = [self.bin_dir / "load", "-uri", self.uri, "-db", DATABASE]
        command += ["-op", paced(point.op) or point.op, *[f"-{name}={value}" for name, value in numbers.items()]]
        return Load(command)

    def begin(self, point: Point, seconds: float, pace: int = 0, turns: int = 1) -> Run:
        """Prepare one run of one operation; as for `load`."""
        return Run(self, point, seconds, pace, turns)

    def measure(self, point: Point, seconds: float) -> Sample:
        """One run of one operation, by itself."""
        run = self.begin(point, seconds)
        run.go()
        return run.end()

    def memory(self) -> tuple[int, int]:
        """PSS of the gateway and of PostgreSQL, in bytes."""
        return procfs.pss_bytes(self.gateway()), procfs.pss_bytes(self.postgres())

    def version(self) -> str:
        """What exactly is measured."""
        raise NotImplementedError

    def cpu(self) -> Cpu:
        """What has been taken until now."""
        gateway, postgres = self.gateway(), self.postgres()
        return procfs.cpu_seconds(gateway), procfs.cpu_seconds(postgres), *procfs.machine_seconds()


class Run:
    """One operation at one gateway, so many seconds in so many turns: others have theirs between them."""

    def __init__(self, target: Target, point: Point, seconds: float, pace: int, turns: int) -> None:
        self._target, self._point = target, point
        self._load = target.load(point, seconds, pace, turns)
        self._result: dict[str, Any] = {}
        self._spans: list[tuple[Cpu, Cpu]] = []

    def go(self) -> None:
        """One turn."""
        if self._spans and not self._load.ready:
            return  # it has failed
        time.sleep(PAUSE_SECONDS)
        before = self._target.cpu()
        self._result = self._load.run()
        self._spans.append((before, self._target.cpu()))

    def end(self) -> Sample:
        """What all turns have given."""
        self._load.close()
        sample = Sample(self._target.name, self._point.op, self._point.clients, **self._result)
        sample.book(*self._spans)
        return sample


def begin_round(cluster: Cluster, targets: list[Target]) -> None:
    """Start everything anew, and let connections to PostgreSQL be made and backends fill their caches.

    Where a start happens to put stack and heap makes the same query in all backends of one gateway up to 4 % slower or
    quicker than in those of the other: each round has another start. And from the second round on the write-ahead log
    goes to files of the round before, which the checkpoint at its end has left, as in a server that has run for long.
    """
    for target in targets:
        target.stop()
    cluster.restart()
    for target in targets:
        target.start()
    for target in targets:
        for point in WARM_UP:
            if target.can(point):
                target.measure(point, WARM_UP_SECONDS)


def pg_ferret_launcher(cluster: Cluster) -> int | None:
    """The background worker whose child is the supervisor."""
    below = procfs.children()
    for child in below.get(cluster.pid or 0, []):
        if any("-m supervisor" in procfs.command_line(pid) for pid in below.get(child, [])):
            return child
    return None


class PgFerret(Target):
    """pg_ferret: supervisor and workers are the gateway; the launcher is a small part of PostgreSQL."""

    name = "pg_ferret"

    def __init__(self, cluster: Cluster, bin_dir: Path) -> None:
        super().__init__(cluster, bin_dir)
        self.uri = cluster.uri

    def start(self) -> None:
        wait_for(self._connected, 20, "pg_ferret to connect to PostgreSQL")

    def _connected(self) -> bool:
        """Whether every worker is there and has heard that DocumentDB has been installed."""
        workers = [row for row in self.cluster.status() if row["kind"] == "worker"]
        return bool(workers) and all(int(row["pool_size"] or 0) for row in workers)

    def gateway(self) -> set[int]:
        launcher = pg_ferret_launcher(self.cluster)
        return procfs.tree(launcher) - {launcher} if launcher else set()

    def version(self) -> str:
        python = subprocess.run(["/usr/bin/python3", "--version"], capture_output=True, text=True, check=True)
        workers = sum(row["kind"] == "worker" for row in self.cluster.status())
        return f"{workers} worker{'s' * (workers != 1)}, {python.stdout.strip()}"


class FerretDB(Target):
    """FerretDB (Go), without authentication, on PostgreSQL's Unix socket as pg_ferret is."""

    name = "FerretDB"

    def __init__(self, cluster: Cluster, bin_dir: Path) -> None:
        super().__init__(cluster, bin_dir)
        self._port = free_port()
        self.uri = f"mongodb://127.0.0.1:{self._port}/"
        self._user, self._group, self._groups = server_user()
        self._directory = cluster.directory / "ferretdb"
        self._directory.mkdir()
        if self._user is not None and self._group is not None:
            os.chown(self._directory, self._user, self._group)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        postgres = f"postgres://{SERVER_USER}@/postgres?host={self.cluster.socket_dir}&port={self.cluster.pg_port}"
        with (self.cluster.directory / "ferretdb.log").open("a") as log:
            self._process = subprocess.Popen(
                [
                    self.bin_dir / "ferretdb",
                    "--no-auth",
                    "--telemetry=disable",
                    "--debug-addr=-",
                    "--log-level=ERROR",
                    f"--listen-addr=127.0.0.1:{self._port}",
                    f"--state-dir={self._directory}",
                    f"--postgresql-url={postgres}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                user=self._user,
                group=self._group,
                extra_groups=self._groups,
                env={"HOME": str(self._directory)},
            )
        wait_for(lambda: answers_hello(self._port), 20, "hello from FerretDB")

    def gateway(self) -> set[int]:
        return {self._process.pid} if self._process else set()

    def version(self) -> str:
        output = subprocess.run([self.bin_dir / "ferretdb", "--version"], capture_output=True, text=True, check=True)
        words = dict(line.split(":", 1) for line in output.stdout.splitlines() if ":" in line)
        return words.get("version", output.stdout.split("\n", 1)[0]).strip()

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


class Pgbench(Target):
    """No gateway at all: pgbench calls the function that a find by _id ends in. The limit."""

    name = "pgbench"

    def __init__(self, cluster: Cluster, bin_dir: Path) -> None:
        super().__init__(cluster, bin_dir)
        self._directory = cluster.directory / "pgbench"
        self._directory.mkdir()
        self._script = self._directory / "find.sql"
        # A blank before true: pgbench would take ":true" for a variable.
        command = """{"find":"docs","filter":{"_id":{"$numberInt":"' || :id || '"}},"limit": 1,"singleBatch": true}"""
        self._script.write_text(
            "\\set id random(0, 9999)\n"
            "SELECT * FROM documentdb_api.find_cursor_first_page("
            f"'{DATABASE}', ('{command}')::documentdb_core.bson);\n"
        )

    def can(self, point: Point) -> bool:
        return point.op == "find" and point.clients <= _PGBENCH_CLIENTS

    def gateway(self) -> set[int]:
        return set()

    def setup(self) -> None:
        """It reads what another target has loaded."""

    def measure(self, point: Point, seconds: float) -> Sample:
        sample = Sample(self.name, point.op, point.clients)
        log = self._directory / "log"
        command: list[str | Path] = [PG_BIN / "pgbench", "-n", "-M", "prepared", "-f", self._script]
        # It takes whole seconds only.
        command += ["-T", str(max(1, round(seconds))), "-l", f"--log-prefix={log}"]
        command += ["-c", str(point.clients), "-j", str(min(point.clients, 2))]
        command += ["-h", self.cluster.socket_dir, "-p", str(self.cluster.pg_port), "-U", SERVER_USER, "postgres"]
        before, driver = self.cpu(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        after, usage = self.cpu(), resource.getrusage(resource.RUSAGE_CHILDREN)
        sample.driver_cpu = usage.ru_utime + usage.ru_stime - driver.ru_utime - driver.ru_stime
        sample.book((before, after))
        if done.returncode:
            sample.error = next(line for line in done.stderr.splitlines() if "error" in line)
            return sample
        times: list[float] = []
        for file in self._directory.glob("log.*"):
            times += [float(line.split(" ", 3)[2]) for line in file.read_text().splitlines()]
            file.unlink()
        times.sort()
        (rate,) = (line.split()[2] for line in done.stdout.splitlines() if line.startswith("tps"))
        sample.ops, sample.seconds = len(times), len(times) / float(rate)
        sample.p50, sample.p99, sample.p999 = (times[int(q * len(times))] for q in (0.5, 0.99, 0.999))
        sample.max = times[-1]
        return sample

    def version(self) -> str:
        return "prepared statements, 2 threads"

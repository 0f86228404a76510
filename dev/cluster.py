"""A PostgreSQL server with DocumentDB and pg_ferret in a folder of its own.

Used by dev/instance.py (``make run``) and by tests/integration. Runs inside dev/enter,
as root (the server then runs as ``postgres``) or as the user the server shall run as. Builds nothing: dev/build has put
the extension below ``$PG_FERRET_BUILD``, and it is used from there without being installed.
"""

from __future__ import annotations

import asyncio
import csv
import os
import pwd
import re
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

PG_BIN = Path("/usr/lib/postgresql/18/bin")
SERVER_USER = "postgres"
DATABASE = "postgres"
# What fits into sockaddr_un, less PostgreSQL's own "/.s.PGSQL.65535.lock".
_SOCKET_DIR_MAX = 107 - 21
# How psql shall show NULL, to tell it from an empty text.
_NULL = "\\N"
_ZOMBIE = "Z"
_START_SECONDS = 60
_HEADER = struct.Struct("<iiii")


class ClusterError(Exception):
    """A server could not be made, started, asked or stopped; the text is meant for the user."""


def wait_for(predicate: Callable[[], T], deadline: float = 10.0, what: str = "") -> T:
    """Poll until ``predicate()`` is true and return its value; TimeoutError naming ``what`` after ``deadline`` seconds.

    OSError and ClusterError count as "not yet": a server that is starting refuses.
    """
    end = time.monotonic() + deadline
    while True:
        last: object = None
        try:
            if last := predicate():
                return last
        except (OSError, ClusterError) as error:
            last = error
        if time.monotonic() > end:
            raise TimeoutError(f"not within {deadline:g} s: {what or predicate!r} (last: {last!r})")
        time.sleep(0.02)


async def wait_for_async(predicate: Callable[[], T], deadline: float = 10.0, what: str = "") -> T:
    """As wait_for, in a thread: the event loop keeps running."""
    return await asyncio.to_thread(wait_for, predicate, deadline, what)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def port_is_free(port: int) -> bool:
    """Whether one could listen on 127.0.0.1:``port`` now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _hello_message() -> bytes:
    """An OP_MSG with {hello: 1, $db: "admin"}, made by hand: this file needs no driver."""
    elements = b"\x10hello\0" + struct.pack("<i", 1) + b"\x02$db\0" + struct.pack("<i", 6) + b"admin\0"
    body = b"\0\0\0\0\0" + struct.pack("<i", len(elements) + 5) + elements + b"\0"
    return _HEADER.pack(_HEADER.size + len(body), 1, 0, 2013) + body


def answers_hello(port: int, timeout: float = 2.0) -> bool:
    """Whether a gateway on 127.0.0.1:``port`` answers hello with ok. Raises OSError while nobody listens."""
    with socket.create_connection(("127.0.0.1", port), timeout) as connection:
        connection.sendall(_hello_message())
        stream = connection.makefile("rb")
        header = stream.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return False
        reply = stream.read(_HEADER.unpack(header)[0] - _HEADER.size)
    return b"\x01ok\0" + struct.pack("<d", 1.0) in reply


def _library_dir() -> Path:
    """The folder that holds pg_ferret.so and extension/pg_ferret.control."""
    build = os.environ.get("PG_FERRET_BUILD")
    if not build or not (current := Path(build) / "current").exists():
        raise ClusterError("the extension is not built: run make build")
    return current.resolve()


def _quoted(value: str) -> str:
    """A value as postgresql.conf wants it."""
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"


class Cluster:
    """One server: ``data``, ``log``, sockets and ``uri`` below ``directory``.

    ``port`` is the gateway's (a free one if 0), ``pg_port`` PostgreSQL's (it names the socket; TCP only if
    ``listen_addresses`` is among the settings). ``settings`` are lines of postgresql.conf, later changed by
    ``configure``. ``preload=False`` leaves pg_ferret out.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        port: int = 0,
        pg_port: int = 5432,
        settings: Mapping[str, str] | None = None,
        preload: bool = True,
    ) -> None:
        self.directory = Path(directory)
        self.data = self.directory / "data"
        self.log_file = self.directory / "log"
        self.port = port or free_port()
        self.pg_port = pg_port
        self.preload = preload
        self.settings = dict(settings or {})

    @property
    def uri(self) -> str:
        """Where drivers connect to."""
        return f"mongodb://127.0.0.1:{self.port}/"

    @property
    def socket_dir(self) -> Path:
        """The private folder of PostgreSQL's socket: in ours, or where the path is too long for a socket, in /tmp."""
        inside = self.directory / "sockets"
        if len(os.fsencode(inside)) <= _SOCKET_DIR_MAX:
            return inside
        memo = self.directory / "socket_dir"
        if not memo.exists():
            memo.write_text(tempfile.mkdtemp(prefix="pgf-", dir="/tmp"))
        return Path(memo.read_text())

    @property
    def log(self) -> str:
        """PostgreSQL's log, which is ours too."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    @property
    def pid(self) -> int | None:
        """The postmaster's process id; None if it does not run."""
        pid, state = self._postmaster()
        return None if state == _ZOMBIE else pid

    def _postmaster(self) -> tuple[int | None, str]:
        """Its process id, None if there is none, and its state as in /proc."""
        try:
            pid = int((self.data / "postmaster.pid").read_text().split("\n", 1)[0])
            # "PID (comm) state …"
            _, command, rest = re.split(r" \(|\) ", Path(f"/proc/{pid}/stat").read_text(), maxsplit=2)
        except (FileNotFoundError, ProcessLookupError, ValueError):
            return None, ""
        return (pid, rest[0]) if command.startswith("postgres") else (None, "")

    def init(self) -> None:
        """Make the data directory; does nothing if there is one."""
        self._make_directories()
        if (self.data / "PG_VERSION").exists():
            return
        shutil.rmtree(self.data, ignore_errors=True)  # what an interrupted call left
        fresh = self.directory / "data.new"
        shutil.rmtree(fresh, ignore_errors=True)
        # Local connections are trusted: the socket's folder is private. TCP asks for a password nobody has yet.
        flags = ["-U", SERVER_USER, "-E", "UTF8", "--locale=C.UTF-8", "-A", "trust", "--auth-host=scram-sha-256"]
        self._run([PG_BIN / "initdb", "-D", fresh, "--no-instructions", *flags])
        self._add_include(fresh)
        fresh.rename(self.data)

    def standby(self, directory: Path | str, *, port: int = 0, settings: Mapping[str, str] | None = None) -> Cluster:
        """A hot standby of this running server, not yet started; ``settings`` add to ours."""
        other = Cluster(
            directory,
            port=port,
            pg_port=self.pg_port,
            settings={**self.settings, **(settings or {})},
            preload=self.preload,
        )
        other._make_directories()
        flags = ["-c", "fast", "-X", "stream", "-R"]
        self._run([PG_BIN / "pg_basebackup", "-D", other.data, *flags, *self._address()])
        return other

    def start(self, *, wait: bool = True) -> None:
        """Start PostgreSQL; with ``wait`` and pg_ferret, return when the gateway answers hello and can write.

        Raises ClusterError with the end of the log when it does not come up.
        """
        self.init()
        self._write_settings()
        before = len(self.log)
        # One that was killed is there until its parent has seen it, and PostgreSQL takes it for alive.
        wait_for(lambda: self._postmaster()[1] != _ZOMBIE, _START_SECONDS, "the end of the postmaster that was killed")
        try:
            self._control("start", "-w", "-t", str(_START_SECONDS), "-l", str(self.log_file))
        except ClusterError as error:
            raise ClusterError(f"{error}\n{_tail(self.log[before:])}") from None
        if wait and self.preload:
            self.wait(before)

    def wait(self, log_from: int = 0) -> None:
        """Return when the gateway answers hello and can write; ClusterError with its excuse if it does not."""
        try:
            wait_for(lambda: answers_hello(self.port), _START_SECONDS, f"hello from port {self.port}")
            wait_for(self._has_extensions, _START_SECONDS, "both extensions in the database")
        except (ClusterError, TimeoutError) as error:
            raise ClusterError(f"{error}\n{self._excuse()}{_tail(self.log[log_from:])}") from None

    def _excuse(self) -> str:
        """What the gateway says of itself, as a line, if it says anything."""
        try:
            row = self.status()[0]
        except (ClusterError, IndexError):
            return ""
        return f"ferretdb.status: {row['state']}, {row['message']}\n"

    def stop(self, mode: str = "fast") -> None:
        """Stop the server (smart, fast or immediate) if it runs."""
        if self.pid is not None:
            self._control("stop", "-w", "-m", mode)
            self._forget_state()

    def restart(self, mode: str = "fast") -> None:
        """Stop and start."""
        self.stop(mode)
        self.start()

    def configure(self, **settings: str) -> None:
        """Change settings and reload; a dot in a name is written as two underscores (``ferretdb__workers="2"``)."""
        self.settings.update({name.replace("__", "."): value for name, value in settings.items()})
        self._write_settings()
        if self.pid is not None:
            self._control("reload")

    def promote(self) -> None:
        """Make a standby the primary; returns when it is."""
        self._control("promote", "-w")

    def psql(self, sql: str, *, database: str = DATABASE) -> list[tuple[str | None, ...]]:
        """Run SQL through a new connection; rows as text, NULL as None. ClusterError with the server's message."""
        flags = ["-X", "-q", "-t", "--csv", "-v", "ON_ERROR_STOP=1", "-P", f"null={_NULL}", "-d", database]
        output = self._run([PG_BIN / "psql", *self._address(), *flags, "-c", sql])
        return [tuple(None if cell == _NULL else cell for cell in row) for row in csv.reader(output.splitlines(True))]

    def status(self) -> list[dict[str, str | None]]:
        """The rows of ferretdb.status by column name."""
        names = [
            str(row[0])
            for row in self.psql(
                "select attname from pg_attribute where attrelid = 'ferretdb.status'::regclass"
                " and attnum > 0 and not attisdropped order by attnum"
            )
        ]
        return [dict(zip(names, row, strict=True)) for row in self.psql("table ferretdb.status")]

    def psql_command(self, arguments: Sequence[str]) -> list[str]:
        """The command line of an interactive psql, for exec by the server's user."""
        return [str(PG_BIN / "psql"), *map(str, self._address()), "-d", DATABASE, *arguments]

    def destroy(self) -> None:
        """Stop at once and remove everything."""
        with suppress(ClusterError):
            self.stop("immediate")
        if (pid := self.pid) is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._forget_state()
        if self.directory.exists():
            shutil.rmtree(self.socket_dir, ignore_errors=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _forget_state(self) -> None:
        """Remove the gateway's state in memory, which it would use again at the next start."""
        if not self.data.exists():
            return
        found = self.data.stat()
        for memo in Path("/dev/shm").glob("pg_ferret.*/postmaster"):
            with suppress(OSError):
                if f"{found.st_dev}:{found.st_ino}" in memo.read_text().splitlines():
                    shutil.rmtree(memo.parent)

    def _has_extensions(self) -> bool:
        """Whether the launcher has finished the database; on the first start that takes half a second longer."""
        return bool(self.psql("select extname from pg_extension where extname in ('documentdb', 'pg_ferret')")[1:])

    def _address(self) -> list[str | Path]:
        return ["-h", self.socket_dir, "-p", str(self.pg_port), "-U", SERVER_USER]

    def _make_directories(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.socket_dir.mkdir(exist_ok=True)
        for path, mode in ((self.directory, 0o755), (self.socket_dir, 0o700)):
            if os.geteuid() == 0:
                entry = pwd.getpwnam(SERVER_USER)
                os.chown(path, entry.pw_uid, entry.pw_gid)
            path.chmod(mode)

    @staticmethod
    def _add_include(data: Path) -> None:
        with (data / "postgresql.conf").open("a") as file:
            file.write("\ninclude_if_exists = 'dev.conf'\n")

    def _write_settings(self) -> None:
        library = _library_dir()
        lines = {
            "dynamic_library_path": f"{library}:$libdir",
            "extension_control_path": f"{library}:$system",
            "shared_preload_libraries": "pg_cron,pg_documentdb_core,pg_documentdb" + ",pg_ferret" * self.preload,
            "cron.database_name": DATABASE,
            "cron.use_background_workers": "on",
            # Two jobs every two seconds would be most of the log.
            "cron.log_run": "off",
            "cron.log_statement": "off",
            # Its background worker would try TCP every second, without a password.
            "documentdb.localhost_connection_string": f"host={self.socket_dir}",
            "documentdb.defaultCursorExpiryTimeLimitSeconds": "600",
            "listen_addresses": "",
            "port": str(self.pg_port),
            "unix_socket_directories": str(self.socket_dir),
            "max_worker_processes": "16",
            "log_line_prefix": "%m [%p] %b: ",
        }
        if self.preload:
            lines["ferretdb.listen_addr"] = f"127.0.0.1:{self.port}"
        lines |= self.settings
        fresh = self.data / "dev.conf.new"
        head = "# Written at each start: what you set here is lost, what you set in postgresql.conf is overridden.\n"
        fresh.write_text(head + "".join(f"{name} = {_quoted(value)}\n" for name, value in lines.items()))
        fresh.chmod(0o644)
        fresh.rename(self.data / "dev.conf")

    def _control(self, *arguments: str) -> None:
        self._run([PG_BIN / "pg_ctl", "-s", "-D", self.data, *arguments])

    def _run(self, command: Sequence[str | Path]) -> str:
        """Run a program of PostgreSQL as the server's user; its output. ClusterError if it fails."""
        # The output goes to files: a server started by pg_ctl would hold a pipe open for ever.
        with tempfile.TemporaryFile("w+", errors="replace") as output, tempfile.TemporaryFile("w+") as errors:
            user, group, groups = server_user()
            done = subprocess.run(
                command,
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                cwd="/",
                user=user,
                group=group,
                extra_groups=groups,
            )
            output.seek(0)
            errors.seek(0)
            if done.returncode:
                raise ClusterError(f"{Path(command[0]).name}: {errors.read().strip() or output.read().strip()}")
            return output.read()


def server_user() -> tuple[int | None, int | None, list[int] | None]:
    """User, group and groups that make a child process the server's user; all None unless we are root."""
    if os.geteuid() != 0:
        return None, None, None
    entry = pwd.getpwnam(SERVER_USER)
    return entry.pw_uid, entry.pw_gid, os.getgrouplist(SERVER_USER, entry.pw_gid)


def _tail(text: str, lines: int = 20) -> str:
    return "\n".join(text.splitlines()[-lines:])

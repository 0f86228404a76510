"""Every ``ferretdb.*`` setting, defined once, and what a worker must know of its PostgreSQL server.

The launcher reads pg_settings and sends the rows as JSON, which ``config.check`` turns into a ``Config``.  PostgreSQL
has checked types and ranges by then with code generated from this file (``config.generate``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Annotated, Any, Literal, get_type_hints

PREFIX = "ferretdb."
SECOND = 1000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
DAY = 24 * HOUR

# A host name, an IPv4 address, or an IPv6 address in brackets, and a port; as check_listen_addr() in pg_ferret.c.
_ADDRESS = re.compile(r"(?:([A-Za-z0-9._-]+)|\[([0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?)\]):([0-9]{1,5})", re.ASCII)
# Of a worker's connections to PostgreSQL up to half serve cheap reads; writers need several for a commit in common.
_CONNECTIONS_EACH = 4


@dataclass(frozen=True, slots=True)
class Guc:
    """What PostgreSQL needs to define a setting, besides its type and its default.

    ``bounds`` are a number's least and greatest value; ``flags`` and ``hooks`` (check, assign, show) are C names.
    """

    help: str
    bounds: tuple[int, int] | None = None
    restart: bool = False
    milliseconds: bool = False
    megabytes: bool = False
    octal: bool = False
    flags: tuple[str, ...] = ()
    hooks: tuple[str, str, str] = ("NULL", "NULL", "NULL")


_ABSOLUTE = ("check_absolute_path", "NULL", "NULL")


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings' values; times are milliseconds.  The fields' order is the order of the documentation."""

    enabled: Annotated[
        bool,
        Guc(
            "Whether clients are served. Off closes the listen addresses, lets requests finish within"
            " ferretdb.graceful_timeout, and closes all connections to PostgreSQL."
        ),
    ] = True
    listen_addr: Annotated[
        tuple[str, ...],
        Guc(
            "TCP addresses to listen on: host:port or [IPv6]:port, several separated by commas; - is none.",
            flags=("GUC_LIST_INPUT",),
            hooks=("check_listen_addr", "NULL", "NULL"),
        ),
    ] = ("127.0.0.1:27017",)
    listen_unix: Annotated[
        str,
        Guc(
            "Path of a Unix socket to listen on; empty is none.",
            hooks=("check_socket_path", "NULL", "NULL"),
        ),
    ] = ""
    unix_socket_permissions: Annotated[
        int,
        Guc(
            "Access permissions of the Unix socket, in octal as for chmod.",
            octal=True,
            hooks=("NULL", "NULL", "show_octal"),
            bounds=(0, 0o777),
        ),
    ] = 0o700
    workers: Annotated[
        int,
        Guc(
            "Worker processes; 0 is one for every two CPU cores, as far as ferretdb.pool_max_conns has four connections"
            " for each. Never more than ferretdb.max_workers.",
            bounds=(0, 1024),
        ),
    ] = 0
    max_workers: Annotated[
        int, Guc("Limit of ferretdb.workers: the size of the status table.", restart=True, bounds=(1, 1024))
    ] = 64
    max_requests: Annotated[
        int,
        Guc("Requests after which a worker is replaced, its successor first; 0 is never.", bounds=(0, 2_000_000_000)),
    ] = 0
    max_requests_jitter: Annotated[
        int,
        Guc(
            "Up to so many requests more, by chance, so that workers are not all replaced at once.",
            bounds=(0, 2_000_000_000),
        ),
    ] = 0
    max_connections: Annotated[
        int,
        Guc("Client connections allowed, all workers together.", bounds=(1, 1_000_000)),
    ] = 10_000
    pool_min_conns: Annotated[
        int, Guc("Connections to PostgreSQL kept open, all workers together.", bounds=(0, 10_000))
    ] = 4
    pool_max_conns: Annotated[
        int,
        Guc(
            "Connections to PostgreSQL allowed, all workers together; each worker has at least one.",
            bounds=(1, 10_000),
        ),
    ] = 40
    batch_scheduling: Annotated[
        bool,
        Guc(
            "Schedules workers and their connections to PostgreSQL as batch work, which waits until a processor is free"
            " instead of interrupting others: more requests per second where these are the machine's main load."
        ),
    ] = True
    query_wait_timeout: Annotated[
        int,
        Guc(
            "How long a request waits for a free connection to PostgreSQL; 0 is for ever.",
            milliseconds=True,
            bounds=(0, DAY),
        ),
    ] = 30 * SECOND
    client_timeout: Annotated[
        int,
        Guc(
            "A client that stops in the middle of a message, or takes nothing of its reply, for this long is"
            " disconnected; 0 is never. Idle clients are not concerned.",
            milliseconds=True,
            bounds=(0, DAY),
        ),
    ] = MINUTE
    client_memory: Annotated[
        int,
        Guc(
            "Memory for messages that are not complete and replies that are not taken, all workers together; beyond it"
            " the clients that have been stuck the longest are disconnected.",
            megabytes=True,
            bounds=(64, 1024 * 1024),
        ),
    ] = 1024
    cursor_timeout: Annotated[
        int,
        Guc(
            "How long an idle cursor is kept; sorted and grouped results no longer than"
            " documentdb.defaultCursorExpiryTimeLimitSeconds.",
            milliseconds=True,
            bounds=(SECOND, DAY),
        ),
    ] = 10 * MINUTE
    worker_timeout: Annotated[
        int,
        Guc(
            "A worker whose event loop stands still for this long is replaced.",
            milliseconds=True,
            bounds=(SECOND, HOUR),
        ),
    ] = 30 * SECOND
    graceful_timeout: Annotated[
        int,
        Guc("How long a worker that is to leave may take to finish its requests.", milliseconds=True, bounds=(0, HOUR)),
    ] = 30 * SECOND
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Guc(
            "Least severe messages to write to the server log, as DEBUG1, LOG or WARNING; log_min_messages applies too."
        ),
    ] = "info"
    database: Annotated[
        str,
        Guc("Database that holds DocumentDB; must equal cron.database_name.", restart=True, flags=("GUC_IS_NAME",)),
    ] = "postgres"
    python: Annotated[
        str,
        Guc(
            "Python interpreter that runs the gateway; a change acts when the supervisor next starts.",
            flags=("GUC_SUPERUSER_ONLY",),
            hooks=_ABSOLUTE,
        ),
    ] = "/usr/bin/python3"
    state_dir: Annotated[
        str,
        Guc(
            "Directory, best on tmpfs, for what workers share; empty is a private one in /dev/shm.",
            flags=("GUC_SUPERUSER_ONLY",),
            hooks=_ABSOLUTE,
        ),
    ] = ""

    def worker_count(self) -> int:
        """How many workers there are to be, at least 1."""
        # A request takes PostgreSQL at least as much CPU time as its worker: with more workers than this, the two
        # only take turns on a core, and each finds fewer requests to send off together.
        needed = (len(os.sched_getaffinity(0)) + 1) // 2
        supplied = max(1, self.pool_max_conns // _CONNECTIONS_EACH)
        return min(self.workers or min(needed, supplied), self.max_workers)


@dataclass(frozen=True, slots=True)
class SettingError:
    """A line of the configuration files that PostgreSQL has refused; ``name`` is empty for a syntax error."""

    name: str
    setting: str
    error: str


@dataclass(frozen=True, slots=True)
class Server:
    """The PostgreSQL server, as a worker must know it to connect."""

    socket_directories: str
    port: int
    user: str
    database: str
    data_directory: str
    max_connections: int
    superuser_reserved_connections: int
    reserved_connections: int
    version: str
    documentdb: str | None  # version of the extension; None until it has been created
    in_recovery: bool
    started: str  # of the postmaster: its identity
    setting_errors: tuple[SettingError, ...]
    # After so long DocumentDB's pg_cron job removes what is kept of an idle cursor; None: the library does not tell.
    cursor_files_seconds: int | None = None

    def socket_directory(self) -> str:
        """The directory to connect to; raises ValueError naming unix_socket_directories when there is none."""
        # As PostgreSQL reads it: a list whose entries may be in double quotes, a quote inside them doubled.
        for entry in re.findall(r'(?:"(?:[^"]|"")*"|[^,])+', self.socket_directories):
            directory: str = entry.strip()
            if len(directory) >= 2 and directory[0] == directory[-1] == '"':
                directory = directory[1:-1].replace('""', '"')
            if directory:
                return directory
        raise ValueError("unix_socket_directories is empty: pg_ferret needs a Unix socket to reach PostgreSQL")


@dataclass(frozen=True, slots=True)
class Config:
    """One settings message of the launcher, checked."""

    settings: Settings
    server: Server

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Config:
        """What ``plain`` was made of.  Nothing is checked: the launcher's messages are for ``config.check``."""
        settings, server = plain["settings"], plain["server"]
        errors = tuple(SettingError(**error) for error in server["setting_errors"])
        return cls(
            settings=Settings(**{**settings, "listen_addr": tuple(settings["listen_addr"])}),
            server=Server(**{**server, "setting_errors": errors}),
        )

    def plain(self) -> dict[str, Any]:
        """The same as JSON can hold it."""
        return asdict(self)


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of ``host:port`` or ``[IPv6]:port``; raises ValueError."""
    match = _ADDRESS.fullmatch(text)
    if not match or not 1 <= int(match[3]) <= 65535:
        raise ValueError("an address is host:port or [IPv6]:port, with a port from 1 to 65535")
    return match[1] or match[2], int(match[3])


@cache
def gucs() -> Mapping[str, Guc]:
    """What PostgreSQL knows of each setting, by its name without prefix."""
    hints = get_type_hints(Settings, include_extras=True)
    return {name: next(item for item in hint.__metadata__ if isinstance(item, Guc)) for name, hint in hints.items()}

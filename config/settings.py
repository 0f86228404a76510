"""Every ``ferretdb.*`` setting, defined once, and what a worker must know of its PostgreSQL server.

The launcher reads pg_settings and sends the rows as JSON; the supervisor and the workers read them with ``Config``.
PostgreSQL has checked types and ranges by then with code generated from this file (``config.generate``); they are
checked again here, because a library and a Python of two versions may meet while a package is upgraded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_serializer

PREFIX = "ferretdb."
SECOND = 1000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
DAY = 24 * HOUR

# A host name, an IPv4 address, or an IPv6 address in brackets, and a port; as check_listen_addr() in pg_ferret.c.
_ADDRESS = re.compile(r"(?:([A-Za-z0-9._-]+)|\[([0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?)\]):([0-9]{1,5})", re.ASCII)
# What fits into sockaddr_un.
_SOCKET_PATH_BYTES = 107
# Of a worker's connections to PostgreSQL one serves the cheap reads; writers need several for a commit in common.
_CONNECTIONS_EACH = 4


@dataclass(frozen=True, slots=True)
class Guc:
    """What PostgreSQL needs to define a setting, besides its type, its default and its range.

    ``flags`` and ``hooks`` (check, assign, show) are C names.
    """

    help: str
    restart: bool = False
    milliseconds: bool = False
    megabytes: bool = False
    octal: bool = False
    flags: tuple[str, ...] = ()
    hooks: tuple[str, str, str] = ("NULL", "NULL", "NULL")


_ABSOLUTE = ("check_absolute_path", "NULL", "NULL")


class Settings(BaseModel, frozen=True):
    """The settings' values; times are milliseconds.  The field's order is the order of the documentation."""

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
        Field(ge=0, le=0o777),
        Guc(
            "Access permissions of the Unix socket, in octal as for chmod.",
            octal=True,
            hooks=("NULL", "NULL", "show_octal"),
        ),
    ] = 0o700
    workers: Annotated[
        int,
        Field(ge=0, le=1024),
        Guc(
            "Worker processes; 0 is one for every two CPU cores, as far as ferretdb.pool_max_conns has four connections"
            " for each. Never more than ferretdb.max_workers."
        ),
    ] = 0
    max_workers: Annotated[
        int, Field(ge=1, le=1024), Guc("Limit of ferretdb.workers: the size of the status table.", restart=True)
    ] = 64
    max_requests: Annotated[
        int,
        Field(ge=0, le=2_000_000_000),
        Guc("Requests after which a worker is replaced, its successor first; 0 is never."),
    ] = 0
    max_requests_jitter: Annotated[
        int,
        Field(ge=0, le=2_000_000_000),
        Guc("Up to so many requests more, by chance, so that workers are not all replaced at once."),
    ] = 0
    max_connections: Annotated[
        int, Field(ge=1, le=1_000_000), Guc("Client connections allowed, all workers together.")
    ] = 10_000
    pool_min_conns: Annotated[
        int, Field(ge=0, le=10_000), Guc("Connections to PostgreSQL kept open, all workers together.")
    ] = 4
    pool_max_conns: Annotated[
        int,
        Field(ge=1, le=10_000),
        Guc("Connections to PostgreSQL allowed, all workers together; each worker has at least one."),
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
        Field(ge=0, le=DAY),
        Guc("How long a request waits for a free connection to PostgreSQL; 0 is for ever.", milliseconds=True),
    ] = 30 * SECOND
    client_timeout: Annotated[
        int,
        Field(ge=0, le=DAY),
        Guc(
            "A client that stops in the middle of a message, or takes nothing of its reply, for this long is"
            " disconnected; 0 is never. Idle clients are not concerned.",
            milliseconds=True,
        ),
    ] = MINUTE
    client_memory: Annotated[
        int,
        Field(ge=64, le=1024 * 1024),
        Guc(
            "Memory for messages that are not complete and replies that are not taken, all workers together; beyond it"
            " the clients that have been stuck the longest are disconnected.",
            megabytes=True,
        ),
    ] = 1024
    cursor_timeout: Annotated[
        int, Field(ge=SECOND, le=DAY), Guc("How long an idle cursor is kept.", milliseconds=True)
    ] = 10 * MINUTE
    worker_timeout: Annotated[
        int,
        Field(ge=SECOND, le=HOUR),
        Guc("A worker whose event loop stands still for this long is replaced.", milliseconds=True),
    ] = 30 * SECOND
    graceful_timeout: Annotated[
        int,
        Field(ge=0, le=HOUR),
        Guc("How long a worker that is to leave may take to finish its requests.", milliseconds=True),
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

    @classmethod
    def from_rows(cls, rows: Mapping[str, str]) -> Settings:
        """Read ``setting`` of pg_settings by name without prefix; raises pydantic.ValidationError.

        A missing setting has its default and an unknown one is passed over: the library may be of another version.
        """
        return cls.model_validate(dict(rows))

    def worker_count(self) -> int:
        """How many workers there are to be, at least 1."""
        # A request takes PostgreSQL at least as much CPU time as its worker: with more workers than this, the two
        # only take turns on a core, and each finds fewer requests to send off together.
        needed = (len(os.sched_getaffinity(0)) + 1) // 2
        supplied = max(1, self.pool_max_conns // _CONNECTIONS_EACH)
        return min(self.workers or min(needed, supplied), self.max_workers)

    @field_validator("listen_addr", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """PostgreSQL's list text to a tuple."""
        if isinstance(value, str):
            return tuple(item for item in map(str.strip, value.split(",")) if item not in ("", "-"))
        return value

    @field_validator("listen_addr")
    @classmethod
    def _check_addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for address in value:
            parse_address(address)
        return value

    @field_validator("listen_unix", "python", "state_dir")
    @classmethod
    def _check_path(cls, value: str) -> str:
        if value and not value.startswith("/"):
            raise ValueError("an absolute path is needed")
        return value

    @field_validator("listen_unix")
    @classmethod
    def _check_socket_path(cls, value: str) -> str:
        if len(os.fsencode(value)) > _SOCKET_PATH_BYTES:
            raise ValueError(f"the path of a Unix socket has at most {_SOCKET_PATH_BYTES} bytes")
        return value

    @field_validator("unix_socket_permissions", mode="before")
    @classmethod
    def _read_octal(cls, value: Any) -> Any:
        if isinstance(value, str):
            if not re.fullmatch(r"[0-7]{1,4}", value, re.ASCII):
                raise ValueError("an octal number is needed")
            return int(value, 8)
        return value

    @model_serializer
    def to_rows(self) -> dict[str, str]:
        """The same texts that pg_settings has: ``from_rows`` reads them back."""
        return {name: text_of(name, getattr(self, name)) for name in type(self).model_fields}


class SettingError(BaseModel, frozen=True):
    """A line of the configuration files that PostgreSQL has refused; ``name`` is empty for a syntax error."""

    name: str
    setting: str
    error: str


class Server(BaseModel, frozen=True):
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


class Config(BaseModel, frozen=True):
    """One settings message of the launcher."""

    settings: Settings
    server: Server

    @classmethod
    def from_json(cls, text: bytes | str) -> Config:
        """Read a settings message; raises pydantic.ValidationError, a ValueError."""
        return cls.model_validate_json(text)

    def to_json(self) -> bytes:
        """The same message again."""
        return self.model_dump_json().encode()


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of ``host:port`` or ``[IPv6]:port``; raises ValueError."""
    match = _ADDRESS.fullmatch(text)
    if not match or not 1 <= int(match[3]) <= 65535:
        raise ValueError("an address is host:port or [IPv6]:port, with a port from 1 to 65535")
    return match[1] or match[2], int(match[3])


def text_of(name: str, value: Any) -> str:
    """A value of the setting ``name`` as pg_settings shows it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ", ".join(value) or "-"
    if isinstance(value, int) and guc_of(name).octal:
        return f"{value:04o}"
    return str(value)


def guc_of(name: str) -> Guc:
    """What PostgreSQL knows of the setting ``name``; raises KeyError."""
    return next(item for item in Settings.model_fields[name].metadata if isinstance(item, Guc))

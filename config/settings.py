"""Every ``ferretdb.*`` setting, once.

``python3 -m config`` writes extension/settings.h, docs/settings.md and config/ferretdb.conf.sample from this model, so
PostgreSQL checks type, range and unit before a value gets here.  The supervisor and the workers read the same values
from `Config`, which is the JSON that the launcher sends.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

PREFIX = "ferretdb."


@dataclass(frozen=True, slots=True)
class Guc:
    """How PostgreSQL knows a setting."""

    help: str  # one line, as pg_settings.short_desc shows it
    context: Literal["postmaster", "sighup"] = "sighup"
    unit: Literal["", "ms"] = ""
    flags: tuple[str, ...] = ()  # GUC_* beside the unit's
    check: str = ""  # the C function that checks syntax
    show: str = ""  # the C function that shows the value


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of ``127.0.0.1:27017`` or ``[::1]:27017``; raises ValueError."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{text!r}: an IPv6 address must be in brackets, like [::1]:27017")
    if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is not of the form host:port")
    return host, int(port)


class Settings(BaseModel):
    """The values in force; times are in milliseconds."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    database: Annotated[
        str,
        Guc(
            "Database that holds the DocumentDB extension; must equal cron.database_name.",
            context="postmaster",
            flags=("GUC_IS_NAME",),
        ),
    ] = "postgres"
    max_workers: Annotated[
        int, Guc("Size of the status table: no more workers than this can run.", context="postmaster"), Field(ge=1, le=1024)
    ] = 64
    enabled: Annotated[bool, Guc("Serves clients; off drains and closes every connection.")] = True
    workers: Annotated[int, Guc("Number of worker processes; 0 means one per core."), Field(ge=0, le=1024)] = 0
    listen_addr: Annotated[
        tuple[str, ...],
        Guc(
            "Comma-separated host:port addresses to listen on; - means none.",
            flags=("GUC_LIST_INPUT",),
            check="check_listen_addr",
        ),
    ] = ("127.0.0.1:27017",)
    listen_unix: Annotated[
        str, Guc("Absolute path of a Unix socket to listen on; empty means none.", check="check_absolute_path")
    ] = ""
    unix_socket_permissions: Annotated[
        int,
        Guc("Access permissions of the Unix socket, in octal.", show="show_octal"),
        Field(ge=0, le=0o777),
    ] = 0o700
    pool_min_conns: Annotated[
        int, Guc("PostgreSQL connections kept open by all workers together."), Field(ge=0, le=10_000)
    ] = 4
    pool_max_conns: Annotated[
        int, Guc("PostgreSQL connections that all workers together never exceed."), Field(ge=1, le=10_000)
    ] = 40
    query_wait_timeout: Annotated[
        int,
        Guc("Longest time a request waits for a PostgreSQL connection; 0 means for ever.", unit="ms"),
        Field(ge=0, le=86_400_000),
    ] = 30_000
    max_connections: Annotated[
        int, Guc("Client connections that all workers together accept."), Field(ge=1, le=1_000_000)
    ] = 10_000
    cursor_timeout: Annotated[
        int, Guc("Time after which an idle cursor is closed.", unit="ms"), Field(ge=1_000, le=86_400_000)
    ] = 600_000
    worker_timeout: Annotated[
        int,
        Guc("Time after which a worker without a heartbeat is killed and replaced.", unit="ms"),
        Field(ge=1_000, le=3_600_000),
    ] = 30_000
    graceful_timeout: Annotated[
        int, Guc("Time that a worker gets to finish its requests before it is ended.", unit="ms"), Field(ge=0, le=3_600_000)
    ] = 30_000
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Guc("Least severe events that reach PostgreSQL's log.")
    ] = "info"
    python: Annotated[
        str,
        Guc("Python interpreter.", flags=("GUC_SUPERUSER_ONLY",), check="check_absolute_path"),
    ] = "/usr/bin/python3"
    state_dir: Annotated[
        str,
        Guc(
            "Directory for the state that workers share; empty means /dev/shm.",
            flags=("GUC_SUPERUSER_ONLY",),
            check="check_absolute_path",
        ),
    ] = ""

    @field_validator("listen_addr", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = tuple(part.strip() for part in value.split(",") if part.strip() not in ("", "-"))
        for address in value:
            parse_address(address)
        return value

    @field_validator("unix_socket_permissions", mode="before")
    @classmethod
    def _octal(cls, value: Any) -> Any:
        return int(value, 8) if isinstance(value, str) else value

    @classmethod
    def from_rows(cls, rows: Mapping[str, str]) -> Settings:
        """Of setting names (without the prefix) and ``pg_settings.setting``; raises pydantic.ValidationError."""
        return cls.model_validate(dict(rows))

    def to_rows(self) -> dict[str, str]:
        """The values as pg_settings gives them: the opposite of `from_rows`."""
        return {name: as_text(name, value) for name, value in self}

    def worker_count(self) -> int:
        """How many workers to run."""
        return min(self.max_workers, self.workers or len(os.sched_getaffinity(0)))


def as_text(name: str, value: Any) -> str:
    """One value as pg_settings shows it, in its base unit."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ", ".join(value) or "-"
    if name == "unix_socket_permissions":
        return f"{value:04o}"
    return str(value)


class SettingError(BaseModel):
    """A line of a configuration file that PostgreSQL could not apply (pg_file_settings)."""

    model_config = ConfigDict(frozen=True)

    name: str
    setting: str
    error: str


class Server(BaseModel):
    """What a worker needs to know of the PostgreSQL server."""

    model_config = ConfigDict(frozen=True)

    socket_directories: str
    port: int
    user: str  # the bootstrap superuser
    database: str
    data_directory: str
    max_connections: int
    superuser_reserved_connections: int
    reserved_connections: int
    version: str
    documentdb: str | None  # the extension's version; None until it is installed
    in_recovery: bool
    started: str  # tells one run of the postmaster from the next
    setting_errors: tuple[SettingError, ...] = ()

    def socket_directory(self) -> str:
        """Where PostgreSQL's Unix socket is; raises ValueError when it has none."""
        directory = self.socket_directories.split(",")[0].strip().strip('"')
        if not directory:
            raise ValueError("unix_socket_directories is empty: pg_ferret needs a Unix socket to reach PostgreSQL")
        return directory


class Config(BaseModel):
    """Settings and server: the JSON of the channel's settings message."""

    model_config = ConfigDict(frozen=True)

    settings: Settings
    server: Server

    @field_validator("settings", mode="before")
    @classmethod
    def _from_rows(cls, value: Any) -> Any:
        return Settings.from_rows(value) if isinstance(value, Mapping) else value

    @classmethod
    def from_json(cls, text: bytes | str) -> Config:
        """Raises pydantic.ValidationError, whose locations name the settings."""
        return cls.model_validate(json.loads(text))

    def to_json(self) -> bytes:
        """The same shape again."""
        return json.dumps({"settings": self.settings.to_rows(), "server": self.server.model_dump(mode="json")}).encode()

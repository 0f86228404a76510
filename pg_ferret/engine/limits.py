"""How a worker reaches PostgreSQL, and how many connections it may have."""

from __future__ import annotations

import os
from dataclasses import dataclass

from psycopg.conninfo import make_conninfo

from config.settings import Config

# Connections that the pool leaves to others, beside those that PostgreSQL reserves.
_LEFT_TO_OTHERS = 5


@dataclass(frozen=True, slots=True)
class Limits:
    """One worker's share."""

    smallest: int  # connections kept open
    largest: int  # connections never exceeded
    wait_seconds: float | None  # how long a request may wait for one; None: for ever
    batch: bool = False  # whether the kernel schedules them as batch work
    processors: int = 1  # that the worker has for itself, rounded up
    gives_way: bool = False  # whether it may let other processes go first


def pool_limits(config: Config) -> Limits:
    """One worker's share of the connections to PostgreSQL."""
    settings, server = config.settings, config.server
    workers = max(1, settings.worker_count())
    reserved = server.superuser_reserved_connections + server.reserved_connections + _LEFT_TO_OTHERS
    largest = max(1, min(settings.pool_max_conns, server.max_connections - reserved) // workers)
    smallest = min(largest, -(-settings.pool_min_conns // workers))
    wait = settings.query_wait_timeout / 1000 if settings.query_wait_timeout else None
    available = len(os.sched_getaffinity(0))
    batch = settings.batch_scheduling
    # With several processors and a worker for each of them; on a single one, or where PostgreSQL has one beside the
    # worker's, that costs more than it saves.  Nor does who is to be scheduled ordinarily wait for others.
    gives_way = batch and 1 < available <= workers
    return Limits(smallest, largest, wait, batch, -(-available // workers), gives_way)


def conninfo(config: Config) -> str:
    """How a worker reaches the engine: the server's own Unix socket, as the server's own user."""
    server = config.server
    host = server.socket_directory()
    options = {
        # What users need and DocumentDB leaves off.
        "documentdb.useFileBasedPersistedCursors": "on",
        "documentdb_core.enableCollation": "on",
        # Raised, and so the whole command is rolled back and can be made again.
        "documentdb.throwDeadlockOnCRUD": "on",
        # Until then those of a deadlock stand still, and who has many clients for few documents has many of them.
        "deadlock_timeout": "100ms",
        # createIndexes makes the backend connect to itself; TCP would need a password.
        "documentdb.localhost_connection_string": f"host={host}",
        # A NOTICE for every collection made implicitly helps nobody.
        "client_min_messages": "warning",
        # A client's mistake is answered to the client; what is the engine's fault the gateway logs itself, without
        # the error's CONTEXT, which can hold anything.  LOG lines (slow statements, auto_explain) still come.
        "log_min_messages": "log",
        # The engine logs much of what it does, and beside each line the statement: always the same few.
        "log_min_error_statement": "panic",
        # A worker that was killed cannot cancel its queries: PostgreSQL looks after them itself.
        "client_connection_check_interval": "2s",
        # Parameters are documents, and context can hold anything: neither belongs into a log, whatever is logged there.
        "log_parameter_max_length": "0",
        "log_parameter_max_length_on_error": "0",
        "log_error_verbosity": "terse",
        # What a DBA set for people at a prompt is not meant for a pool.
        "statement_timeout": "0",
        "idle_session_timeout": "0",
        # The engine's updates and deletes need custom plans where they match a filter: in a generic one none matches.
        "plan_cache_mode": "auto",
    }
    # Backslash and blank are the two characters that libpq's options must escape.
    escaped = {name: value.replace("\\", "\\\\").replace(" ", "\\ ") for name, value in options.items()}
    return make_conninfo(
        host=host,
        port=server.port,
        dbname=server.database,
        user=server.user,
        application_name="pg_ferret",
        options=" ".join(f"-c {name}={value}" for name, value in escaped.items()),
        client_encoding="UTF8",
        connect_timeout=10,
    )

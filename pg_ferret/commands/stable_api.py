"""The Stable API: what a client declares about the commands it means to use (manual, "Stable API")."""

from __future__ import annotations

from typing import Final

from pg_ferret.errors import CommandError
from pg_ferret.registry import Command
from pg_ferret.wire import bson
from pg_ferret.wire.message import Request

_FLAGS: Final = frozenset((b"apiStrict", b"apiDeprecationErrors"))
_VERSION: Final = b"1"
_IN_VERSION_1: Final = frozenset(
    [
        "aggregate",
        "collMod",
        "count",
        "create",
        "createIndexes",
        "delete",
        "drop",
        "dropDatabase",
        "dropIndexes",
        "endSessions",
        "find",
        "findAndModify",
        "findandmodify",
        "getMore",
        "hello",
        "insert",
        "killCursors",
        "listCollections",
        "listDatabases",
        "listIndexes",
        "ping",
        "refreshSessions",
        "update",
    ]
)


def check_api(request: Request, command: Command) -> None:
    """Raises CommandError if a client has declared a version that there is not, or another command than it uses."""
    fields = request.fields
    if b"apiVersion" not in fields:
        if b"apiStrict" in fields or b"apiDeprecationErrors" in fields:
            raise CommandError(4886600, "Provided apiStrict and/or apiDeprecationErrors without passing apiVersion")
    elif any(fields[name][0] != bson.BOOL for name in _FLAGS & fields.keys()):
        raise CommandError(14, "apiStrict and apiDeprecationErrors must be booleans")
    elif request.string(b"apiVersion") != _VERSION:
        raise CommandError(322, 'API version must be "1"')
    elif request.true(b"apiStrict") and command.name not in _IN_VERSION_1:
        raise CommandError(323, f"Provided apiStrict:true, but the command {command.name} is not in API Version 1")

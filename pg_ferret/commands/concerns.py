"""What a single server cannot promise is refused, as MongoDB's standalone server does."""

from __future__ import annotations

from typing import Final

from pg_ferret.errors import CommandError
from pg_ferret.wire import bson
from pg_ferret.wire.message import Request

_MOST_NODES: Final = 50
_LEVELS: Final = frozenset((b"local", b"available", b"majority"))
# They need an operation log.
_LEVELS_OF_REPLICA_SETS: Final = frozenset((b"linearizable", b"snapshot"))


def check_concerns(request: Request) -> None:
    """Raises CommandError for a write or read concern that this server cannot keep or does not know."""
    fields = request.fields
    if b"writeConcern" in fields:
        _check_write(request.frame, _options(request, b"writeConcern"))
    if b"readConcern" in fields:
        _check_read(request.frame, _options(request, b"readConcern"))


def _options(request: Request, name: bytes) -> dict[bytes, bson.Span]:
    kind, start, end = request.fields[name]
    if kind != bson.DOCUMENT:
        raise CommandError(14, f"'{name.decode()}' must be a document")
    return bson.scan(request.frame, start, end)


def _check_write(frame: bytes, options: dict[bytes, bson.Span]) -> None:
    wanted = options.get(b"w")
    if wanted is None or bson.read_string(frame, wanted) == b"majority":
        return
    if wanted[0] == bson.STRING:
        raise CommandError(2, "cannot use non-majority 'w' mode when a host is not replicated")
    nodes = bson.read_int(frame, wanted)
    if nodes is None or not 0 <= nodes <= _MOST_NODES:
        raise CommandError(9, f"w has to be a non-negative number and not greater than {_MOST_NODES}")
    if nodes > 1:
        raise CommandError(2, "cannot use 'w' > 1 when a host is not replicated")


def _check_read(frame: bytes, options: dict[bytes, bson.Span]) -> None:
    wanted = options.get(b"level")
    if wanted is None:
        return
    level = bson.read_string(frame, wanted)
    if level is None:
        raise CommandError(14, "'readConcern.level' must be a string")
    if level in _LEVELS_OF_REPLICA_SETS:
        raise CommandError(123, f"readConcern level {level.decode()} is only available in a replica set")
    if level not in _LEVELS:
        text = level[:128].decode("utf-8", "replace")
        raise CommandError(2, f"Enumeration value '{text}' for field 'readConcern.level' is not a valid value.")

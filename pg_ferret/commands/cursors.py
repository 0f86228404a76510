"""Going on with cursors and ending them, whichever worker opened them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from struct import Struct
from typing import NamedTuple

from pg_ferret.commands.arguments import Namespace, as_it_came, collection, database, spec
from pg_ferret.engine import calls
from pg_ferret.engine.lines import Shared
from pg_ferret.errors import CommandError, EngineError
from pg_ferret.registry import command
from pg_ferret.state.client import Client, Services
from pg_ferret.state.cursors import Cursor, owner
from pg_ferret.wire import bson
from pg_ferret.wire.message import Request, piece

# The engine's CursorNotFound: its file has gone.
_GONE = "M000E"
# The beginning of the command that opened a streaming cursor, in its continuation: the filter's first condition, say.
_COMMAND = slice(29, 97)
# So many are ended before other clients have a turn.
_AT_ONCE = 250
_int64 = Struct("<q").unpack_from


def _not_found(cursor_id: int) -> CommandError:
    return CommandError(43, f"cursor id {cursor_id} not found")


class _GetMore(NamedTuple):
    """What there is to know of a getMore before its cursor is looked at."""

    db: bytes
    namespace: Namespace
    body: slice | None  # `as_it_came`
    id_at: int  # where the cursor's id is in the frame
    size: bson.Span  # and the batch's size; empty if none is given


@command("getMore", help="Returns the next documents of a cursor.")
async def get_more(request: Request, client: Client) -> bytes:
    services = client.services
    memo = request.memo
    known: _GetMore | None = None if memo is None else memo.get("getMore")
    if known is None:
        known = _look_at(request)
        if memo is not None:
            memo["getMore"] = known
    db, named, place, id_at, (_, size_start, size_end) = known
    namespace = named.read(request)
    frame = request.frame
    (cursor_id,) = _int64(frame, id_at)
    cursor = services.cursors.get(cursor_id)
    if cursor is None:
        raise _not_found(cursor_id)
    continuation = cursor.continuation
    if not cursor.owner.startswith(owner(namespace, client.user)):
        raise _not_the_owner(cursor, cursor_id, namespace)
    body = spec(request) if place is None or request.sequences else piece(frame, place)
    try:
        if not continuation:
            services.cursors.remove([cursor_id])
            raise CommandError(175, f"collection dropped or renamed: {namespace.decode('utf-8', 'replace')}")
        if calls.streams(continuation) and services.engine.pages.crowded(services.counters.in_flight - 1):
            # Of about the same cost: as many documents of a result by a find of the same shape, or by the same command.
            shape = hash((namespace, frame[size_start:size_end], cursor.shape or continuation[_COMMAND]))
            read = Shared(calls.GET_MORE, (db, body, continuation), namespace, shape)
            page, following = await services.engine.pages.share(read)
        else:
            page, following = await services.engine.call(calls.GET_MORE, (db, body, continuation))
    except EngineError as error:
        if error.sqlstate == _GONE:
            services.cursors.remove([cursor_id])
            raise _not_found(cursor_id) from None
        raise
    assert page is not None
    if following is None:
        services.cursors.remove([cursor_id])
    else:
        expires = max(cursor.expires, time.time() + services.config.settings.cursor_timeout / 1000)
        services.cursors.advance(cursor_id, cursor, expires, following)
    return page


def _look_at(request: Request) -> _GetMore:
    kind, start, _ = request.fields[b"getMore"]
    if kind != bson.INT64:
        raise CommandError(14, "Field 'getMore' must be of type long")
    db = database(request)
    size = request.fields.get(b"batchSize", bson.MISSING)
    return _GetMore(db, Namespace.of(request, b"collection"), as_it_came(request), start, size)


def _not_the_owner(cursor: Cursor, cursor_id: int, namespace: bytes) -> CommandError:
    if cursor.namespace != namespace:
        return CommandError(
            13,
            f"Requested getMore on namespace '{namespace.decode('utf-8', 'replace')}', but cursor "
            f"{cursor_id} belongs to a different namespace",
        )
    return CommandError(13, f"cursor id {cursor_id} was not created by the authenticated user")


@command("killCursors", help="Ends cursors.")
async def kill_cursors(request: Request, client: Client) -> bytes:
    namespace = database(request) + b"." + collection(request)
    span = request.fields.get(b"cursors")
    ids = None if span is None else bson.read_int64s(request.frame, span)
    if ids is None:
        raise CommandError(14, "Field 'cursors' must be an array of longs")
    registry = client.services.cursors
    mine: list[int] = []
    unknown: list[int] = []
    for cursor_id in ids:
        cursor = registry.get(cursor_id)
        known = cursor is not None and cursor.owner.startswith(owner(namespace, client.user))
        (mine if known else unknown).append(cursor_id)
    killed = await end(mine, client.services)
    return bson.document(
        _ids(b"cursorsKilled", killed),
        _ids(b"cursorsNotFound", unknown + [cursor_id for cursor_id in mine if cursor_id not in killed]),
        _ids(b"cursorsAlive", []),
        _ids(b"cursorsUnknown", []),
        bson.OK,
    )


async def end(cursor_ids: list[int], services: Services) -> list[int]:
    """Forget cursors and have the engine delete what it keeps of them; returns those that were known."""
    gone = services.cursors.remove(cursor_ids)
    if gone:
        await services.engine.call(calls.DELETE_CURSORS, (calls.id_array(gone),))
    return gone


async def ending(prefixes: list[bytes], work: Callable[[], Awaitable[bytes]], services: Services) -> bytes:
    """The result of ``work``, with which collections go and their cursors end: they would go on in whatever is made
    under that name.

    A prefix is a namespace and NUL, or a database and a dot.  Those that are open before are ended after it, even if
    the client has gone by then.
    """
    found = [cursor_id for prefix in prefixes for cursor_id in await _of_owners(prefix, services)]
    try:
        reply = await work()
    except asyncio.CancelledError:
        _bereave(found, services)  # who knows whether it was done
        raise
    if found:
        await asyncio.shield(_bereave(found, services))
    return reply


async def _of_owners(prefix: bytes, services: Services) -> list[int]:
    found: list[int] = []
    position: bytes | None = b""
    while position is not None:
        some, position = services.cursors.of_owners(prefix, position)
        found += some
        await asyncio.sleep(0)
    return found


_bereaving: set[asyncio.Task[None]] = set()


def _bereave(cursor_ids: list[int], services: Services) -> asyncio.Task[None]:
    async def in_parts() -> None:
        for first in range(0, len(cursor_ids), _AT_ONCE):
            services.cursors.bereave(cursor_ids[first : first + _AT_ONCE])
            await asyncio.sleep(0)

    task = asyncio.create_task(in_parts())
    _bereaving.add(task)  # the loop alone would forget it
    task.add_done_callback(_bereaving.discard)
    return task


def _ids(name: bytes, values: list[int]) -> bytes:
    return bson.array(name, bson.INT64, [value.to_bytes(8, "little", signed=True) for value in values])

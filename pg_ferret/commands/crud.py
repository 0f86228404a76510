"""Reading and writing documents: the hot path."""

from __future__ import annotations

import time
from collections.abc import Awaitable
from typing import NamedTuple

from pg_ferret.commands import write_errors
from pg_ferret.commands.arguments import Namespace, collection, database, session, spec, unchanged
from pg_ferret.engine import calls
from pg_ferret.engine.pipeline import Row
from pg_ferret.engine.shared import Shared
from pg_ferret.errors import CommandError, EngineError
from pg_ferret.registry import command
from pg_ferret.state.client import Client
from pg_ferret.state.cursors import Cursor, owner
from pg_ferret.wire import bson
from pg_ferret.wire.message import Request

# Reads that take a while or change the session while they run.
_FLAGS = frozenset((b"tailable", b"singleBatch"))
_ALONE = frozenset((b"sort", b"skip", b"maxTimeMS", b"collation", b"hint", b"min", b"max"))
_FOR_EVER = float("inf")
# A findAndModify that found its document and changed nothing: the engine says that it found none.
_FOUND_NOTHING = b"\x10n\0\0\0\0\0\x08updatedExisting\0\0\0\x03value\0"
_FOUND_ONE = b"\x10n\0\1\0\0\0\x08updatedExisting\0\1\0\x03value\0"
_HEAD_BYTES = 100


def _page(row: Row, namespace: bytes, request: Request, client: Client) -> bytes:
    """The first page; what is left of the result is kept as a cursor that any worker can continue."""
    page, continuation, cursor_id = row
    assert page is not None
    if continuation is not None:
        assert cursor_id is not None
        services = client.services
        lifetime = services.config.settings.cursor_timeout / 1000
        expires = _FOR_EVER if request.true(b"noCursorTimeout") else time.time() + lifetime
        cursor = Cursor(owner(namespace, client.user, session(request)), expires, continuation)
        services.cursors.open(int.from_bytes(cursor_id, "big"), cursor)
    return page


class _Find(NamedTuple):
    """What there is to know of a find before its collection and its filter are looked at."""

    db: bytes
    namespace: Namespace
    rewritten: bool  # the engine must not see it as it came
    filter: bson.Span | None  # of a read that may share a connection


@command("find", help="Returns the documents that match a filter.")
async def find(request: Request, client: Client) -> bytes:
    memo = request.memo
    known: _Find | None = None if memo is None else memo.get("find")
    if known is None:
        known = _look_at(request)
        # A flag that is a number may be another one in the next request of the shape.
        if memo is not None and all(request.fields[name][0] == bson.BOOL for name in _FLAGS & request.fields.keys()):
            memo["find"] = known
    db, named, rewritten, span = known
    namespace = named.read(request)
    frame = request.frame
    body = spec(request) if rewritten or request.sequences else memoryview(frame)[request.start : request.end]
    if span is None:
        return _page(await client.services.engine.call(calls.FIND, (db, body)), namespace, request, client)
    # Of about the same cost: the same first condition by name and type, about the same length.
    _, start, end = span
    first = start + 4  # its type; in an empty filter the NUL at the end
    shape = hash((namespace, frame[first : frame.find(0, first, end)], (end - start) >> 5))
    page = (await client.services.engine.finds.share(Shared(calls.FIND, (db, body), namespace, shape)))[0]
    assert page is not None
    return page


def _look_at(request: Request) -> _Find:
    if b"tailable" in request.fields and request.true(b"tailable"):
        raise CommandError(2, "error processing query: tailable cursor requested on non capped collection")
    db = database(request)
    fields = request.fields
    span = fields.get(b"filter")
    # It must leave nothing behind on the connection: no cursor and no time limit.
    shares = (
        request.true(b"singleBatch") and _ALONE.isdisjoint(fields) and span is not None and span[0] == bson.DOCUMENT
    )
    return _Find(db, Namespace.of(request), not unchanged(request), span if shares else None)


@command("aggregate", help="Runs an aggregation pipeline.")
async def aggregate(request: Request, client: Client) -> bytes:
    if request.true(b"explain"):
        raise CommandError(238, "aggregate with explain is not implemented yet")
    db = database(request)
    # {aggregate: 1} runs on the database itself.
    name = b"$cmd.aggregate" if request.integer(b"aggregate") == 1 else collection(request)
    row = await client.services.engine.call(calls.AGGREGATE, (db, spec(request)))
    return _page(row, db + b"." + name, request, client)


@command("count", help="Counts the documents that match a query.")
def count(request: Request, client: Client) -> Awaitable[bytes]:
    return _read_one(calls.COUNT, request, client)


@command("distinct", help="Returns the distinct values of a field.")
def distinct(request: Request, client: Client) -> Awaitable[bytes]:
    return _read_one(calls.DISTINCT, request, client)


async def _read_one(call: calls.Call, request: Request, client: Client) -> bytes:
    (document,) = await client.services.engine.call(call, (database(request), spec(request)))
    assert document is not None
    return document


@command("insert", help="Inserts documents.")
def insert(request: Request, client: Client) -> Awaitable[bytes]:
    return _write(calls.INSERT, b"documents", request, client)


@command("update", help="Updates documents.")
def update(request: Request, client: Client) -> Awaitable[bytes]:
    return _write(calls.UPDATE, b"updates", request, client)


@command("delete", help="Deletes documents.")
def delete(request: Request, client: Client) -> Awaitable[bytes]:
    return _write(calls.DELETE, b"deletes", request, client)


async def _write(call: calls.Call, statements: bytes, request: Request, client: Client) -> bytes:
    """One write command; its statements come as a document sequence or as an array in the body."""
    memo = request.memo
    sequences = request.sequences
    known: tuple[bytes, bool] | None = None if memo is None else memo.get("write")
    if known is None:
        known = database(request), not unchanged(request)
        if memo is not None:
            memo["write"] = known
    db, rewritten = known
    sequence = sequences.get(statements)
    if rewritten or len(sequences) > (sequence is not None):
        body = spec(request, besides=statements)
    else:
        body = memoryview(request.frame)[request.start : request.end]
    reply, success = await client.services.engine.call(call, (db, body, sequence))
    assert reply is not None
    if success == b"\x01":
        return reply
    return await write_errors.rebuild(reply, statements, request, client)


@command("findAndModify", "findandmodify", help="Updates or deletes one document and returns it.")
async def find_and_modify(request: Request, client: Client) -> bytes:
    try:
        reply, _ = await client.services.engine.call(calls.FIND_AND_MODIFY, (database(request), spec(request)))
    except EngineError as error:
        raise await write_errors.explained(error, request, client) from None
    assert reply is not None
    if reply.find(_FOUND_NOTHING, 0, _HEAD_BYTES) >= 0:
        return reply.replace(_FOUND_NOTHING, _FOUND_ONE, 1)
    return reply

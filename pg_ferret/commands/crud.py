"""Reading and writing documents: the hot path."""

from __future__ import annotations

import time

from pg_ferret.commands import write_errors
from pg_ferret.commands.arguments import collection, database, session, spec
from pg_ferret.engine import calls
from pg_ferret.engine.backend import Row
from pg_ferret.errors import CommandError, EngineError
from pg_ferret.registry import command
from pg_ferret.state.client import Client
from pg_ferret.state.cursors import Cursor
from pg_ferret.wire import bson
from pg_ferret.wire.message import Request

# Reads that take a while or change the session while they run.
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
        cursor = Cursor(namespace, client.user, session(request), expires, continuation)
        services.cursors.open(int.from_bytes(cursor_id, "big"), cursor)
    return page


@command("find", help="Returns the documents that match a filter.")
async def find(request: Request, client: Client) -> bytes:
    if b"tailable" in request.fields and request.true(b"tailable"):
        raise CommandError(2, "error processing query: tailable cursor requested on non capped collection")
    db, name = database(request), collection(request)
    namespace = db + b"." + name
    engine = client.services.engine
    shape = _shape(request, namespace)
    if shape is None:
        row = await engine.call(calls.FIND, (db, spec(request)))
    else:
        row = await engine.share(calls.FIND, (db, spec(request)), shape)
    return _page(row, namespace, request, client)


def _shape(request: Request, namespace: bytes) -> bytes | None:
    """What reads of about the same cost have in common, if the read may share a connection with others.

    It must leave nothing behind on the connection: no cursor and no time limit.
    """
    fields = request.fields
    if b"singleBatch" not in fields or not _ALONE.isdisjoint(fields) or not request.true(b"singleBatch"):
        return None
    span = fields.get(b"filter")
    if span is None or span[0] != bson.DOCUMENT:
        return namespace
    _, start, end = span
    # The first condition's type and name, and about how long the whole is.
    frame = request.frame
    stop = frame.find(0, start + 5, end)
    return b"%b\0%b%d" % (namespace, frame[start + 4 : max(stop, start + 4)], (end - start) >> 5)


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
async def count(request: Request, client: Client) -> bytes:
    return await _read_one(calls.COUNT, request, client)


@command("distinct", help="Returns the distinct values of a field.")
async def distinct(request: Request, client: Client) -> bytes:
    return await _read_one(calls.DISTINCT, request, client)


async def _read_one(call: calls.Call, request: Request, client: Client) -> bytes:
    (document,) = await client.services.engine.call(call, (database(request), spec(request)))
    assert document is not None
    return document


@command("insert", help="Inserts documents.")
async def insert(request: Request, client: Client) -> bytes:
    return await _write(calls.INSERT, b"documents", request, client)


@command("update", help="Updates documents.")
async def update(request: Request, client: Client) -> bytes:
    return await _write(calls.UPDATE, b"updates", request, client)


@command("delete", help="Deletes documents.")
async def delete(request: Request, client: Client) -> bytes:
    return await _write(calls.DELETE, b"deletes", request, client)


async def _write(call: calls.Call, statements: bytes, request: Request, client: Client) -> bytes:
    """One write command; its statements come as a document sequence or as an array in the body."""
    reply, success = await client.services.engine.call(
        call, (database(request), spec(request, besides=statements), request.sequences.get(statements))
    )
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

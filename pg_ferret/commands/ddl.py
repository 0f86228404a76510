"""Databases, collections and views."""

from __future__ import annotations

import time
from operator import itemgetter

from bson import encode

from pg_ferret.commands import documents
from pg_ferret.commands.arguments import collection, database, spec, timeout
from pg_ferret.commands.cursors import ending
from pg_ferret.engine import calls
from pg_ferret.errors import CommandError, EngineError
from pg_ferret.registry import command
from pg_ferret.state.client import Client
from pg_ferret.wire import bson
from pg_ferret.wire.message import Request


async def _call(call: calls.Call, params: tuple[bytes | memoryview, ...], request: Request, client: Client) -> bytes:
    (document,) = await client.services.engine.call(call, params, timeout(request))
    assert document is not None
    return document


@command("create", help="Creates a collection or a view.")
async def create(request: Request, client: Client) -> bytes:
    collection(request)
    return await _call(calls.CREATE, (database(request), spec(request)), request, client)


@command("collMod", help="Changes a collection's or an index's options.")
async def coll_mod(request: Request, client: Client) -> bytes:
    return await _call(calls.COLL_MOD, (database(request), collection(request), spec(request)), request, client)


@command("renameCollection", help="Renames a collection.", admin_only=True)
async def rename_collection(request: Request, client: Client) -> bytes:
    gone = [(request.string(name) or b"") + b"\0" for name in (request.name, b"to")]
    params = (spec(request),)
    return await ending(gone, lambda: _call(calls.RENAME_COLLECTION, params, request, client), client.services)


@command("drop", help="Drops a collection or a view.")
async def drop(request: Request, client: Client) -> bytes:
    db, name = database(request), collection(request)
    indexes = await _index_count(db, name, client)
    namespace = db + b"." + name
    dropped = await ending(
        [namespace + b"\0"], lambda: _call(calls.DROP_COLLECTION, (db, name), request, client), client.services
    )
    if dropped != b"\x01":
        return bson.OK_REPLY
    text = namespace.decode("utf-8", "replace")
    return bson.document(bson.int32(b"nIndexesWas", indexes), bson.string(b"ns", text), bson.OK)


async def _index_count(db: bytes, name: bytes, client: Client) -> int:
    """How many indexes a collection has; none for a view or a missing one."""
    request = bson.document(bson.string(b"listIndexes", name.decode("utf-8", "replace")))
    try:
        (page,) = await client.services.engine.call(calls.LIST_INDEXES, (db, request))
    except EngineError:
        return 0
    return len(documents.decode(page or b"")["cursor"]["firstBatch"])


@command("dropDatabase", help="Drops the database.")
async def drop_database(request: Request, client: Client) -> bytes:
    db = database(request)
    await ending([db + b"."], lambda: _call(calls.DROP_DATABASE, (db,), request, client), client.services)
    return bson.document(bson.string(b"dropped", db.decode("utf-8", "replace")), bson.OK)


@command("listDatabases", help="Lists the databases.", admin_only=True)
async def list_databases(request: Request, client: Client) -> bytes:
    reply = documents.decode(await _call(calls.LIST_DATABASES, (spec(request),), request, client))
    return encode(reply | {"databases": sorted(reply["databases"], key=itemgetter("name"))})


@command("listCollections", help="Lists the collections and views of the database.")
async def list_collections(request: Request, client: Client) -> bytes:
    page = await _call(calls.LIST_COLLECTIONS, (database(request), spec(request)), request, client)
    # The engine spells the cursor's namespace in its own way.
    return page.replace(b".$cmd.ListCollections\0", b".$cmd.listCollections\0", 1)


@command("collStats", "collstats", help="Returns the size of a collection and its indexes.")
async def coll_stats(request: Request, client: Client) -> bytes:
    return _normal(await _coll_stats(collection(request), request, client))


async def _coll_stats(name: bytes, request: Request, client: Client) -> bytes:
    return await _call(calls.COLL_STATS, (database(request), name, _scale(request)), request, client)


@command("dbStats", "dbstats", help="Returns the size of the database.")
async def db_stats(request: Request, client: Client) -> bytes:
    free = b"true" if request.true(b"freeStorage") else b"false"
    return _normal(await _call(calls.DB_STATS, (database(request), _scale(request), free), request, client))


@command("dataSize", "datasize", help="Returns the size of a collection's documents.")
async def data_size(request: Request, client: Client) -> bytes:
    for field in (b"keyPattern", b"min", b"max"):
        if field in request.fields:
            raise CommandError(238, f"dataSize with {field.decode()} is not implemented yet")
    started = time.monotonic()
    db, _, name = (request.string(b"dataSize") or request.string(b"datasize") or b"").partition(b".")
    if not db or not name or b"\0" in db + name:
        raise CommandError(73, "dataSize needs a namespace: db.collection")
    stats = documents.decode(await _call(calls.COLL_STATS, (db, name, b"1"), request, client))
    return encode(
        {
            "estimate": True,
            "size": stats["size"],
            "numObjects": stats["count"],
            "millis": int((time.monotonic() - started) * 1000),
            "ok": 1.0,
        }
    )


@command("validate", help="Checks a collection and its indexes.")
async def validate(request: Request, client: Client) -> bytes:
    collection(request)
    return await _call(calls.VALIDATE, (database(request), spec(request)), request, client)


def _scale(request: Request) -> bytes:
    if b"scale" not in request.fields:
        return b"1"
    scale = request.integer(b"scale")
    if scale is None or scale < 1:
        raise CommandError(2, "scale must be a positive whole number")
    return str(scale).encode()


def _normal(document: bytes) -> bytes:
    """The same reply with ``ok`` as the double it is everywhere else."""
    return encode(documents.decode(document) | {"ok": 1.0})

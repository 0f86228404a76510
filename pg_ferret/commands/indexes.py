"""Indexes.  The engine only queues a build; the gateway runs it at once and waits for its end."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from bson import encode

from pg_ferret.commands import documents
from pg_ferret.commands.arguments import collection, database, spec, timeout
from pg_ferret.commands.duplicates import description, named_index
from pg_ferret.commands.statements import Index
from pg_ferret.engine import calls, sqlstate
from pg_ferret.errors import CommandError
from pg_ferret.registry import command
from pg_ferret.state.client import Client
from pg_ferret.wire.message import Request

_FIRST_PAUSE = 0.005
_LONGEST_PAUSE = 0.25
_EMPTY_DOCUMENT_BYTES = 5
# How the engine stores an index is nothing a client asked for, and tools that compare indexes would see a difference.
_ENGINE_DETAIL = {"enableOrderedIndex": True}


@command("createIndexes", help="Creates indexes and waits until they are built.")
async def create_indexes(request: Request, client: Client) -> bytes:
    db = database(request)
    collection(request)
    reply, _, requests = await client.services.engine.call(calls.CREATE_INDEXES, (db, spec(request)), timeout(request))
    result = _unwrap(reply, request)
    if requests is not None and len(requests) > _EMPTY_DOCUMENT_BYTES:
        await _build(requests, request, client)
    return encode(result)


async def _build(requests: bytes, request: Request, client: Client) -> None:
    """Run queued builds until ours are over; another worker or pg_cron may run them just as well."""
    engine = client.services.engine
    pause = _FIRST_PAUSE
    while True:
        await engine.call(calls.BUILD_INDEX, ())
        reply, ok, complete = await engine.call(calls.INDEX_STATUS, (requests,))
        if ok != b"\x01":
            _unwrap(reply, request)
            raise CommandError(1, "the index build failed")
        if complete == b"\x01":
            return
        await asyncio.sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE)


def _unwrap(reply: bytes | None, request: Request) -> dict[str, object]:
    """The client's reply out of the engine's, which is made for a router; raises CommandError for a failure."""
    document = documents.decode(reply or b"")
    result = document.get("raw", {}).get("defaultShard", document)
    if not result.get("ok") or "errmsg" in result:
        raise _build_error(*sqlstate.unpack(result.get("code", 1), result.get("errmsg", "index build failed")), request)
    return {**result, "ok": 1.0}


def _build_error(code: int, message: str, request: Request) -> CommandError:
    name = named_index(message)
    if code != sqlstate.DUPLICATE_KEY or name is None:
        return CommandError(code, message)
    wanted = documents.decode(request.body).get("indexes", ())
    patterns = {index.get("name"): index.get("key") for index in wanted if isinstance(index, Mapping)}
    described = description(database(request) + b"." + collection(request), Index(name, patterns.get(name) or {}))
    text = described.pop("errmsg")
    return CommandError(code, text, details=encode(described)[4:-1])


@command("dropIndexes", "deleteIndexes", help="Drops indexes.")
async def drop_indexes(request: Request, client: Client) -> bytes:
    collection(request)
    (reply,) = await client.services.engine.call(
        calls.DROP_INDEXES, (database(request), spec(request)), timeout(request)
    )
    return encode(documents.decode(reply or b"") | {"ok": 1.0})


@command("listIndexes", help="Lists the indexes of a collection.")
async def list_indexes(request: Request, client: Client) -> bytes:
    collection(request)
    (page,) = await client.services.engine.call(
        calls.LIST_INDEXES, (database(request), spec(request)), timeout(request)
    )
    document = documents.decode(page or b"")
    cursor = dict(document["cursor"])
    cursor["firstBatch"] = [_without_engine_detail(index) for index in cursor["firstBatch"]]
    return encode(document | {"cursor": cursor})


def _without_engine_detail(index: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(index)
    if "storageEngine" in found and dict(found["storageEngine"]) == _ENGINE_DETAIL:
        del found["storageEngine"]
    return found

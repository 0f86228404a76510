"""Writing documents: insert, update, delete, findAndModify."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable
from typing import NamedTuple

from pg_ferret.commands import documents, retries, upserts, write_errors
from pg_ferret.commands.arguments import Namespace, as_it_came, by_id, collection, database, spec
from pg_ferret.commands.duplicates import Keys
from pg_ferret.commands.statements import Statement
from pg_ferret.engine import calls
from pg_ferret.engine.lines import Shared
from pg_ferret.engine.pipeline import Params, Row
from pg_ferret.engine.sqlstate import DUPLICATE_KEY, translate
from pg_ferret.errors import EngineError
from pg_ferret.registry import command
from pg_ferret.state.client import Client
from pg_ferret.wire import bson
from pg_ferret.wire.message import Request, piece

# A findAndModify that found its document and changed nothing: the engine says that it found none.
_FOUND_NOTHING = b"\x10n\0\0\0\0\0\x08updatedExisting\0\0\0\x03value\0"
_FOUND_ONE = b"\x10n\0\1\0\0\0\x08updatedExisting\0\1\0\x03value\0"
_HEAD_BYTES = 100
# Of how many bytes the message of a write that may share a connection may be.
_SMALL_BYTES = 4096
# Of a statement that finds its document by _id: {q: {_id: …
_STATEMENT_HEAD_BYTES = 16
# Of an array: its first item, a document.
_FIRST_ITEM = b"\x030\0"
# With it there may be several documents of the same _id.
_COLLATION = b"collation"


@command("insert", help="Inserts documents.")
def insert(request: Request, client: Client) -> Awaitable[bytes]:
    return _write(calls.INSERT, b"documents", request, client)


@command("update", help="Updates documents.")
def update(request: Request, client: Client) -> Awaitable[bytes]:
    return _write(calls.UPDATE, b"updates", request, client)


@command("delete", help="Deletes documents.")
def delete(request: Request, client: Client) -> Awaitable[bytes]:
    return _write(calls.DELETE, b"deletes", request, client)


class _Write(NamedTuple):
    """What there is to know of a write before its collection and its statements are looked at."""

    db: bytes
    body: slice | None  # `as_it_came`
    namespace: Namespace | None  # of a write that may share a connection


async def _write(call: calls.Call, statements: bytes, request: Request, client: Client) -> bytes:
    """One write command; its statements come as a document sequence or as an array in the body."""
    memo = request.memo
    sequences = request.sequences
    known: _Write | None = None if memo is None else memo.get("write")
    if known is None:
        fields = request.fields
        named = Namespace.of(request) if _COLLATION not in fields else None
        known = _Write(database(request), as_it_came(request), named)
        if memo is not None:
            memo["write"] = known
    db, place, named = known
    sequence = sequences.get(statements)
    if place is None or len(sequences) > (sequence is not None):
        body = spec(request, besides=statements)
    else:
        body = piece(request.frame, place)
    engine = client.services.engine
    if named is not None and len(request.frame) <= _SMALL_BYTES and _single(request, statements, sequence):
        namespace = named.read(request)
        params = (db, body, sequence, calls.TRUE)
        answer = engine.writes.share(Shared(call, params, namespace, hash((call.name, namespace))))
    else:
        answer = engine.write(call, (db, body, sequence))
    try:
        reply, success, _ = await answer
    except EngineError as error:
        reply, success, _ = await retries.repeat(error, call, (db, body, sequence), request, client)
    assert reply is not None
    if success == b"\x01":
        return reply
    if call is calls.UPDATE:
        reply, well = await upserts.settle(reply, (db, body, sequence), request, client)
        if well:
            return reply
    return await write_errors.rebuild(reply, statements, request, client)


def _single(request: Request, statements: bytes, sequence: bytes | memoryview | None) -> bool:
    """Whether it is one document to insert, or one statement for a change of one document by its _id."""
    if sequence is not None:
        head, size = bytes(sequence[:_STATEMENT_HEAD_BYTES]), len(sequence)
    else:
        kind, start, end = request.fields.get(statements, bson.MISSING)
        at = start + len(_FIRST_ITEM) + 4
        if kind != bson.ARRAY or request.frame[start + 4 : at] != _FIRST_ITEM:
            return False
        head, size = request.frame[at : at + _STATEMENT_HEAD_BYTES], end - 1 - at
    if size < 4 or int.from_bytes(head[:4], "little") != size:
        return False
    return statements == b"documents" or (head[4:7] == b"\x03q\0" and by_id(head, 7))


@command("findAndModify", "findandmodify", help="Updates or deletes one document and returns it.")
async def find_and_modify(request: Request, client: Client) -> bytes:
    params = (database(request), spec(request))
    try:
        reply, _, _ = await _find_and_modify(params, request, client)
    except EngineError as error:
        reply, _, _ = await _modify_again(error, params, request, client)
    assert reply is not None
    if reply.find(_FOUND_NOTHING, 0, _HEAD_BYTES) >= 0:
        return reply.replace(_FOUND_NOTHING, _FOUND_ONE, 1)
    return reply


def _find_and_modify(params: tuple[bytes, bytes | memoryview], request: Request, client: Client) -> Awaitable[Row]:
    engine = client.services.engine
    fields, frame = request.fields, request.frame
    kind, start, _ = fields.get(b"query", bson.MISSING)
    if kind == bson.DOCUMENT and by_id(frame, start) and len(frame) <= _SMALL_BYTES and _COLLATION not in fields:
        namespace = params[0] + b"." + collection(request)
        write = Shared(calls.FIND_AND_MODIFY, (*params, calls.TRUE), namespace, hash((b"findAndModify", namespace)))
        return engine.writes.share(write)
    return engine.write(calls.FIND_AND_MODIFY, params)


async def _modify_again(error: EngineError, params: Params, request: Request, client: Client) -> Row:
    """The same once more for one that has failed; raises EngineError, or CommandError in MongoDB's words."""

    def statement() -> Statement:
        return Statement.of_find_and_modify(documents.decode(request.body))

    for number in itertools.count():
        try:
            return await retries.repeat(error, calls.FIND_AND_MODIFY, params, request, client)
        except EngineError as refused:
            error = refused.with_traceback(None)  # which holds this frame, and the command
        code, message = translate(error.sqlstate, error.message)
        if code != DUPLICATE_KEY:
            break
        keys = Keys.of(request, client)
        if number == upserts.MOST_TRIES or not await upserts.lost_race(message, statement, keys):
            raise await write_errors.explained(error, statement, keys)
        try:
            return await client.services.engine.write(calls.FIND_AND_MODIFY, params)
        except EngineError as another:
            error = another.with_traceback(None)
    raise error

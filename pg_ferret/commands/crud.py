"""Reading and writing documents: the hot path."""

from __future__ import annotations

import itertools
import time
from collections.abc import Awaitable
from typing import NamedTuple

from pg_ferret.commands import conflicts, documents, upserts, write_errors
from pg_ferret.commands.arguments import Namespace, as_it_came, collection, database, session, spec
from pg_ferret.commands.duplicates import Keys
from pg_ferret.commands.pipelines import Output
from pg_ferret.commands.statements import Statement
from pg_ferret.engine import calls
from pg_ferret.engine.lines import Shared
from pg_ferret.engine.pipeline import Params, Row
from pg_ferret.engine.sqlstate import DUPLICATE_KEY, translate
from pg_ferret.errors import CommandError, EngineError
from pg_ferret.registry import command
from pg_ferret.state.client import Client
from pg_ferret.state.cursors import Cursor, owner
from pg_ferret.wire import bson
from pg_ferret.wire.message import Request

_FLAGS = frozenset((b"tailable", b"singleBatch"))
# What a page costs depends on these, beside the filter.
_OF_A_PAGE = (b"limit", b"batchSize", b"sort", b"skip", b"hint", b"collation")
# The engine takes them and does not look at them.
_IGNORED = frozenset((b"min", b"max"))
_FOR_EVER = float("inf")
# A findAndModify that found its document and changed nothing: the engine says that it found none.
_FOUND_NOTHING = b"\x10n\0\0\0\0\0\x08updatedExisting\0\0\0\x03value\0"
_FOUND_ONE = b"\x10n\0\1\0\0\0\x08updatedExisting\0\1\0\x03value\0"
_HEAD_BYTES = 100
# A write that may share a connection: of how many bytes its message may be, and of what type the value of an _id in
# it; a document could be operators, a regular expression matches many.
_SMALL_BYTES = 4096
_ID_TYPES = frozenset(
    (bson.DOUBLE, bson.STRING, bson.BINARY, bson.OBJECT_ID, bson.BOOL, bson.DATE, bson.INT32, bson.INT64)
)
# Of a statement that finds its document by _id: {q: {_id: …
_STATEMENT_HEAD_BYTES = 16
# Of an array: its first item, a document.
_FIRST_ITEM = b"\x030\0"
# With it there may be several documents of the same _id.
_NOT_ALONE = frozenset((b"collation",))


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
    body: slice | None  # `as_it_came`
    filter: bson.Span
    alone: bool  # there is none, so it must have a connection of its own
    point: bool  # otherwise: it neither sorts nor skips, nor does it ask for small pages, a hint or a collation
    whole: bool  # its result is one page
    limit: bson.Span
    sized: tuple[bytes, ...]  # the fields that say how much it reads, beside the filter
    values: list[slice]  # and where their values are


@command("find", help="Returns the documents that match a filter.")
async def find(request: Request, client: Client) -> bytes:
    memo = request.memo
    known: _Find | None = None if memo is None else memo.get("find")
    if known is None:
        known = _look_at(request)
        # A flag that is a number may be another one in the next request of the shape.
        if memo is not None and all(request.fields[name][0] == bson.BOOL for name in _FLAGS & request.fields.keys()):
            memo["find"] = known
    db, named, place, (_, start, end), alone, point, whole, limit, sized, values = known
    namespace = named.read(request)
    frame = request.frame
    body = spec(request) if place is None or request.sequences else memoryview(frame)[place]
    services = client.services
    engine = services.engine
    # What finds one document at most opens a cursor only from a view that has many of the same _id.
    single = point and (whole or _by_id(frame, start) or bson.read_int(frame, limit) == 1)
    if not single and (alone or not engine.pages.crowded(services.counters.in_flight - 1)):
        return _page(await engine.call(calls.FIND, (db, body)), namespace, request, client)
    # Of about the same cost: the same first condition by name and type, about the same length.
    first = start + 4  # its type; in an empty filter the NUL at the end
    cost = namespace, frame[first : frame.find(0, first, end)], (end - start) >> 5
    if single:
        row = await engine.finds.share(Shared(calls.FIND, (db, body), namespace, hash(cost)))
    else:
        shape = hash((cost, sized, *map(frame.__getitem__, values)))
        row = await engine.pages.share(Shared(calls.FIND, (db, body), namespace, shape))
    if row[1] is not None:
        return _page(row, namespace, request, client)
    page = row[0]
    assert page is not None
    return page


def _look_at(request: Request) -> _Find:
    if b"tailable" in request.fields and request.true(b"tailable"):
        raise CommandError(2, "error processing query: tailable cursor requested on non capped collection")
    fields = request.fields
    for name in _IGNORED & fields.keys():
        if not bson.is_empty(fields[name]):
            raise CommandError(115, f"find with {name.decode()} is not supported")
    db = database(request)
    filtered = fields.get(b"filter", bson.MISSING)
    alone = filtered[0] != bson.DOCUMENT
    whole = request.true(b"singleBatch")
    sized = {name: fields[name] for name in _OF_A_PAGE if name in fields}
    point = not alone and (sized.keys() <= {b"limit"} or (whole and sized.keys() <= {b"limit", b"batchSize"}))
    return _Find(
        db,
        Namespace.of(request),
        as_it_came(request),
        filtered,
        alone,
        point,
        whole,
        fields.get(b"limit", bson.MISSING),
        tuple(sized),
        [slice(start, end) for _, start, end in sized.values()],
    )


@command("aggregate", help="Runs an aggregation pipeline.")
async def aggregate(request: Request, client: Client) -> bytes:
    if request.true(b"explain"):
        raise CommandError(238, "aggregate with explain is not implemented yet")
    db = database(request)
    # {aggregate: 1} runs on the database itself.
    name = b"$cmd.aggregate" if request.integer(b"aggregate") == 1 else collection(request)
    if name == b"$cmd.aggregate" and (output := Output.of(request)) is not None and output.stage == b"$merge":
        raise CommandError(115, "$merge is only supported in the aggregation of a collection")  # it would write nothing
    try:
        row = await client.services.engine.call(calls.AGGREGATE, (db, spec(request)))
    except EngineError as error:
        raise await _output_refused(error, request, client) from None
    return _page(row, db + b"." + name, request, client)


async def _output_refused(error: EngineError, request: Request, client: Client) -> CommandError | EngineError:
    """An aggregation's error; what it was to write may be in the collection already."""
    output = Output.of(request)
    if output is None:
        return error
    return await write_errors.explained(error, None, Keys(output.db, output.collection, client))


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
        named = Namespace.of(request) if _NOT_ALONE.isdisjoint(fields) else None
        known = _Write(database(request), as_it_came(request), named)
        if memo is not None:
            memo["write"] = known
    db, place, named = known
    sequence = sequences.get(statements)
    if place is None or len(sequences) > (sequence is not None):
        body = spec(request, besides=statements)
    else:
        body = memoryview(request.frame)[place]
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
        reply, success, _ = await conflicts.repeat(error, call, (db, body, sequence), request, client)
    assert reply is not None
    if success == b"\x01":
        return reply
    if call is calls.UPDATE:
        reply, well = await upserts.settle(reply, (db, body, sequence), request, client)
        if well:
            return reply
    return await write_errors.rebuild(reply, statements, request, client)


def _single(request: Request, statements: bytes, sequence: memoryview | None) -> bool:
    """Whether it is one document to insert, or one statement for a change of one document by its _id."""
    if sequence is not None:
        head, size = bytes(sequence[:_STATEMENT_HEAD_BYTES]), len(sequence)
    else:
        kind, start, end = request.fields.get(statements, bson.MISSING)
        at = start + len(_FIRST_ITEM) + 4
        if kind != bson.ARRAY or request.frame[start + 4 : at] != _FIRST_ITEM:
            return False
        head, size = request.frame[at : at + _STATEMENT_HEAD_BYTES], end - 1 - at
    if int.from_bytes(head[:4], "little") != size:
        return False
    return statements == b"documents" or (head[4:7] == b"\x03q\0" and _by_id(head, 7))


def _by_id(data: bytes, at: int) -> bool:
    """Whether the condition that begins there is first of all a value of the _id."""
    return data[at + 5 : at + 9] == b"_id\0" and data[at + 4] in _ID_TYPES


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
    if kind == bson.DOCUMENT and _by_id(frame, start) and len(frame) <= _SMALL_BYTES and _NOT_ALONE.isdisjoint(fields):
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
            return await conflicts.repeat(error, calls.FIND_AND_MODIFY, params, request, client)
        except EngineError as refused:
            error = refused
        code, message = translate(error.sqlstate, error.message)
        if code != DUPLICATE_KEY:
            break
        keys = Keys.of(request, client)
        if number == upserts.MOST_TRIES or not await upserts.lost_race(message, statement, keys):
            raise await write_errors.explained(error, statement, keys)
        try:
            return await client.services.engine.write(calls.FIND_AND_MODIFY, params)
        except EngineError as another:
            error = another
    raise error

"""Reading documents: find, aggregate, count, distinct."""

from __future__ import annotations

import time
from collections.abc import Awaitable
from typing import NamedTuple

from pg_ferret.commands import write_errors
from pg_ferret.commands.arguments import Namespace, as_it_came, by_id, collection, database, session, spec
from pg_ferret.commands.duplicates import Keys
from pg_ferret.commands.pipelines import Output, may_write, outline
from pg_ferret.engine import calls
from pg_ferret.engine.lines import Shared
from pg_ferret.engine.pipeline import Row
from pg_ferret.errors import CommandError, EngineError
from pg_ferret.registry import command
from pg_ferret.state.client import Client
from pg_ferret.state.cursors import Cursor, owner
from pg_ferret.wire import bson
from pg_ferret.wire.message import Request, piece

_FLAGS = frozenset((b"tailable", b"singleBatch"))
# What a page costs depends on these, beside the filter.
_OF_A_PAGE = (b"limit", b"batchSize", b"sort", b"skip", b"hint", b"collation")
# And what other reads cost, beside pipeline or query.
_OF_ANY_READ = (b"key", b"cursor", b"limit", b"skip", b"hint", b"collation")
# The engine takes them and does not look at them.
_IGNORED = frozenset((b"min", b"max"))
_FOR_EVER = float("inf")
# Several point reads may be one statement, whose parameters are copied: commands of so many bytes are not.
_LARGEST_POINT = 64 * 1024


def _page(row: Row, namespace: bytes, request: Request, client: Client, shape: int = 0) -> bytes:
    """The first page; what is left of the result is kept as a cursor that any worker can continue."""
    page, continuation = row[0], row[1]
    assert page is not None
    if continuation is not None:
        cursor_id = row[2]
        assert cursor_id is not None
        services = client.services
        lifetime = services.config.settings.cursor_timeout / 1000
        expires = _FOR_EVER if request.true(b"noCursorTimeout") else time.time() + lifetime
        cursor = Cursor(owner(namespace, client.user, session(request)), expires, continuation, shape)
        services.cursors.open(int.from_bytes(cursor_id, "big"), cursor)
    return page


class _Find(NamedTuple):
    """What there is to know of a find before its collection and its filter are looked at."""

    db: bytes
    namespace: Namespace
    body: slice | None  # `as_it_came`
    filter: bson.Span  # without one it must have a connection of its own
    point: bool  # with one: it neither sorts nor skips, nor does it ask for small pages, a hint or a collation
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
    db, named, place, (kind, start, end), point, whole, limit, sized, values = known
    namespace = named.read(request)
    frame = request.frame
    body = spec(request) if place is None or request.sequences else piece(frame, place)
    services = client.services
    engine = services.engine
    # What finds one document at most opens a cursor only from a view that has many of the same _id.
    single = point and (whole or by_id(frame, start) or bson.read_int(frame, limit) == 1)
    params = db, body
    call = calls.FIND
    if not single and namespace in services.unordered:
        call = calls.FIND_AS_EVER
    if not single and (kind != bson.DOCUMENT or not engine.pages.crowded(services.counters.in_flight - 1)):
        shape = 0
        row = await engine.call(call, params)
    else:
        # Of about the same cost: the same first condition by name and type, about the same length.
        first = start + 4  # its type; in an empty filter the NUL at the end
        cost = namespace, frame[first : frame.find(0, first, end)], (end - start) >> 5
        if single:
            shape = hash(cost)
            row = await engine.finds.share(Shared(call, params, namespace, shape))
        else:
            shape = hash((cost, sized, *map(frame.__getitem__, values)))
            row = await engine.pages.share(Shared(call, params, namespace, shape))
    if row[1] is not None and call is calls.FIND and not calls.reads_by_id(row[1]):
        # A cursor that is not exact: extension/streaming.c.
        services.unordered.add(namespace)
        row = await engine.call(calls.FIND_AS_EVER, params)
    return _page(row, namespace, request, client, shape)


def _look_at(request: Request) -> _Find:
    if b"tailable" in request.fields and request.true(b"tailable"):
        raise CommandError(2, "error processing query: tailable cursor requested on non capped collection")
    fields = request.fields
    for name in _IGNORED & fields.keys():
        if not bson.is_empty(fields[name]):
            raise CommandError(115, f"find with {name.decode()} is not supported")
    db = database(request)
    filtered = fields.get(b"filter", bson.MISSING)
    whole = request.true(b"singleBatch")
    sized = {name: fields[name] for name in _OF_A_PAGE if name in fields}
    plain = sized.keys() <= {b"limit"} or (whole and sized.keys() <= {b"limit", b"batchSize"})
    return _Find(
        db,
        Namespace.of(request),
        as_it_came(request),
        filtered,
        plain and filtered[0] == bson.DOCUMENT and request.end - request.start <= _LARGEST_POINT,
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
    namespace = db + b"." + name
    if may_write(request):
        try:
            row = await client.services.engine.call(calls.AGGREGATE, (db, spec(request)))
        except EngineError as error:
            raise await _output_refused(error, request, client) from None
    else:
        row = await _read(calls.AGGREGATE, b"pipeline", namespace, request, client)
    return _page(row, namespace, request, client)


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
    namespace = database(request) + b"." + collection(request)
    row = await _read(call, b"query", namespace, request, client)
    document = row[0]
    assert document is not None
    return document


def _read(call: calls.Call, asked: bytes, namespace: bytes, request: Request, client: Client) -> Awaitable[Row]:
    """To be awaited at once: a read of any kind, which shares a connection in a crowd.

    ``asked`` is the field with the filter or the pipeline, of which most depends.
    """
    services = client.services
    pages = services.engine.pages
    params = (database(request), spec(request))
    if not pages.crowded(services.counters.in_flight - 1):
        return services.engine.call(call, params)
    fields, frame = request.fields, request.frame
    span = fields.get(asked, bson.MISSING)
    # Of about the same cost: the same in outline, and of about the same length.
    sized = [(name, frame[fields[name][1] : fields[name][2]]) for name in _OF_ANY_READ if name in fields]
    cost = call.name, namespace, *outline(frame, span), (span[2] - span[1]) >> 5, *sized
    return pages.share(Shared(call, params, namespace, hash(cost)))

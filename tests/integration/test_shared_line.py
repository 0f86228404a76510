"""The connection that cheap reads share, on a real server: who suffers when one of them fails, stalls or leaves."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import psycopg
import pytest
from bson import Int64, decode, encode
from pymongo import MongoClient
from pymongo.errors import OperationFailure

from dev.cluster import Cluster
from pg_ferret.engine import calls
from pg_ferret.engine.limits import conninfo, pool_limits
from pg_ferret.engine.lines import Shared
from pg_ferret.engine.pipeline import Row
from pg_ferret.engine.pool import Pool
from pg_ferret.engine.shared import Reads
from pg_ferret.engine.sqlstate import CANCELLED
from pg_ferret.errors import EngineError
from pg_ferret.runner import Waiter
from tests.integration.conftest import configuration
from tests.integration.pools import MakePool, active, locked, opened_pool
from tests.turns import PATIENCE_SECONDS, wait_until

Document = dict[str, Any]
_SHAPE = 1
_PAGE = 2


@pytest.fixture
def make_pool(cluster: Cluster, client: MongoClient[Document]) -> MakePool:
    """A worker's pool, with at most so many connections; collections ``c`` and ``d`` of ten rows."""
    for name in ("c", "d"):
        client.line[name].drop()
        client.line[name].insert_many([{"_id": number, "s": "a"} for number in range(10)])
    return partial(opened_pool, cluster)


@pytest.fixture
def view(client: MongoClient[Document], make_pool: MakePool) -> None:
    """A view ``v`` of so many documents of each ``_id`` that they do not fit into a first page."""
    client.line.drop_collection("v")
    pipeline = [{"$set": {"of": {"$range": [0, 150]}}}, {"$unwind": "$of"}]
    client.line.create_collection("v", viewOn="c", pipeline=pipeline)


def find(number: int, collection: str = "c", condition: object = None, **more: object) -> Shared:
    """A read of one row; all have the same shape, as if they had turned out to cost the same."""
    command = {"find": collection, "filter": {"_id": number} if condition is None else {"s": condition}}
    body = encode(command | {"limit": 1, "singleBatch": True, "$db": "line"} | more)
    return Shared(calls.FIND, (b"line", body), b"line." + collection.encode(), _SHAPE)


async def opened(pool: Pool, number: int, collection: str = "c") -> Shared:
    """A getMore of the rest of a cursor that has given the rows up to this one."""
    command = {"find": collection, "filter": {}, "batchSize": number + 1, "$db": "line"}
    _, continuation, cursor_id = await pool.call(calls.FIND, (b"line", encode(command)))
    assert continuation is not None
    assert cursor_id is not None
    more = {"getMore": Int64(int.from_bytes(cursor_id, "big")), "collection": collection, "$db": "line"}
    params = (b"line", encode(more), continuation)
    return Shared(calls.GET_MORE, params, b"line." + collection.encode(), _PAGE)


def rest(row: Row) -> list[int]:
    """The ``_id`` of the rows of the cursor's last page."""
    page, continuation = row
    assert page is not None
    assert continuation is None
    return [item["_id"] for item in decode(page)["cursor"]["nextBatch"]]


def found(row: Row) -> int:
    """The ``_id`` of the row that was read."""
    assert row[0] is not None
    return int(decode(row[0])["cursor"]["firstBatch"][0]["_id"])


async def joined(lines: Reads, wanted: Shared) -> Waiter[Row]:
    """The read, when it has joined a line; until then it is read alone, which makes it cheap, and the line be there."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not isinstance(read := lines.share(wanted), Waiter):
            await read
    return read


async def shared(pool: Pool, number: int = 0) -> Waiter[Row]:
    """A point read that has joined the line."""
    return await joined(pool.finds, find(number))


async def ready(pool: Pool) -> None:
    """The line takes point reads: on a busy machine the last one may just have taken long for once."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not any(line.takes(find(0)) for line in pool.finds.all):
            await (await shared(pool))


def shrunk(pool: Pool, most: int) -> bool:
    """Whether the pool has at most so many connections."""
    return pool.size <= most


async def test_a_burst_that_takes_all_connections_gets_its_line_all_the_same(make_pool: MakePool) -> None:
    async with make_pool(4) as pool:
        rows = await asyncio.gather(*[pool.finds.share(find(number % 10)) for number in range(100)])
        assert [found(row) for row in rows] == [number % 10 for number in range(100)]
        assert found(await (await shared(pool, 7))) == 7
        assert pool.size <= 4


async def test_a_read_known_to_be_slow_is_measured_now_and_then(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    monkeypatch.setattr("pg_ferret.engine.scheduling.work_of", measured.append)
    async with make_pool(4) as pool:
        costs = pool.finds.costs
        now = asyncio.get_running_loop().time()
        costs.keep_away(_SHAPE, now - 2.0)
        costs.keep_away(_SHAPE, now + PATIENCE_SECONDS)  # it will not pass meanwhile
        assert found(await pool.finds.share(find(3))) == 3
        assert not measured
        assert costs.slow(_SHAPE)
    async with make_pool(4) as pool:
        costs = pool.finds.costs
        costs.keep_away(_SHAPE, now - 2.0)
        costs.keep_away(_SHAPE, now - 1.0)
        assert found(await pool.finds.share(find(3))) == 3
        assert measured


@pytest.mark.usefixtures("view")
async def test_a_read_that_opens_a_cursor_leaves_the_line(make_pool: MakePool) -> None:
    command = encode({"find": "v", "filter": {"_id": 1}, "$db": "line"})
    wanted = Shared(calls.FIND, (b"line", command), b"line.v", _SHAPE)
    async with make_pool(6) as pool:
        await ready(pool)
        first, opening, refused = map(pool.finds.share, (find(0), wanted, find(0, condition={"$regex": "("})))
        assert all(map(asyncio.isfuture, (first, opening, refused)))
        assert found(await first) == 0
        with pytest.raises(EngineError):
            await refused
        page, continuation, cursor_id = await opening
        assert page is not None
        assert cursor_id is not None
        got = [item["of"] for item in decode(page)["cursor"]["firstBatch"]]
        more = {"getMore": Int64(int.from_bytes(cursor_id, "big")), "collection": "v", "$db": "line"}
        page, _ = await pool.call(calls.GET_MORE, (b"line", encode(more), continuation))
        assert page is not None
        got += [item["of"] for item in decode(page)["cursor"]["nextBatch"]]
        assert sorted(got) == list(range(150))
        for _ in range(2):  # such reads stay away
            assert not asyncio.isfuture(alone := pool.finds.share(wanted))
            assert (await alone)[1] is not None


@pytest.mark.usefixtures("view")
def test_cursors_of_reads_by_id_are_whole_among_other_clients(client: MongoClient[Document]) -> None:
    over = threading.Event()

    def other(number: int) -> None:
        while not over.is_set():
            client.line.c.find_one({"_id": number})
            with pytest.raises(OperationFailure):
                client.line.c.find_one({"_id": number, "s": {"$regex": "("}})

    def whole(number: int) -> set[int]:
        return {len(list(client.line.v.find({"_id": number}))) for _ in range(20)}

    with ThreadPoolExecutor(12) as threads:
        others = [threads.submit(other, number) for number in range(6)]
        try:
            assert [*threads.map(whole, range(6))] == [{150}] * 6
        finally:
            over.set()
        for one in others:
            one.result()


async def test_reads_of_one_statement_may_be_of_several_databases(
    monkeypatch: pytest.MonkeyPatch, make_pool: MakePool, client: MongoClient[Document]
) -> None:
    monkeypatch.setattr(Pool, "_elsewhere", None)  # where they would be made if the statement were refused
    client.line2.c.drop()
    client.line2.c.insert_many([{"_id": number} for number in range(100, 110)])
    async with make_pool(4) as pool:
        await (await shared(pool))
        reads = [find(number + 100 * (number % 2)) for number in range(10)]
        for read in reads[1::2]:
            body = encode(decode(bytes(read.params[1] or b"")) | {"$db": "line2"})
            read.params = (b"line2", body)
        waiters = [pool.finds.share(read) for read in reads]
        assert all(map(asyncio.isfuture, waiters))
        assert [found(row) for row in await asyncio.gather(*waiters)] == [0, 101, 2, 103, 4, 105, 6, 107, 8, 109]
        (line,) = pool.finds.all
        assert calls.FIND_MANY.name in line.connection.prepared_names


async def test_a_read_that_is_refused_takes_away_no_other(make_pool: MakePool) -> None:
    """They have been made by themselves, where they were not."""
    async with make_pool(4) as pool:
        await (await shared(pool))
        refused = replace(find(3, condition={"$regex": "("}), shape=2)
        pool.finds.costs.note(refused.shape, 0.0, 0.0)
        rows = await asyncio.gather(
            *[pool.finds.share(read) for read in (find(1), refused, find(2))], return_exceptions=True
        )
        assert isinstance(rows[1], EngineError)
        assert [found(row) for row in rows if isinstance(row, tuple)] == [1, 2]
        assert find(1).shape in pool.finds.costs.cheap
        assert refused.shape not in pool.finds.costs.cheap


async def test_a_read_that_is_refused_harms_no_other(make_pool: MakePool) -> None:
    async with make_pool(4) as pool:
        await (await shared(pool))
        conditions = [{"$regex": "("} if number == 3 else None for number in range(8)]
        reads = [pool.finds.share(find(number, condition=condition)) for number, condition in enumerate(conditions)]
        assert all(map(asyncio.isfuture, reads))
        rows = await asyncio.gather(*reads, return_exceptions=True)
        assert isinstance(rows[3], EngineError)
        assert [found(row) for row in rows if isinstance(row, tuple)] == [0, 1, 2, 4, 5, 6, 7]
        # And it is not cheap any more until it has shown the contrary.
        assert not asyncio.isfuture(alone := pool.finds.share(find(1)))
        assert found(await alone) == 1
        assert found(await (await shared(pool, 5))) == 5


async def test_a_time_limit_that_passes_in_line_refuses_its_read_only(cluster: Cluster, make_pool: MakePool) -> None:
    async with make_pool(6) as pool, locked(cluster):
        await ready(pool)
        limited = pool.finds.share(find(1, "d", maxTimeMS=30))
        others = [pool.finds.share(find(number)) for number in range(5)]
        assert all(map(asyncio.isfuture, (limited, *others)))
        async with asyncio.timeout(PATIENCE_SECONDS):
            with pytest.raises(EngineError) as refused:
                await limited
            assert refused.value.sqlstate == CANCELLED
            assert [found(row) for row in await asyncio.gather(*others)] == [0, 1, 2, 3, 4]
        assert not active(cluster)


def test_the_engine_limits_no_statement_that_follows_in_the_transaction(cluster: Cluster, make_pool: MakePool) -> None:
    _, body = find(1, maxTimeMS=50).params
    with psycopg.connect(conninfo(configuration(cluster)), autocommit=True) as connection, connection.pipeline():
        connection.execute("select from documentdb_api.find_cursor_first_page('line', %b)", (body,))
        slept = connection.execute("select pg_sleep(0.2), current_setting('statement_timeout')")
        assert slept.fetchone() == ("", "0")


async def test_stalls_with_several_batches_under_way_cost_no_connection(cluster: Cluster, make_pool: MakePool) -> None:
    async with make_pool(3) as pool:
        for _ in range(4):
            async with locked(cluster):
                await ready(pool)
                stalled = pool.finds.share(find(1, "d"))
                await asyncio.sleep(0)  # each turn of the loop sends a batch
                behind = pool.finds.share(find(2))
                assert asyncio.isfuture(stalled)
                assert asyncio.isfuture(behind)
                assert found(await behind) == 2
            assert found(await stalled) == 1
        async with locked(cluster):
            reads = [asyncio.ensure_future(pool.call(calls.FIND, find(number, "d").params)) for number in range(3)]
            await wait_until(lambda: len(active(cluster)) == 3)
        assert [found(row) for row in await asyncio.gather(*reads)] == [0, 1, 2]


async def test_who_waits_behind_a_read_that_stalls_is_served_elsewhere(cluster: Cluster, make_pool: MakePool) -> None:
    async with make_pool(6) as pool, locked(cluster):
        await ready(pool)
        stalled = pool.finds.share(find(1, "d"))
        behind = [pool.finds.share(find(number)) for number in range(5)]
        assert asyncio.isfuture(stalled)
        assert all(map(asyncio.isfuture, behind))
        async with asyncio.timeout(2):
            assert [found(row) for row in await asyncio.gather(*behind)] == [0, 1, 2, 3, 4]
        # On the line it was cancelled; it waits on a connection of its own, until its client goes.
        await wait_until(lambda: len(active(cluster)) == 1)
        stalled.cancel()
        pool.abandon("find line.d")
        await wait_until(lambda: not active(cluster))
        assert found(await (await shared(pool, 6))) == 6


@pytest.mark.parametrize(("connections", "lines"), [(1, 0), (2, 0), (3, 0), (4, 1), (6, 2), (8, 1), (20, 2)])
async def test_pages_share_as_many_lines_as_there_is_room_for(
    make_pool: MakePool, connections: int, lines: int
) -> None:
    async with make_pool(connections) as pool:
        pages = [await opened(pool, number % 9) for number in range(40)]
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            rows = await asyncio.gather(*[pool.pages.share(page) for page in pages])
            assert [rest(row) for row in rows] == [list(range(number % 9 + 1, 10)) for number in range(40)]
            assert pool.size <= connections
            if len(pool.pages.all) == lines:
                break
            assert time.monotonic() < deadline
        # On a busy machine pages may take long for once: such are read alone, and so are those behind them.
        while True:
            together = [pool.pages.share(page) for page in pages]
            in_line = sum(map(asyncio.isfuture, together))
            assert [rest(row) for row in await asyncio.gather(*together)] == [rest(row) for row in rows]
            if in_line == len(pages) * (lines > 0):
                break
            assert lines
            assert time.monotonic() < deadline
        # Room is left for others, whatever the pages do.
        assert found(await pool.finds.share(find(3))) == 3
        assert found(await pool.call(calls.FIND, find(4).params)) == 4


@pytest.mark.parametrize(
    ("more", "streams"), [({}, True), ({"filter": {"s": "a"}}, True), ({"sort": {"s": 1}}, False), ({"skip": 1}, False)]
)
async def test_only_a_position_in_a_collection_can_be_read_again(
    make_pool: MakePool, more: Document, streams: bool
) -> None:
    async with make_pool(1) as pool:
        command = encode({"find": "c", "batchSize": 2, **more, "$db": "line"})
        _, continuation, _ = await pool.call(calls.FIND, (b"line", command))
        assert continuation is not None
        assert calls.streams(continuation) == streams


@pytest.mark.parametrize(
    "command",
    [
        {"find": "c", "filter": {}, "batchSize": 4},
        {"find": "c", "filter": {}, "batchSize": 4, "sort": {"s": 1}},
        {"find": "c", "filter": {}, "batchSize": 4, "skip": 1},
        {"aggregate": "c", "pipeline": [{"$match": {"s": "a"}}], "cursor": {"batchSize": 4}},
        {"aggregate": "c", "pipeline": [{"$group": {"_id": "$_id"}}], "cursor": {"batchSize": 4}},
    ],
)
async def test_a_page_in_a_line_may_open_a_cursor(make_pool: MakePool, command: Document) -> None:
    call = calls.FIND if "find" in command else calls.AGGREGATE
    first = Shared(call, (b"line", encode(command | {"$db": "line"})), b"line.c", _PAGE)
    async with make_pool(12) as pool:
        refused = replace(first, params=(b"line", encode(command | {"nonsense": 1, "$db": "line"})))
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(pool.pages.all) < 2:
                await asyncio.gather(*[pool.pages.share(first) for _ in range(9)])
        row = await joined(pool.pages, first)
        failing = pool.pages.share(refused)
        rows = [row, pool.pages.share(first), pool.pages.share(first)]
        assert all(map(asyncio.isfuture, [failing, *rows]))
        with pytest.raises(EngineError):
            await failing
        for page, continuation, cursor_id in await asyncio.gather(*rows):
            assert page is not None
            assert cursor_id is not None
            got = [item["_id"] for item in decode(page)["cursor"]["firstBatch"]]
            getmore = {"getMore": Int64(int.from_bytes(cursor_id, "big")), "collection": "c", "$db": "line"}
            got += rest(await pool.call(calls.GET_MORE, (b"line", encode(getmore), continuation)))
            assert sorted(got) == list(range(1 if "skip" in command else 0, 10))


async def test_a_cursor_for_one_who_has_gone_leaves_no_file(cluster: Cluster, make_pool: MakePool) -> None:
    command = {"find": "c", "filter": {}, "batchSize": 4, "sort": {"s": 1}, "$db": "line"}
    sorting = Shared(calls.FIND, (b"line", encode(command)), b"line.c", _PAGE)

    def files() -> set[tuple[str | None, ...]]:
        return set(cluster.psql("select pg_ls_dir('pg_documentdb_cursor_files', true, false)"))

    async with make_pool(12) as pool, asyncio.timeout(PATIENCE_SECONDS):
        while True:
            before = files()
            readers = [pool.pages.share(sorting) for _ in range(5)]
            if all(map(asyncio.isfuture, readers)):
                break
            await asyncio.gather(*readers)
        for reader in readers:
            asyncio.ensure_future(reader).cancel()
        await wait_until(lambda: not pool.pages.busy)
        assert before
        await wait_until(lambda: files() <= before)
        # Nor is there one to delete of a cursor that is a position.
        body = encode({"find": "c", "filter": {}, "batchSize": 4, "$db": "line"})
        pool._unclaimed(calls.FIND, await pool.call(calls.FIND, (b"line", body)))
        assert not pool._leftovers._ids


@pytest.mark.usefixtures("make_pool")  # the collections
def test_cursors_are_whole_among_many_clients(client: MongoClient[Document]) -> None:
    wholes: list[Callable[[], Iterable[Document]]] = [
        lambda: client.line.c.find(batch_size=3),
        lambda: client.line.c.find({"s": "a"}, batch_size=2).sort("s"),
        lambda: client.line.d.find({"_id": {"$gte": 0}}, batch_size=4),
        lambda: client.line.d.find().sort("_id", -1).limit(10),
        lambda: client.line.c.aggregate([{"$match": {"s": "a"}}], batchSize=3),
        lambda: client.line.d.aggregate([{"$group": {"_id": "$_id"}}], batchSize=4),
        lambda: [{"_id": number} for number in client.line.d.distinct("_id")],
        lambda: [{"_id": number} for number in range(client.line.c.count_documents({"s": "a"}))],
        lambda: [{"_id": number} for number in range(client.line.c.estimated_document_count())],
    ]

    def whole(number: int) -> set[tuple[int, ...]]:
        if number % 4 == 3:
            with pytest.raises(OperationFailure):
                client.line.c.find({"s": {"$regex": "("}}, limit=5).to_list()
        found = [wholes[number % len(wholes)]() for _ in range(30)]
        return {tuple(sorted(item["_id"] for item in cursor)) for cursor in found}

    with ThreadPoolExecutor(16) as threads:
        assert [*threads.map(whole, range(54))] == [{tuple(range(10))}] * 54


async def test_pages_behind_one_that_stalls_are_read_elsewhere(cluster: Cluster, make_pool: MakePool) -> None:
    async with make_pool(12) as pool:
        blocked = await opened(pool, 4, "d")
        pages = [await opened(pool, number) for number in range(9)]
        async with locked(cluster):
            async with asyncio.timeout(PATIENCE_SECONDS):
                while len(pool.pages.all) < 2:
                    await asyncio.gather(*[pool.pages.share(page) for page in pages])
            first = await joined(pool.pages, pages[0])
            stalled = pool.pages.share(blocked)
            behind = [first, *[pool.pages.share(page) for page in pages[1:]]]
            assert asyncio.isfuture(stalled)
            assert all(map(asyncio.isfuture, behind))
            async with asyncio.timeout(2):
                rows = await asyncio.gather(*behind)
            assert [rest(row) for row in rows] == [list(range(number + 1, 10)) for number in range(9)]
            await wait_until(lambda: len(active(cluster)) == 1)
            assert not stalled.done()
        assert rest(await stalled) == [5, 6, 7, 8, 9]


async def test_fewer_connections_end_the_line_and_no_read(cluster: Cluster, make_pool: MakePool) -> None:
    async with make_pool(6) as pool:
        await (await shared(pool))
        for most in (1, 6, 1, 6):
            reads = [asyncio.ensure_future(pool.finds.share(find(number % 10))) for number in range(200)]
            await pool.resize(pool_limits(configuration(cluster, pool_min_conns=1, pool_max_conns=most)))
            reads += [asyncio.ensure_future(pool.finds.share(find(number % 10))) for number in range(200)]
            assert [found(row) for row in await asyncio.gather(*reads)] == [number % 10 for number in range(200)] * 2
            await wait_until(partial(shrunk, pool, most))


async def test_a_large_page_ends_the_line_when_it_is_idle(make_pool: MakePool, client: MongoClient[Document]) -> None:
    """libpq's buffers have grown for it and would stay so."""
    client.line.c.insert_one({"_id": 10, "s": "a", "x": b"x" * (2 << 20)})
    async with make_pool(4) as pool:
        await (await shared(pool))
        big = pool.finds.share(find(10))
        assert asyncio.isfuture(big)
        assert found(await big) == 10
        size = pool.size
        await pool.tend()
        await wait_until(lambda: pool.size < size)
        assert found(await (await shared(pool, 2))) == 2

"""Small writes that share connections and flushes, on a real server: what they wait for, and that each is made once."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from functools import partial
from typing import Any, cast

import psycopg
import pytest
from bson import decode, encode
from pymongo import MongoClient

from dev.cluster import Cluster, wait_for
from pg_ferret.engine import calls
from pg_ferret.engine.backend import Backend
from pg_ferret.engine.limits import conninfo, pool_limits
from pg_ferret.engine.lines import Shared
from pg_ferret.engine.pipeline import Row
from pg_ferret.engine.pool import Pool
from pg_ferret.engine.sqlstate import CANCELLED
from pg_ferret.errors import EngineError, EngineLostError
from pg_ferret.runner import Waiter
from tests.integration.conftest import NewCluster, configuration
from tests.integration.pools import MakePool, active, opened_pool, table_of
from tests.turns import PATIENCE_SECONDS, wait_until

Document = dict[str, Any]
_SHAPE = 1


@pytest.fixture
def make_pool(cluster: Cluster, client: MongoClient[Document]) -> MakePool:
    """A worker's pool, with at most so many connections; a collection ``w`` of a hundred counters."""
    client.line.w.drop()
    client.line.w.insert_many([{"_id": number, "n": 0} for number in range(100)])
    return partial(opened_pool, cluster)


def increment(number: int, where: Document | None = None, **more: object) -> Shared:
    """An update of one counter, if it is as ``where`` says; all have the same shape."""
    body = encode({"update": "w", "ordered": True, "$db": "line"} | more)
    statement = encode({"q": {"_id": number} | (where or {}), "u": {"$inc": {"n": 1}}})
    return Shared(calls.UPDATE, (b"line", body, statement, calls.TRUE), b"line.w", _SHAPE)


def modified(row: Row) -> int:
    """How many documents an update has changed."""
    assert row[0] is not None
    return int(decode(row[0])["nModified"])


async def lines(pool: Pool, count: int = 1) -> None:
    """Writes of many clients, until they share so many lines."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        flushes = bool(count) and pool._commits.apart
        while len(pool.writes.all) < count or pool.writes.busy or flushes > (pool._commits.backend is not None):
            await asyncio.gather(*[pool.writes.share(increment(99)) for _ in range(20)])


async def replaced(pool: Pool, flusher: Backend) -> None:
    """Another connection, or none, is the one that flushes."""
    await wait_until(lambda: flusher is not pool._commits.backend)


async def in_line(pool: Pool, *numbers: int) -> list[Waiter[Row]]:
    """Writes that stand in line, as soon as it takes any: on a busy machine the last ones may just have been slow."""
    (line, *_) = pool.writes.all
    await wait_until(lambda: line.takes(_SHAPE))
    return [line.add(increment(number)) for number in numbers]


@pytest.mark.parametrize(
    ("connections", "processors", "count"),
    [(1, 2, 0), (4, 2, 0), (7, 2, 0), (8, 2, 1), (10, 2, 2), (40, 2, 2), (5, 1, 0), (6, 1, 1), (40, 1, 1)],
)
async def test_as_many_lines_as_there_is_room_for_and_every_write_once(
    make_pool: MakePool, client: MongoClient[Document], connections: int, processors: int, count: int
) -> None:
    async with make_pool(connections, processors) as pool:
        await lines(pool, count)
        for _ in range(5):
            rows = await asyncio.gather(*[pool.writes.share(increment(number % 50)) for number in range(200)])
            assert [modified(row) for row in rows] == [1] * 200
            assert pool.size <= connections
            assert len(pool.writes.all) <= count
            assert (count and processors > 1) or pool._commits.backend is None
    assert [row["n"] for row in client.line.w.find({"_id": {"$lt": 50}})] == [20] * 50


@pytest.mark.parametrize("processors", [1, 2])
async def test_a_rush_is_forgotten_when_nobody_has_written_for_long(make_pool: MakePool, processors: int) -> None:
    async with make_pool(20, processors) as pool:
        await lines(pool)
        assert pool._crowded()
        for _ in range(200):
            await pool.tend()
        await wait_until(lambda: not pool.writes.all and pool._commits.backend is None)
        assert modified(await pool.writes.share(increment(1))) == 1
        assert not pool._duties.wanted and pool._commits.backend is None


async def test_a_write_that_is_refused_harms_no_other(make_pool: MakePool) -> None:
    async with make_pool(20) as pool:
        await lines(pool)
        (line, *_) = pool.writes.all
        broken = Shared(calls.UPDATE, (b"line", b"no BSON", b"", calls.TRUE), b"line.w", _SHAPE)
        first, refused, last = (line.add(write) for write in (increment(1), broken, increment(2)))
        assert (modified(await first), modified(await last)) == (1, 1)
        with pytest.raises(EngineError):
            await refused


async def test_who_waits_for_a_row_waits_apart(
    cluster: Cluster, make_pool: MakePool, client: MongoClient[Document]
) -> None:
    async with make_pool(20) as pool:
        await lines(pool)
        async with await psycopg.AsyncConnection.connect(conninfo(configuration(cluster))) as blocker:
            await blocker.execute(f"select from {table_of(cluster, 'w')} for update")
            waiting = await in_line(pool, 1)
            await wait_until(lambda: len(active(cluster)) == 1)
            body = encode({"insert": "other", "ordered": True, "$db": "line"})
            insert = Shared(calls.INSERT, (b"line", body, encode({"_id": 1}), calls.TRUE), b"line.other", _SHAPE)
            client.line.other.drop()
            async with asyncio.timeout(PATIENCE_SECONDS):
                await pool.writes.all[0].add(insert)
            await wait_until(lambda: not pool.writes.busy)
            assert not waiting[0].done()
        assert modified(await waiting[0]) == 1
    assert client.line.w.find_one(1) == {"_id": 1, "n": 1}


async def test_a_time_limit_that_passes_in_line_refuses_its_write_only(cluster: Cluster, make_pool: MakePool) -> None:
    async with make_pool(20) as pool:
        await lines(pool)
        (line, *_) = pool.writes.all
        async with await psycopg.AsyncConnection.connect(conninfo(configuration(cluster))) as blocker:
            await blocker.execute(
                f"select from {table_of(cluster, 'w')}"
                ' where object_id operator(documentdb_core.=) \'{"": {"$numberInt": "1"}}\'::documentdb_core.bson'
                " for update"
            )
            limited, *others = [line.add(increment(number, maxTimeMS=20)) for number in range(1, 10)]
            async with asyncio.timeout(PATIENCE_SECONDS):
                assert [modified(row) for row in await asyncio.gather(*others)] == [1] * 8
                with pytest.raises(EngineError) as refused:
                    await limited
                assert refused.value.sqlstate == CANCELLED
            assert not active(cluster)


async def test_what_holds_up_the_line_is_made_apart(
    cluster: Cluster, make_pool: MakePool, client: MongoClient[Document]
) -> None:
    table = table_of(cluster, "w")
    cluster.psql(
        "create function public.hold() returns trigger language plpgsql as"
        " $$begin perform pg_sleep(1); return new; end$$"
    )
    async with make_pool(20) as pool:
        await lines(pool)
        condition = (
            'when (old.object_id operator(documentdb_core.=) \'{"": {"$numberInt": "5"}}\'::documentdb_core.bson)'
        )
        cluster.psql(
            f"create trigger hold before update on {table} for each row {condition} execute function public.hold()"
        )
        held, *others = await in_line(pool, 5, *range(10, 20))
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert [modified(row) for row in await asyncio.gather(*others)] == [1] * 10
            assert not held.done()
            assert modified(await held) == 1
    cluster.psql(f"drop trigger hold on {table}")
    cluster.psql("drop function public.hold()")
    assert [row["n"] for row in client.line.w.find({"_id": {"$in": [5, *range(10, 20)]}})] == [1] * 11


async def test_fewer_connections_end_the_lines_and_no_write(cluster: Cluster, make_pool: MakePool) -> None:
    async with make_pool(20) as pool:
        await lines(pool, 2)
        writes = [asyncio.ensure_future(pool.writes.share(increment(number % 50))) for number in range(200)]
        await asyncio.sleep(0)
        config = configuration(cluster, pool_min_conns=1, pool_max_conns=3)
        await pool.resize(pool_limits(config))
        assert [modified(row) for row in await asyncio.gather(*writes)] == [1] * 200
        await wait_until(lambda: not pool.writes.all and pool._commits.backend is None)


async def test_writes_survive_the_end_of_the_connection_that_flushes(
    cluster: Cluster, make_pool: MakePool, client: MongoClient[Document]
) -> None:
    async with make_pool(20) as pool:
        await lines(pool)
        for _ in range(5):
            flusher = pool._commits.backend
            assert flusher is not None
            writes = [asyncio.ensure_future(pool.writes.share(increment(number))) for number in range(50)]
            await asyncio.sleep(0)
            await asyncio.to_thread(cluster.psql, f"select pg_terminate_backend({flusher.pid})")
            assert [modified(row) for row in await asyncio.gather(*writes)] == [1] * 50
            await replaced(pool, flusher)
            await lines(pool)
    assert [row["n"] for row in client.line.w.find({"_id": {"$lt": 50}})] == [5] * 50


async def test_writes_in_line_go_on_when_the_worker_gets_another_processor_or_loses_it(
    cluster: Cluster, make_pool: MakePool, client: MongoClient[Document]
) -> None:
    async with make_pool(20, 1) as pool:
        await lines(pool)
        for number, processors in enumerate([2, 1, 2, 1]):
            writes = [asyncio.ensure_future(pool.writes.share(increment(number % 50))) for number in range(200)]
            config = configuration(cluster, pool_min_conns=1, pool_max_conns=20)
            await pool.resize(replace(pool_limits(config), processors=processors))
            async with asyncio.timeout(PATIENCE_SECONDS):
                assert [modified(row) for row in await asyncio.gather(*writes)] == [1] * 200
            await lines(pool)
            assert (pool._commits.backend is not None) == (processors == 2)
            assert [row["n"] for row in client.line.w.find({"_id": {"$lt": 50}})] == [4 * (number + 1)] * 50


async def test_a_flush_in_line_that_is_cancelled_tells_nobody(new_cluster: NewCluster) -> None:
    cluster = new_cluster()
    with MongoClient[Document](cluster.uri) as client:
        client.line.w.insert_many([{"_id": number, "n": 0} for number in range(100)])

    async with opened_pool(cluster, 20, 1) as pool:
        await lines(pool)
        (line,) = pool.writes.all

        async def waiting_for_standby() -> set[int]:
            rows = await asyncio.to_thread(
                cluster.psql, "select pid from pg_stat_activity where wait_event = 'SyncRep'"
            )
            return {int(row[0] or 0) for row in rows} & {line.pid, *[backend.pid for backend in pool._all]}

        cluster.configure(synchronous_standby_names="nobody")
        writes: list[Waiter[Row]] = []
        async with asyncio.timeout(PATIENCE_SECONDS):
            while line.pid not in await waiting_for_standby():  # PostgreSQL needs a moment to know that there is one
                write = cast(asyncio.Future[Row], line.add(increment(0)))
                await asyncio.wait([write], timeout=0.05)
            writes += [line.add(increment(number)) for number in (1, 2)]
            while line.pid in (waiting := await waiting_for_standby()) or not waiting:
                await asyncio.to_thread(cluster.psql, f"select pg_cancel_backend({line.pid})")
            assert not any(write.done() for write in writes)
            cluster.configure(synchronous_standby_names="")
            assert [modified(row) for row in await asyncio.gather(*writes)] == [1] * 2


async def test_writes_survive_that_the_flush_in_their_line_is_cancelled(
    cluster: Cluster, make_pool: MakePool, client: MongoClient[Document]
) -> None:
    async with make_pool(20, 1) as pool:
        await lines(pool)
        (line,) = pool.writes.all
        done = asyncio.Event()

        async def cancel() -> None:
            while not done.is_set():
                await asyncio.to_thread(cluster.psql, f"select pg_cancel_backend({line.pid})")

        canceller = asyncio.create_task(cancel())
        for _ in range(10):
            rows = await asyncio.gather(*[pool.writes.share(increment(number)) for number in range(50)])
            assert [modified(row) for row in rows] == [1] * 50
        done.set()
        await canceller
    assert [row["n"] for row in client.line.w.find({"_id": {"$lt": 50}})] == [10] * 50


async def test_a_document_is_found_by_a_plan_that_is_made_once(new_cluster: NewCluster) -> None:
    # Without statistics PostgreSQL takes the plan for any _id for dear.
    explaining = {"auto_explain.log_min_duration": "0", "auto_explain.log_nested_statements": "on"}
    cluster = new_cluster(session_preload_libraries="auto_explain", autovacuum="off", **explaining)
    with MongoClient[Document](cluster.uri) as client:
        client.line.w.insert_many([{"_id": number, "n": 0} for number in range(2000)])
    async with opened_pool(cluster, 12) as pool:
        for _ in range(20):  # those that become lines have found it so before
            await asyncio.gather(*[pool.call(calls.UPDATE, increment(number).params) for number in range(12)])
        await lines(pool)
        planned_once = 0
        async with asyncio.timeout(PATIENCE_SECONDS):
            while planned_once < 20:  # it takes PostgreSQL some plans to know
                before = len(cluster.log)
                assert [modified(await write) for write in await in_line(pool, *range(20))] == [1] * 20
                planned_once = cluster.log[before:].count("Index Cond: ((shard_key_value = $")


@pytest.mark.parametrize(
    "kind", ["update", "update multi", "delete", "delete all", "findAndModify update", "findAndModify remove"]
)
async def test_a_filter_beside_the_id_counts_in_a_line(make_pool: MakePool, kind: str) -> None:
    def write(number: int, where: Document) -> Shared:
        query = {"_id": number} | where
        change = {"u": {"$inc": {"n": 1}}, "multi": "multi" in kind}
        if kind.startswith("find"):
            done = {"remove": True} if "remove" in kind else {"update": change["u"]}
            body = encode({"findAndModify": "w", "query": query, "$db": "line"} | done)
            return Shared(calls.FIND_AND_MODIFY, (b"line", body, calls.TRUE), b"line.w", _SHAPE)
        name = kind.split(maxsplit=1)[0]
        call = calls.UPDATE if name == "update" else calls.DELETE
        statement = encode({"q": query} | (change if name == "update" else {"limit": int("all" not in kind)}))
        return Shared(call, (b"line", encode({name: "w", "$db": "line"}), statement, calls.TRUE), b"line.w", _SHAPE)

    def hit(row: Row) -> int:
        assert row[0] is not None
        reply = decode(row[0])
        return int(reply["lastErrorObject"]["n"] if kind.startswith("find") else reply["n"])

    async with make_pool(20) as pool:
        await lines(pool)
        for index, line in enumerate(pool.writes.all):
            numbers = range(40 * index, 40 * index + 40)
            writes = [line.add(write(number, {"n": -1})) for number in numbers]
            writes += [line.add(write(number, {"n": {"$gte": 0}})) for number in numbers]
            assert [hit(row) for row in await asyncio.gather(*writes)] == [0] * 40 + [1] * 40


def test_a_plan_cache_mode_of_the_server_changes_no_result(new_cluster: NewCluster) -> None:
    cluster = new_cluster(plan_cache_mode="force_generic_plan")
    with MongoClient[Document](cluster.uri) as client:
        client.line.w.insert_one({"_id": 1, "n": 0})
        for number in range(10):
            where = {"_id": 1, "n": number}
            assert client.line.w.update_one(where, {"$inc": {"n": 1}}).modified_count == 1


@pytest.mark.parametrize("processors", [1, 2])
async def test_what_is_acknowledged_survives_a_crash(new_cluster: NewCluster, processors: int) -> None:
    # PostgreSQL flushes by itself only after ten seconds: what nobody asked for is lost.
    cluster = new_cluster(wal_writer_delay="10s", wal_writer_flush_after="1GB")
    acknowledged: set[str] = set()
    crashed = asyncio.Event()

    async def write(pool: Pool, writer: int) -> None:
        number = 0
        body = encode({"insert": "w", "ordered": True, "$db": "line"})
        while not crashed.is_set():
            key = f"{writer}-{number}"
            number += 1
            params = (b"line", body, encode({"_id": key}), calls.TRUE)
            try:
                await pool.writes.share(Shared(calls.INSERT, params, b"line.w", _SHAPE))
            except (EngineError, EngineLostError):
                break
            acknowledged.add(key)

    with MongoClient[Document](cluster.uri) as client:
        client.line.w.insert_one({"_id": "first"})
    async with opened_pool(cluster, 30, processors) as pool:
        writers = asyncio.gather(*[write(pool, writer) for writer in range(32)])
        await wait_until(lambda: len(acknowledged) > 3000)
        assert pool.writes.all
        assert (pool._commits.backend is None) == (processors == 1)
        await asyncio.to_thread(cluster.stop, "immediate")
        crashed.set()
        # Those who have not been answered are not answered by a server that knows nothing of them.
        await asyncio.to_thread(cluster.start)
        async with asyncio.timeout(PATIENCE_SECONDS):
            await writers
    with MongoClient[Document](cluster.uri) as client:
        there = {row["_id"] for row in client.line.w.find()}
    assert not acknowledged - there


def test_a_flush_that_is_cancelled_confirms_nothing(new_cluster: NewCluster) -> None:
    cluster = new_cluster()
    cluster.configure(synchronous_standby_names="nobody")
    with psycopg.connect(conninfo(configuration(cluster)), autocommit=True) as connection:
        (incarnation,) = connection.execute("select ferretdb.commit_unflushed(true)").fetchone() or ()
        flush = f"select ferretdb.flush_commits({incarnation})"
        connection.execute("set statement_timeout = 100")

        def refused() -> bool:
            try:
                connection.execute(flush)  # PostgreSQL needs a moment to know that there is a standby
            except psycopg.errors.QueryCanceled as error:
                return "before a standby has confirmed" in str(error)
            return False

        wait_for(refused)
        connection.execute("set synchronous_commit = local")
        connection.execute(flush)


def test_commits_without_a_flush(cluster: Cluster) -> None:
    with psycopg.connect(conninfo(configuration(cluster)), autocommit=True) as connection:

        def ask(sql: str) -> object:
            (answer,) = connection.execute(sql).fetchone() or ()
            return answer

        # For one transaction only, and if the DBA has not decided so for all of them.
        with connection.transaction():
            incarnation = ask("select ferretdb.commit_unflushed(true)")
            assert isinstance(incarnation, int)
            assert ask("show synchronous_commit") == "off"
        assert ask("show synchronous_commit") == "on"
        assert ask("select ferretdb.commit_unflushed(false)") is None
        connection.execute("set synchronous_commit = off")
        assert ask("select ferretdb.commit_unflushed(true)") is None
        # Nothing is on disk yet, unless PostgreSQL's own process has just been there.
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            connection.execute("create table if not exists public.made (n int)")
            connection.execute("insert into public.made values (1)")
            made = ask("select pg_current_wal_insert_lsn()")
            if not ask(f"select pg_current_wal_flush_lsn() >= '{made}'"):
                break
            assert time.monotonic() < deadline
        connection.execute(f"select ferretdb.flush_commits({incarnation})")
        assert ask(f"select pg_current_wal_flush_lsn() >= '{made}'")
        connection.execute("drop table public.made")
        with pytest.raises(psycopg.errors.CrashShutdown, match="restarted before the write was flushed"):
            connection.execute("select ferretdb.flush_commits(1)")

"""A worker's pool in the test's own process, and who waits for whom in PostgreSQL."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace

import psycopg

from dev.cluster import Cluster
from pg_ferret.engine.limits import conninfo, pool_limits
from pg_ferret.engine.pool import Pool
from tests.integration.conftest import configuration

MakePool = Callable[..., AbstractAsyncContextManager[Pool]]


@asynccontextmanager
async def opened_pool(cluster: Cluster, most: int, processors: int = 2) -> AsyncIterator[Pool]:
    """A pool with at most so many connections, as if the worker had so many processors."""
    config = configuration(cluster, pool_min_conns=1, pool_max_conns=most)
    limits = replace(pool_limits(config), processors=processors)
    pool = Pool(conninfo(config), limits, lambda _: None, lambda _, __: None)
    await pool.open()
    try:
        yield pool
    finally:
        await pool.close()


def active(cluster: Cluster) -> list[str | None]:
    """The process ids of connections of the gateway that wait for a lock."""
    sql = "select pid from pg_stat_activity where wait_event_type = 'Lock' and application_name = 'pg_ferret'"
    return [row[0] for row in cluster.psql(sql)]


def table_of(cluster: Cluster, collection: str, database: str = "line") -> str:
    """The table of a collection."""
    number = cluster.psql(
        "select collection_id from documentdb_api_catalog.collections"
        f" where database_name = '{database}' and collection_name = '{collection}'"
    )[0][0]
    return f"documentdb_data.documents_{number}"


@asynccontextmanager
async def locked(cluster: Cluster) -> AsyncIterator[None]:
    """Nobody can read collection ``d``."""
    table = table_of(cluster, "d")
    async with await psycopg.AsyncConnection.connect(conninfo(configuration(cluster))) as blocker:
        await blocker.execute(f"lock table {table} in access exclusive mode")
        yield

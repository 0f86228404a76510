"""Clients' connections in this very process, and the pool behind them."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from dev.cluster import Cluster
from pg_ferret.connection import Connection
from pg_ferret.engine.limits import conninfo, pool_limits
from pg_ferret.engine.pool import Pool
from pg_ferret.state.client import Client, Services
from pg_ferret.state.cursors import Cursors
from pg_ferret.status import StatusTable
from tests.integration.conftest import configuration


def among_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a client's requests share, as if there were many others."""
    monkeypatch.setattr("pg_ferret.engine.shared._CROWD", 0.0)
    monkeypatch.setattr("pg_ferret.engine.duties._CROWD", 0)
    monkeypatch.setattr("pg_ferret.engine.duties._NO_CROWD", -1)


@asynccontextmanager
async def serve(
    cluster: Cluster, transports: Sequence[asyncio.Transport], connections: int
) -> AsyncIterator[list[Connection]]:
    """The connections that have these transports; at most so many to PostgreSQL serve them."""
    config = configuration(cluster, pool_min_conns=2, pool_max_conns=connections)
    pool = Pool(conninfo(config), pool_limits(config), pytest.fail, pytest.fail)
    with tempfile.TemporaryDirectory() as place:
        services = Services(config, pool, Cursors(Path(place)), StatusTable(2), 1)
        found = []
        for number, transport in enumerate(transports, 1):
            connection = Connection(Client(services, number, "peer"), asyncio.get_running_loop(), lambda _: None)
            connection.connection_made(transport)
            found.append(connection)
        await pool.open()
        try:
            yield found
        finally:
            await pool.close()
            services.cursors.close()

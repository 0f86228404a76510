"""Where connections to PostgreSQL come from and go to.

psycopg_pool opens, checks, backs off and replaces them; the pool leases them for as long as they are of use.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Final, NamedTuple

import psycopg
import psycopg_pool
import structlog

from pg_ferret.engine.limits import Limits
from pg_ferret.engine.pipeline import Pipeline, Session

# psycopg_pool tries again after one second, then after two, after four …: rather begin anew, so that the service is
# back within a second of PostgreSQL.
_CONNECT_SECONDS: Final = 2.0
_GIVEN_BACK_SECONDS: Final = 1.0
_log = structlog.get_logger()


class Tenant(NamedTuple):
    """Who leases them."""

    spawn: Callable[[Coroutine[None, None, None]], object]  # have work done beside what is under way
    arrived: Callable[[Session], None]  # here is a connection that was asked for
    failed: Callable[[], None]  # one was not to be had
    trouble: Callable[[str], None]  # PostgreSQL cannot be reached, to be told once


class Source:
    """The worker's."""

    __slots__ = ("_pool", "_reachable", "_tenant", "coming", "opened")

    def __init__(self, conninfo: str, limits: Limits, tenant: Tenant) -> None:
        self._tenant = tenant
        self._reachable = True
        self.opened = False  # connections may be asked for
        self.coming = 0  # that have been asked for and are not there yet
        self._pool = psycopg_pool.AsyncConnectionPool(
            conninfo,
            connection_class=Session,
            min_size=limits.smallest,
            max_size=_most(limits),
            kwargs={"autocommit": True},
            open=False,
            reconnect_timeout=_CONNECT_SECONDS,
            timeout=_CONNECT_SECONDS * 1.25,
            # What is idle there has been given back: psycopg_pool closes one connection each time.
            max_idle=_GIVEN_BACK_SECONDS,
        )

    async def open(self) -> None:
        """Start connecting; returns at once."""
        self.opened = True
        await self._pool.open(wait=False)

    async def close(self) -> None:
        """To be called when all connections have been given back."""
        await self._pool.close()

    async def resize(self, limits: Limits, more: int) -> None:
        """Live under new limits; psycopg_pool counts so many ``more`` that are of no use to us."""
        await self._pool.resize(limits.smallest, _most(limits) + more)

    def ask(self) -> None:
        """For one more connection."""
        self.coming += 1
        self._tenant.spawn(self._lease())

    async def _lease(self) -> None:
        try:
            connection = await self._pool.getconn()
        except (psycopg_pool.PoolTimeout, psycopg.Error):
            self.coming -= 1
            if self._reachable:  # psycopg_pool logs the reason
                self._reachable = False
                self._tenant.trouble("cannot connect to PostgreSQL; its log tells why")
            self._tenant.failed()
            return
        except asyncio.CancelledError:
            self.coming -= 1
            raise
        self.coming -= 1
        if not self._reachable:
            self._reachable = True
            _log.info("connected to PostgreSQL again")
        self._tenant.arrived(connection)

    async def put_back(self, pipeline: Pipeline) -> None:
        """Return a connection that is off the loop; psycopg_pool replaces it if it is closed."""
        usable = not (pipeline.lost or pipeline.swollen or pipeline.spent)
        if not (usable and pipeline.leave_pipeline()):
            await pipeline.connection.close()
        await self._pool.putconn(pipeline.connection)


def _most(limits: Limits) -> int:
    return max(limits.largest, limits.smallest, 1)

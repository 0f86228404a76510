"""What has to be done now and then for all workers, by one of them.

DocumentDB leaves these jobs to pg_cron; here whichever worker holds the lock does them, so that they also run where
pg_cron cannot connect.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from collections.abc import Coroutine
from pathlib import Path

import structlog

from pg_ferret.commands.cursors import end
from pg_ferret.engine import calls
from pg_ferret.errors import CommandError, EngineError, EngineLostError
from pg_ferret.state.client import Services

_TTL_SECONDS = 60.0
_LONGEST_PAUSE = 15.0
_log = structlog.get_logger()


class Housekeeper:
    """A task of every worker; the kernel frees the lock of one that dies, and the next one goes on."""

    def __init__(self, services: Services, place: Path) -> None:
        self._services = services
        self._rows_expired_at = 0.0
        self._expiring: asyncio.Task[None] | None = None
        self._lock = os.open(place / "housekeeper", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def close(self) -> None:
        """Give up the lock."""
        os.close(self._lock)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self._pause())
            if self._mine() and self._services.config.server.documentdb is not None:
                # Documents that are past their time may take long to delete: cursors must not wait for that.
                if self._expiring is None or self._expiring.done():
                    self._expiring = asyncio.get_running_loop().create_task(self._try(self._expire_rows()))
                await self._try(self._tidy())

    async def _try(self, work: Coroutine[None, None, None]) -> None:
        """Whatever goes wrong, there is a next time: without this task no cursor would expire any more."""
        try:
            await work
        except (CommandError, EngineError, EngineLostError) as error:
            _log.warning("housekeeping failed and will be tried again", error=str(error))
        except Exception:
            _log.exception("housekeeping failed unexpectedly and will be tried again")

    def _pause(self) -> float:
        """Expired cursors linger for at most a quarter of their time."""
        return float(min(self._services.config.settings.cursor_timeout / 4000, _LONGEST_PAUSE))

    def _mine(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    async def _tidy(self) -> None:
        services = self._services
        position: bytes | None = b""
        while position is not None:
            expired, position = services.cursors.expired(position)
            if expired:
                await end(expired, services)
                _log.debug("cursors expired", cursors=len(expired))
            await asyncio.sleep(0)
        await self._remove_orphans()

    async def _expire_rows(self) -> None:
        services = self._services
        now = time.monotonic()
        if now - self._rows_expired_at >= _TTL_SECONDS and not services.config.server.in_recovery:
            self._rows_expired_at = now
            await services.engine.call(calls.DELETE_EXPIRED_ROWS, ())

    async def _remove_orphans(self) -> None:
        """Files of cursors that are in no registry: their worker died or their client went before."""
        services = self._services
        idle = str(services.config.settings.cursor_timeout / 1000).encode()
        (found,) = await services.engine.call(calls.IDLE_CURSOR_FILES, (idle,))
        orphans = [number for number in map(int, (found or b"").split()) if not services.cursors.known(number)]
        if orphans:
            await services.engine.call(calls.DELETE_CURSORS, (calls.id_array(orphans),))
            _log.debug("cursor files without a cursor removed", files=len(orphans))

"""Writes that PostgreSQL has rolled back because of others are made again, as MongoDB does outside transactions."""

from __future__ import annotations

import asyncio
import math
import random
import time
from typing import Final
from weakref import WeakValueDictionary

import structlog

from pg_ferret.commands.arguments import namespace_text
from pg_ferret.engine.calls import Call
from pg_ferret.engine.pipeline import Params, Row
from pg_ferret.engine.sqlstate import CONFLICTS
from pg_ferret.errors import CommandError, EngineError
from pg_ferret.state.client import Client
from pg_ferret.wire.message import Request

_log = structlog.get_logger()
_MOST_TRIES: Final = 10
# Seconds before the next try: by chance, at most so many, twice as many each time, and never more than the second.
_FIRST_PAUSE: Final = 0.01
_LONGEST_PAUSE: Final = 0.5
# Of each namespace one write at a time is made again: otherwise those that were in a deadlock meet again.
_turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()


async def repeat(error: EngineError, call: Call, params: Params, request: Request, client: Client) -> Row:
    """Make a write again that has failed.

    Raises the error if it is none that may end this way, or when it has been enough; CommandError when maxTimeMS has
    gone by since the first failure.
    """
    if error.sqlstate not in CONFLICTS:
        raise error
    namespace = namespace_text(request)
    limit = (request.integer(b"maxTimeMS") or 0) / 1000 or math.inf
    deadline = time.monotonic() + limit
    _log.info("a write that PostgreSQL rolled back is made again", namespace=namespace, error=str(error))
    async with _turns.setdefault(namespace, asyncio.Lock()):
        for number in range(_MOST_TRIES):
            await asyncio.sleep(random.random() * min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**number))
            if time.monotonic() > deadline:
                raise CommandError(50, "operation exceeded time limit")
            try:
                return await client.services.engine.write(call, params)
            except EngineError as another:
                if another.sqlstate not in CONFLICTS:
                    raise
                error = another.with_traceback(None)  # which holds this frame, and the write
    _log.warning("a write was rolled back each time", namespace=namespace, times=_MOST_TRIES + 1)
    raise error

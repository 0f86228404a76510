"""Upserts that have lost a race are made again, as MongoDB does (manual, "Upsert with Unique Index").

Two clients look for a document by the fields of a unique index, neither finds it, both store it, and the second one
fails.  Once more, it finds the document that the first one has stored.  Of several statements in one command the engine
itself makes each again when the first pass fails; here it is about those that come alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

import structlog

from pg_ferret.commands import documents, retries
from pg_ferret.commands.duplicates import Keys
from pg_ferret.commands.statements import Statement, Statements
from pg_ferret.engine import calls, sqlstate
from pg_ferret.engine.pipeline import Params
from pg_ferret.errors import EngineError
from pg_ferret.state.client import Client
from pg_ferret.wire.message import Request

_log = structlog.get_logger()
# The document could go and come again in between; what fails so often collides with another one.
MOST_TRIES: Final = 3


async def lost_race(message: str, statement: Callable[[], Statement], keys: Keys) -> bool:
    """Whether a duplicate key means only that somebody else was quicker."""
    try:
        made = statement()
        index = await keys.index(message) if made.upsert and not made.multi else None
        return index is not None and made.raced(index)
    except Exception as error:  # the duplicate key is what there is to be told
        _log.warning("a duplicate key could not be looked into", error=type(error).__name__)
        return False


async def settle(reply: bytes, params: Params, request: Request, client: Client) -> tuple[bytes, bool]:
    """The reply of a failed update command, made again if it is one upsert that has lost a race; whether all is well.

    Nothing has been written before, so that nothing is lost if that fails in another way.
    """
    written = Statements(request, b"updates")
    if len(written) != 1:
        return reply, False
    keys = Keys.of(request, client)
    for _ in range(MOST_TRIES):
        (error, *_) = documents.decode(reply).get("writeErrors") or [{"code": 0, "errmsg": ""}]
        code, message = sqlstate.unpack(error["code"], error["errmsg"])
        if code != sqlstate.DUPLICATE_KEY or not await lost_race(message, partial(written.__getitem__, 0), keys):
            break
        try:
            again, success, _ = await client.services.engine.write(calls.UPDATE, params)
        except EngineError as conflict:
            again, success, _ = await retries.repeat(conflict, calls.UPDATE, params, request, client)
        assert again is not None
        reply = again
        if success == b"\x01":
            return reply, True
    return reply, False

"""The cold path of writes: the engine's writeErrors in MongoDB's words."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import structlog
from bson import encode

from pg_ferret.commands import documents
from pg_ferret.commands.duplicates import Keys
from pg_ferret.commands.statements import Statement, Statements
from pg_ferret.engine import sqlstate
from pg_ferret.errors import CommandError, EngineError
from pg_ferret.state.client import Client
from pg_ferret.wire.message import Request

_log = structlog.get_logger()
# Beyond so many characters of explanations, an error is told by its code alone, as MongoDB does: a reply is bounded.
_MOST_TEXT = 1 << 20
# So many errors are explained before other clients have a turn.
_TURN = 200


async def rebuild(reply: bytes, statements: bytes, request: Request, client: Client) -> bytes:
    """The reply with its writeErrors as MongoDB gives them.

    Raises CommandError when one of them concerns the whole command.
    """
    document = documents.decode(reply)
    keys = Keys.of(request, client)
    written = Statements(request, statements)
    errors = []
    told = 0
    for number, entry in enumerate(document.get("writeErrors", ())):
        code, message = sqlstate.unpack(entry["code"], entry["errmsg"])
        if code in sqlstate.TROUBLE:
            _log.error("the engine failed in a write", code=code, sqlstate=sqlstate.packed(entry["code"]))
            client.services.trouble(f"{request.name.decode()}: {message}")
        if code in sqlstate.WHOLE_COMMAND:
            raise CommandError(code, message)
        error = {"index": entry["index"], "code": code, "errmsg": message if told < _MOST_TEXT else ""}
        if code == sqlstate.DUPLICATE_KEY and told < _MOST_TEXT:
            error |= await _description(keys, message, partial(written.__getitem__, entry["index"]))
        told += len(error["errmsg"])
        errors.append(error)
        if number % _TURN == _TURN - 1:
            await asyncio.sleep(0)
    return encode(document | {"writeErrors": errors, "ok": 1.0})


async def _description(keys: Keys, message: str, statement: Callable[[], Statement] | None) -> dict[str, Any]:
    """What more there is to say of a duplicate key.

    Nothing if that fails: it must be told all the same, and what else was written be acknowledged.
    """
    try:
        return await keys.describe(message, statement() if statement else None) or {}
    except Exception as error:
        _log.warning("a duplicate key could not be described", error=type(error).__name__)
        return {}


async def explained(
    error: EngineError, statement: Callable[[], Statement] | None, keys: Keys
) -> CommandError | EngineError:
    """The error of a whole command, with a duplicate key in MongoDB's words."""
    code, message = sqlstate.translate(error.sqlstate, error.message)
    described = await _description(keys, message, statement) if code == sqlstate.DUPLICATE_KEY else {}
    if not described:
        return error
    text = described.pop("errmsg")
    return CommandError(code, text, details=encode(described)[4:-1])

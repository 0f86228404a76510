"""From a frame to the frame that answers it: lookup, gates, and the only place where exceptions become replies."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import replace
from functools import partial

import structlog

import pg_ferret.commands  # noqa: F401  (fills the registry)
from pg_ferret import codes
from pg_ferret.commands.arguments import timeout
from pg_ferret.commands.concerns import check_concerns
from pg_ferret.commands.stable_api import check_api
from pg_ferret.engine.sqlstate import TROUBLE, command_error
from pg_ferret.errors import CommandError, EngineError, EngineLostError, ProtocolError
from pg_ferret.registry import COMMANDS, MISSING, Command, Handler
from pg_ferret.runner import let_go
from pg_ferret.state.client import Client
from pg_ferret.wire import bson
from pg_ferret.wire.message import Request, parse, reply, reply_head

_log = structlog.get_logger()
_GATED = frozenset((b"startTransaction", b"autocommit", b"txnNumber"))
_AUTHENTICATION = frozenset((b"authenticate", b"getnonce", b"logout", b"saslContinue", b"saslStart"))
_LEGACY_COMMANDS = frozenset((b"hello", b"isMaster", b"ismaster"))


async def respond(frame: bytes, client: Client) -> bytes | list[bytes] | None:
    """The frame that answers ``frame``, perhaps in parts, or None when the client wants none.

    Raises ProtocolError when the bytes cannot be answered.
    """
    counters = client.services.counters
    counters.requests += 1
    counters.in_flight += 1
    request = None
    try:
        request = parse(frame)
        memo = request.memo
        command = None if memo is None else memo.get("command")
        if command is None:
            command = _admitted(request)
            if memo is not None:
                memo["command"] = command
        document = await command.handler(request, client)
        return None if request.silent else reply(document, request.request_id, request.legacy)
    except ProtocolError:
        raise
    except Exception as error:
        document = error_document(_failure(error, request, client))
        let_go(error)
    finally:
        counters.in_flight -= 1
    counters.errors += 1
    request_id, legacy, silent = reply_head(frame)
    return None if silent else reply(document, request_id, legacy)


def _admitted(request: Request) -> Command:
    """The command that a request asks for; it depends on fields that are the same in all requests of a shape.

    Raises CommandError for an unknown one and for one that must not be run as it is.
    """
    command = COMMANDS.get(request.name)
    if command is None:
        raise _no_such_command(request.name)
    if not _GATED.isdisjoint(request.fields):
        # Never run as if it were in a transaction: MongoDB's standalone servers refuse in these words.
        raise CommandError(20, "Transaction numbers are only allowed on a replica set member or mongos")
    check_api(request, command)
    check_concerns(request)
    if request.legacy and request.name not in _LEGACY_COMMANDS:
        raise CommandError(352, f"Unsupported OP_QUERY command: {command.name}")
    if command.admin_only and request.string(b"$db") != b"admin":
        raise CommandError(13, f"{command.name} may only be run against the admin database.")
    if b"maxTimeMS" in request.fields:
        return replace(command, handler=partial(_limited, command.handler))
    return command


def _limited(handler: Handler, request: Request, client: Client) -> Awaitable[bytes]:
    """The engine would take a limit below zero for none."""
    timeout(request)
    return handler(request, client)


def _failure(error: Exception, request: Request | None, client: Client) -> CommandError:
    """What to answer; what is not the client's own mistake is logged and shown in ferretdb.status."""
    if isinstance(error, CommandError):
        return error
    name = "?" if request is None else _printable(request.name)
    if not isinstance(error, EngineError | EngineLostError):
        _log.exception("a command failed unexpectedly", command=name, exc_info=error)
        client.services.trouble(f"{name}: {type(error).__name__}, see PostgreSQL's log")
        return CommandError(1, "internal error; see PostgreSQL's log")
    failure = command_error(error)
    if failure.code == 1:
        _log.error("the engine failed", command=name, error=str(error))
    if failure.code in TROUBLE:
        client.services.trouble(f"{name}: {failure.message}")
    return failure


def describe(frame: bytes) -> str:
    """What a frame asks for, as ``find shop.orders``: the command and the namespace, never a value."""
    try:
        request = parse(frame)
    except (ProtocolError, CommandError):
        return "an unreadable request"
    target = request.string(b"collection") or request.string(request.name) or b""
    return _printable(request.name + b" " + (request.string(b"$db") or b"") + (b"." + target if target else b""))


def _no_such_command(name: bytes) -> CommandError:
    text = _printable(name)
    if name in _AUTHENTICATION:
        return CommandError(238, "pg_ferret has no authentication yet: connect without user and password")
    if name in MISSING:
        return CommandError(238, f"Command {text} is not implemented yet")
    return CommandError(59, f"no such command: '{text}'")


def _printable(name: bytes) -> str:
    return name[:128].decode("utf-8", "replace")


def error_document(error: CommandError) -> bytes:
    """The reply document of a failed command."""
    elements = [
        bson.double(b"ok", 0.0),
        bson.string(b"errmsg", error.message),
        bson.int32(b"code", error.code),
        bson.string(b"codeName", codes.name(error.code)),
        error.details,
    ]
    if error.labels:
        labels = [bson.string(b"", label)[2:] for label in error.labels]
        elements.append(bson.array(b"errorLabels", bson.STRING, labels))
    return bson.document(*elements)

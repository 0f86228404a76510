"""What drivers ask before they trust a server: hello and its kin."""

from __future__ import annotations

import sys
import time
from functools import cache

from bson import encode

import pg_ferret
from pg_ferret.commands.sessions import TIMEOUT_MINUTES
from pg_ferret.registry import command
from pg_ferret.state.client import Client
from pg_ferret.wire import bson
from pg_ferret.wire.message import MAX_DOCUMENT_BYTES, MAX_MESSAGE_BYTES, Request

# The MongoDB version whose behaviour and wire version clients may expect.
MONGODB_VERSION = (7, 0, 77)
_MAX_WIRE_VERSION = 21
# documentdb.maxWriteBatchSize: the engine refuses longer batches, so drivers must split before.
_MAX_WRITE_BATCH = 25_000

_CONSTANT = encode(
    {
        "maxBsonObjectSize": MAX_DOCUMENT_BYTES,
        "maxMessageSizeBytes": MAX_MESSAGE_BYTES,
        "maxWriteBatchSize": _MAX_WRITE_BATCH,
        "logicalSessionTimeoutMinutes": TIMEOUT_MINUTES,
        "minWireVersion": 0,
        "maxWireVersion": _MAX_WIRE_VERSION,
    }
)[4:-1]
_HELLO_OK = bson.boolean(b"helloOk", True)


@cache
def _around(primary_field: bytes, read_only: bool, hello_ok: bool) -> tuple[bytes, bytes]:
    """What precedes and what follows `_own` in a greeting."""
    head = bson.boolean(primary_field, not read_only) + (_HELLO_OK if hello_ok else b"") + _CONSTANT
    own = _own(0, 0)
    whole = bson.document(head, own, bson.boolean(b"readOnly", read_only), bson.OK)
    at = whole.index(own)
    return whole[:at], whole[at + len(own) :]


def _own(milliseconds: int, connection_id: int) -> bytes:
    """What differs from greeting to greeting, though not in length."""
    return bson.date(b"localTime", milliseconds) + bson.int32(b"connectionId", connection_id)


def _greeting(primary_field: bytes, request: Request, client: Client) -> bytes:
    read_only = client.services.config.server.in_recovery
    head, tail = _around(primary_field, read_only, request.true(b"helloOk"))
    return head + _own(time.time_ns() // 1_000_000, client.connection_id) + tail


@command("hello", help="Describes this server to a driver.")
async def hello(request: Request, client: Client) -> bytes:
    return _greeting(b"isWritablePrimary", request, client)


@command("isMaster", "ismaster", help="Describes this server to an old driver.")
async def is_master(request: Request, client: Client) -> bytes:
    return _greeting(b"ismaster", request, client)


@command("ping", help="Answers.")
async def ping(_request: Request, _client: Client) -> bytes:
    return bson.OK_REPLY


@command("buildInfo", "buildinfo", help="Returns versions.")
async def build_info(_request: Request, client: Client) -> bytes:
    server = client.services.config.server
    return encode(
        {
            "version": ".".join(map(str, MONGODB_VERSION)),
            "versionArray": [*MONGODB_VERSION, 0],
            "gitVersion": pg_ferret.__version__,
            "modules": [],
            "sysInfo": "deprecated",
            "bits": 64,
            "debug": False,
            "maxBsonObjectSize": MAX_DOCUMENT_BYTES,
            "storageEngines": ["documentdb"],
            "pg_ferret": {
                "version": pg_ferret.__version__,
                "postgresql": server.version,
                "documentdb": server.documentdb,
                "python": sys.version.split()[0],
            },
            "ok": 1.0,
        }
    )


@command("whatsmyuri", help="Returns the address of the client.")
async def whats_my_uri(_request: Request, client: Client) -> bytes:
    return bson.document(bson.string(b"you", client.peer), bson.OK)

"""What people and tools ask about the server."""

from __future__ import annotations

import json
import os
import platform
import socket
import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from bson import Int64, encode

from pg_ferret import log
from pg_ferret.commands.handshake import MONGODB_VERSION
from pg_ferret.errors import CommandError
from pg_ferret.registry import COMMANDS, command
from pg_ferret.state.client import Client
from pg_ferret.status import Kind
from pg_ferret.wire import bson
from pg_ferret.wire.message import Request

_PARAMETERS: dict[str, Any] = {
    "authenticationMechanisms": [],
    "authSchemaVersion": 5,
    "enableTestCommands": False,
    "featureCompatibilityVersion": {"version": f"{MONGODB_VERSION[0]}.{MONGODB_VERSION[1]}"},
    "quiet": False,
}


@command("listCommands", help="Lists the commands.")
async def list_commands(_request: Request, _client: Client) -> bytes:
    listed = {
        row.name: {"help": row.help, "adminOnly": row.admin_only, "requiresAuth": False} for row in COMMANDS.values()
    }
    return encode({"commands": listed, "ok": 1.0})


@command("getParameter", help="Returns server parameters.", admin_only=True)
async def get_parameter(request: Request, _client: Client) -> bytes:
    span = request.fields[request.name]
    if request.string(request.name) == b"*" or (span[0] == bson.DOCUMENT and _all_parameters(request, span)):
        return encode(_PARAMETERS | {"ok": 1.0})
    found = {name: value for name, value in _PARAMETERS.items() if name.encode() in request.fields}
    if not found:
        raise CommandError(72, "no option found to get")
    return encode(found | {"ok": 1.0})


def _all_parameters(request: Request, span: bson.Span) -> bool:
    inner = bson.scan(request.frame, span[1], span[2]).get(b"allParameters")
    return inner is not None and bson.read_bool(request.frame, inner)


@command("getLog", help="Returns the latest log lines of the worker that answers.", admin_only=True)
async def get_log(request: Request, _client: Client) -> bytes:
    name = request.string(b"getLog")
    if name == b"*":
        return encode({"names": ["global", "startupWarnings"], "ok": 1.0})
    if name == b"global":
        lines = list(log.recent)
    elif name == b"startupWarnings":
        lines = [_warning("Access control is not enabled: only local clients can connect")]
    else:
        raise CommandError(96, f"No log named '{(name or b'').decode('utf-8', 'replace')}'")
    return encode({"totalLinesWritten": len(lines), "log": lines, "ok": 1.0})


def _warning(text: str) -> str:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"t": {"$date": now}, "s": "W", "c": "CONTROL", "id": 0, "ctx": "worker", "msg": text})


@command("hostInfo", help="Describes the machine.", admin_only=True)
async def host_info(_request: Request, _client: Client) -> bytes:
    name = os.uname()
    memory_mib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    system = {
        "currentTime": datetime.now(UTC),
        "hostname": socket.gethostname(),
        "cpuAddrSize": 64,
        "memSizeMB": Int64(memory_mib),
        "memLimitMB": Int64(memory_mib),
        "numCores": os.cpu_count() or 1,
        "numCoresAvailableToProcess": len(os.sched_getaffinity(0)),
        "cpuArch": name.machine,
        "numaEnabled": False,
    }
    release = {"type": name.sysname, "name": platform.freedesktop_os_release().get("PRETTY_NAME", ""), "version": ""}
    return encode({"system": system, "os": release, "extra": {"kernelVersion": name.release}, "ok": 1.0})


@command("getCmdLineOpts", help="Returns the settings in force.", admin_only=True)
async def get_cmd_line_opts(_request: Request, client: Client) -> bytes:
    settings = asdict(client.services.config.settings)
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    named = {f"ferretdb.{name}": value for name, value in listed.items()}
    return encode({"argv": ["pg_ferret"], "parsed": {"setParameter": named}, "ok": 1.0})


@command("connectionStatus", help="Returns who is authenticated.")
async def connection_status(_request: Request, _client: Client) -> bytes:
    info: dict[str, Any] = {"authenticatedUsers": [], "authenticatedUserRoles": []}
    return encode({"authInfo": info, "ok": 1.0})


@command("serverStatus", help="Returns counters and gauges of all workers.")
async def server_status(_request: Request, client: Client) -> bytes:
    services = client.services
    workers = [slot for slot in services.status.slots if slot.get("kind") == Kind.WORKER]

    def total(name: str) -> Int64:
        return Int64(sum(slot.get(name) for slot in workers))

    supervisor = services.status[0]
    uptime = time.time() - supervisor.get("started") / 1e6
    settings, server = services.config.settings, services.config.server
    connections = total("connections")
    return encode(
        {
            "host": socket.gethostname(),
            "version": ".".join(map(str, MONGODB_VERSION)),
            "process": "pg_ferret",
            "pid": Int64(os.getpid()),
            "uptime": float(int(uptime)),
            "uptimeMillis": Int64(uptime * 1000),
            "uptimeEstimate": Int64(uptime),
            "localTime": datetime.now(UTC),
            "connections": {
                "current": connections,
                "available": Int64(max(0, settings.max_connections - connections)),
                "totalCreated": total("connections_total"),
                "active": total("in_flight"),
            },
            "network": {
                "bytesIn": total("bytes_in"),
                "bytesOut": total("bytes_out"),
                "numRequests": total("requests"),
            },
            "mem": {"bits": 64, "resident": Int64(total("rss") >> 20), "supported": True},
            "metrics": {"cursor": {"open": {"total": Int64(services.cursors.count())}}},
            "storageEngine": {"name": "documentdb", "persistent": True, "readOnly": server.in_recovery},
            "pg_ferret": {
                "workers": len(workers),
                "slot": services.slot,
                "postgresql": server.version,
                "documentdb": server.documentdb,
                "pool": {
                    "size": total("pool_size"),
                    "inUse": total("pool_in_use"),
                    "waiting": total("pool_waiting"),
                },
            },
            "ok": 1.0,
        }
    )

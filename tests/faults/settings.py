"""Every reloadable setting, changed under load: a new value, and how one sees that it is in effect."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote_plus

from bson import Int64
from pymongo import MongoClient
from pymongo.errors import OperationFailure

from dev.cluster import free_port, port_is_free
from tests.faults import raw
from tests.faults.catalogue import AWAY, CUT
from tests.faults.load import DATABASE, OPTIONS, Document, serves
from tests.faults.runner import fault
from tests.faults.stage import Stage, kill


@dataclass(frozen=True)
class Change:
    """A change of one setting; ``effect`` waits until it is seen and raises Missed if it is not."""

    name: str
    value: str
    effect: Callable[[Stage], None]
    # Whether requests of the load may be cut: the setting itself asks for it, or its effect is seen by a death.
    cuts: bool = False


CHANGES: list[Change] = []


def change(value: str, *, cuts: bool = False) -> Callable[[Callable[[Stage], None]], Callable[[Stage], None]]:
    """Enter the function that sees the effect; its name is the setting's."""

    def enter(effect: Callable[[Stage], None]) -> Callable[[Stage], None]:
        CHANGES.append(Change(effect.__name__, value, effect, cuts))
        return effect

    return enter


def apply(stage: Stage, item: Change) -> None:
    """Change the setting under load, see the effect, change it back; requests of the load must not fail."""
    before = stage.cluster.settings.get(f"ferretdb.{item.name}")
    shown = f"select setting from pg_settings where name = 'ferretdb.{item.name}'"
    old = stage.sql(shown)
    started = time.monotonic()
    stage.configure(**{item.name: _value(stage, item)})
    try:
        stage.until(lambda: stage.sql(shown) != old, "pg_settings shows it")
        item.effect(stage)
    finally:  # the next one must not suffer from it
        if before is None:
            del stage.cluster.settings[f"ferretdb.{item.name}"]
        else:
            stage.cluster.settings[f"ferretdb.{item.name}"] = before
        stage.cluster.configure()
    stage.until(stage.ready, "as before")
    failed = stage.load.failed(started)
    stage.check(item.cuts or not failed, f"ferretdb.{item.name}: requests failed: {dict(failed)}")


def _value(stage: Stage, item: Change) -> str:
    return item.value.format(port=stage.cluster.port, free=free_port(), folder=stage.cluster.socket_dir)


def _worker_settings(stage: Stage, name: str) -> set[str]:
    """The setting as the workers know it, asked through new connections until several have answered."""
    found = set()
    for _ in range(6):
        with MongoClient[Document](stage.cluster.uri, **OPTIONS) as client:
            options = client.admin.command("getCmdLineOpts")
        found.add(str(options["parsed"]["setParameter"][f"ferretdb.{name}"]))
    return found


def _until_known(stage: Stage, name: str, value: str) -> None:
    """Wait for the workers: pg_settings shows a new value some milliseconds before they are told of it."""
    stage.until(lambda: _worker_settings(stage, name) == {value}, "all workers know it")


@change("off", cuts=True)
def enabled(stage: Stage) -> None:
    stage.until(lambda: port_is_free(stage.cluster.port) and len(stage.status()) == 1, "drained and closed")
    stage.until(lambda: not stage.backends(), "no connection to PostgreSQL is left")
    stage.check(stage.message() == "ferretdb.enabled is off", "status tells of it")


@change("127.0.0.1:{port}, 127.0.0.1:{free}")
def listen_addr(stage: Stage) -> None:
    new = int(stage.sql("select setting from pg_settings where name = 'ferretdb.listen_addr'")[0]["setting"][-5:])
    stage.until(lambda: serves(new), "the new address is served")
    stage.configure(listen_addr=f"127.0.0.1:{stage.cluster.port}")
    stage.until(lambda: port_is_free(new), "the address is closed again")


@change("{folder}/mongodb.sock")
def listen_unix(stage: Stage) -> None:
    path = stage.cluster.socket_dir / "mongodb.sock"
    stage.until(path.exists, "the socket is there")
    with MongoClient[Document](f"mongodb://{quote_plus(str(path))}", **OPTIONS) as client:
        stage.check(client[DATABASE].rows.find_one(), "the socket serves")


@change("0600")
def unix_socket_permissions(stage: Stage) -> None:
    path = Path(stage.cluster.socket_dir / "mongodb.sock")
    stage.configure(listen_unix=str(path))
    stage.until(lambda: path.stat().st_mode & 0o777 == 0o600, "the socket has the mode")
    stage.configure(unix_socket_permissions="0660")
    stage.until(lambda: path.stat().st_mode & 0o777 == 0o660, "and the next one")
    del stage.cluster.settings["ferretdb.listen_unix"]


@change("3")
def workers(stage: Stage) -> None:
    stage.until(lambda: stage.ready(3), "three workers are ready")


@change("50")
def max_requests(stage: Stage) -> None:
    old = set(stage.pids()[1:])
    stage.until(lambda: not old & set(stage.pids()), "both workers are replaced")


@change("100000")
def max_requests_jitter(stage: Stage) -> None:
    stage.configure(max_requests="1")
    stage.until(lambda: "100000" in _worker_settings(stage, "max_requests_jitter"), "workers know it")
    del stage.cluster.settings["ferretdb.max_requests"]


@change("40")
def max_connections(stage: Stage) -> None:
    with ExitStack() as stack:

        def refused() -> bool:
            sock = raw.client(stage, stack)
            sock.sendall(raw.FIND)
            return b"ferretdb.max_connections" in raw.answer(sock)

        stage.until(refused, "a client too many is told")
    stage.until(lambda: raw.connections(stage) < 40, "they are gone")


@change("12")
def pool_min_conns(stage: Stage) -> None:
    stage.until(lambda: len(stage.backends()) >= 12, "twelve connections are open")


@change("2")
def pool_max_conns(stage: Stage) -> None:
    stage.until(lambda: len(stage.backends()) <= 2, "one connection is left to each worker")


@change("off")
def batch_scheduling(stage: Stage) -> None:
    def policies() -> set[int]:
        return {os.sched_getscheduler(pid) for pid in (*stage.pids()[1:], *stage.backends())}

    stage.until(lambda: policies() == {os.SCHED_OTHER}, "all are scheduled ordinarily")
    stage.configure(batch_scheduling="on")
    stage.until(lambda: policies() == {os.SCHED_BATCH}, "all are scheduled as batch work")


@change("20s")
def query_wait_timeout(stage: Stage) -> None:
    _until_known(stage, "query_wait_timeout", "20000")


@change("1s")
def client_timeout(stage: Stage) -> None:
    _until_known(stage, "client_timeout", "1000")
    with ExitStack() as stack:
        half = raw.client(stage, stack)
        half.sendall(raw.FIND[:30])
        stage.until(lambda: raw.closed(half), "half a message is not waited for", 4.0)


@change("64MB")
def client_memory(stage: Stage) -> None:
    _until_known(stage, "client_memory", "64")
    with ExitStack() as stack:
        halves = [raw.client(stage, stack) for _ in range(6)]
        for half in halves:
            half.settimeout(5)
            with suppress(OSError):
                half.sendall((48_000_000).to_bytes(4, "little") + bytes(30 << 20))
        stage.until(lambda: any(map(raw.closed, halves)), "the oldest are closed")


@change("1s")
def cursor_timeout(stage: Stage) -> None:
    _until_known(stage, "cursor_timeout", "1000")
    with MongoClient[Document](stage.cluster.uri, **OPTIONS) as client:
        page = client[DATABASE].command({"find": "rows", "batchSize": 1})

        def gone() -> bool:
            probe = {"getMore": Int64(page["cursor"]["id"]), "collection": "rows", "batchSize": 0}
            try:
                client[DATABASE].command(probe)
            except OperationFailure as error:
                return error.code == 43
            return False

        started = time.monotonic()
        stage.until(lambda: time.monotonic() - started > 1.2, "its time is up")
        stage.check(gone(), "the cursor has not expired")


@change("1s", cuts=True)
def worker_timeout(stage: Stage) -> None:
    slot, pid = stage.some_worker()
    kill(pid, 19)
    stage.until(lambda: stage.workers().get(slot, {}).get("pid", pid) != pid, "the stopped worker is replaced", 5.0)


@change("500ms", cuts=True)
def graceful_timeout(stage: Stage) -> None:
    stage.configure(enabled="off")
    seconds = stage.until(lambda: len(stage.status()) == 1, "drained")
    stage.check(seconds < 2.5 * stage.patience, f"draining took {seconds:.1f} s")
    del stage.cluster.settings["ferretdb.enabled"]


@change("debug")
def log_level(stage: Stage) -> None:
    _until_known(stage, "log_level", "debug")


@change("/usr/bin/python3.14", cuts=True)
def python(stage: Stage) -> None:
    stage.supervisor_anew(
        lambda: Path(f"/proc/{stage.supervisor()}/cmdline").read_text().startswith("/usr/bin/python3.14\0"),
        "the next supervisor runs it",
    )
    stage.until(stage.ready, "ready")


@change("/dev/shm")
def state_dir(stage: Stage) -> None:
    # Takes effect when no worker is there; until then it is told.
    stage.until(lambda: "ferretdb.state_dir: a change takes effect when" in stage.message(), "status tells of it")
    stage.check(stage.sql("table ferretdb.settings_errors"), "ferretdb.settings_errors shows it")


@fault(
    "every setting changed and changed back", "in effect; no request fails but where the change asks for it",
    within=30.0, rounds=1, failures=f"{AWAY}, {CUT}", load={"writers": 2, "readers": 2, "finders": 2},
)  # fmt: skip
def every_setting(stage: Stage) -> None:
    for item in CHANGES:
        started = time.monotonic()
        apply(stage, item)
        stage.recoveries.append(time.monotonic() - started)
        stage.note(f"{item.name} s", round(stage.recoveries[-1], 2))

"""The faults: each function injects one, once, and waits until all is well again."""

from __future__ import annotations

import os
import random
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psycopg
from pymongo import MongoClient
from pymongo.errors import NotPrimaryError, PyMongoError

from dev.cluster import free_port, port_is_free
from tests.faults import raw
from tests.faults.load import DATABASE, OPTIONS, Document, code_of, serves
from tests.faults.runner import fault
from tests.faults.stage import Missed, Row, Stage, connect, kill, lives, pss
from tests.wire import message

# What a client may see when the process that serves it dies.
CUT = "AutoReconnect"
# … when for a moment nobody listens.
AWAY = f"{CUT}, ServerSelectionTimeoutError, NetworkTimeout"
# … when PostgreSQL itself goes down or comes up.
DOWN = f"{AWAY}, 91 ShutdownInProgress"
# … and has lost its cursors by that, as MongoDB does.
RESTARTED = f"{DOWN}, 43 CursorNotFound"
# A file system of 4 MB that dev/enter --private offers for this.
SMALL_FILE_SYSTEM = Path("/mnt")


def _replaced(stage: Stage, slot: int, pid: int) -> bool:
    worker = stage.workers().get(slot)
    return worker is not None and worker["pid"] != pid


# -- processes of ours ------------------------------------------------------------------------------------------------


@fault("worker killed (SIGKILL)", "others unaffected, replaced", within=1.0, rounds=5, failures=CUT)
def worker_killed(stage: Stage) -> None:
    slot, pid = stage.some_worker()
    started = str(stage.sql("select pg_postmaster_start_time() as t")[0]["t"])
    kill(pid)
    stage.recovers(lambda: _replaced(stage, slot, pid), "the worker is replaced")
    row = stage.workers()[slot]
    stage.check(row["last_exit"] == "signal KILL" and row["restarts"], f"row of the new worker: {row}")
    stage.check(str(stage.sql("select pg_postmaster_start_time() as t")[0]["t"]) == started, "PostgreSQL restarted")


@fault(
    "worker stopped (SIGSTOP)", "replaced after worker_timeout (1 s), stack in the log",
    within=3.5, rounds=2, failures=CUT, settings={"ferretdb.worker_timeout": "1s"},
)  # fmt: skip
def worker_stopped(stage: Stage) -> None:
    before = stage.cluster.log.count("Fatal Python error: Aborted")
    slot, pid = stage.some_worker()
    kill(pid, signal.SIGSTOP)
    stage.recovers(lambda: _replaced(stage, slot, pid), "the worker is replaced")
    stage.check("ferretdb.worker_timeout" in stage.cluster.log, "the log does not name ferretdb.worker_timeout")
    stage.check(stage.cluster.log.count("Fatal Python error: Aborted") > before, "no stack in the log")


@fault(
    "worker's loop stuck in a C call", "replaced after worker_timeout (1 s), stack in the log",
    within=4.0, rounds=2, failures=CUT, settings={"ferretdb.worker_timeout": "1s"},
)  # fmt: skip
def worker_stuck(stage: Stage) -> None:
    slot, pid = stage.some_worker()
    with (
        tempfile.NamedTemporaryFile("w", suffix=".py", dir="/tmp") as script,
        tempfile.NamedTemporaryFile(dir="/tmp") as begun,
    ):
        script.write(
            f"import hashlib\n"
            f"with open({begun.name!r}, 'a') as begun: begun.write('yes')\n"
            f"hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"
        )
        script.flush()
        os.chmod(script.name, 0o644)
        os.chmod(begun.name, 0o666)
        sys.remote_exec(pid, script.name)  # type: ignore[attr-defined,unused-ignore]
        stage.until(lambda: Path(begun.name).stat().st_size, "the script runs in the worker")
        stage.recovers(lambda: _replaced(stage, slot, pid), "the worker is replaced")
    # The script that holds the loop has no name of its own.
    stage.check('File "<string>", line 3 in <module>' in stage.cluster.log, "no stack in the log")


@fault("supervisor killed (SIGKILL)", "workers gone < 1 s, serving < 2 s", within=2.0, failures=AWAY)
def supervisor_killed(stage: Stage) -> None:
    pids = stage.pids()
    killed = time.monotonic()
    kill(pids[0])
    stage.gone(pids, 1.0)
    stage.recovers(stage.serving, "serving again", killed)
    stage.until(stage.ready, "all workers are ready")
    stage.check(stage.status()[0]["last_exit"] == "signal KILL", "last_exit is not told")


@fault("launcher killed (SIGKILL)", "PostgreSQL recovers, serving < 3 s", within=3.0, rounds=2, failures=DOWN)
def launcher_killed(stage: Stage) -> None:
    pids, launcher = stage.pids(), stage.launcher()
    killed = time.monotonic()
    kill(launcher)
    stage.gone(pids)
    stage.recovers(stage.serving, "serving again", killed)
    stage.until(stage.ready, "all workers are ready")


@fault("launcher terminated from SQL", "tree gone, serving < 3 s", within=3.0, rounds=2, failures=DOWN)
def launcher_terminated(stage: Stage) -> None:
    pids = stage.pids()
    started = time.monotonic()
    stage.sql(f"select pg_terminate_backend({stage.launcher()})")
    stage.gone(pids)
    stage.recovers(stage.serving, "serving again", started)
    stage.until(stage.ready, "all workers are ready")


# -- PostgreSQL -------------------------------------------------------------------------------------------------------


@fault("backend killed (crash recovery)", "retryable errors, serving < 2 s", within=2.0, failures=DOWN)
def backend_killed(stage: Stage) -> None:
    pids = stage.pids()
    kill(random.choice(stage.backends()))
    killed = time.monotonic()
    stage.gone(pids)
    stage.recovers(stage.serving, "serving again", killed)
    stage.until(stage.ready, "all workers are ready")


@fault("postmaster killed (SIGKILL)", "no orphan, port free < 2 s", within=2.0, rounds=2, failures=RESTARTED)
def postmaster_killed(stage: Stage) -> None:
    pids = [*stage.pids(), *stage.backends()]
    kill(stage.cluster.pid or 0)
    stage.recovers(lambda: port_is_free(stage.cluster.port) and not any(map(lives, pids)), "nothing is left")
    _start_again(stage)


def _start_again(stage: Stage) -> None:
    stage.hang_up()
    # DocumentDB's own background worker may sleep for ten seconds before it notices that the postmaster has gone.
    stage.until(lambda: _starts(stage), "PostgreSQL starts")
    stage.until(stage.ready, "all workers are ready")


def _starts(stage: Stage) -> bool:
    stage.cluster.start()
    return True


def _stop(stage: Stage, mode: str) -> None:
    pids = stage.pids()
    stage.hang_up()
    started = time.monotonic()
    stage.cluster.stop(mode)
    # After an immediate shutdown the kernel kills them: they may outlive the postmaster by some milliseconds.
    stage.recovers(lambda: port_is_free(stage.cluster.port) and not any(map(lives, pids)), "nothing is left", started)
    _start_again(stage)


@fault("fast shutdown", "no orphan, port free, < 1 s", within=1.0, failures=RESTARTED)
def fast_shutdown(stage: Stage) -> None:
    _stop(stage, "fast")


@fault("immediate shutdown", "no orphan, port free, < 1 s", within=1.0, failures=RESTARTED)
def immediate_shutdown(stage: Stage) -> None:
    _stop(stage, "immediate")


@fault(
    "smart shutdown after enabled = off", "drained within graceful_timeout (1 s)",
    within=1.0, rounds=2, failures=RESTARTED, settings={"ferretdb.graceful_timeout": "1s"},
)  # fmt: skip
def smart_shutdown(stage: Stage) -> None:
    stage.configure(enabled="off")
    stage.until(lambda: len(stage.status()) == 1 and not stage.backends(), "drained", 4.0)
    stage.configure(enabled="on")
    stage.cluster.settings["ferretdb.enabled"] = "off"
    stage.cluster.configure()
    stage.until(lambda: len(stage.status()) == 1 and not stage.backends(), "drained", 4.0)
    stage.cluster.settings["ferretdb.enabled"] = "on"
    _stop(stage, "smart")


@fault(
    "PostgreSQL out of connections", "wait, then 262 (retryable), serves when there are some",
    within=3.0, rounds=2, failures=f"{DOWN}, 262 ExceededTimeLimit",
    settings={"max_connections": "30", "ferretdb.query_wait_timeout": "500ms"},
)  # fmt: skip
def out_of_connections(stage: Stage) -> None:
    with ExitStack() as held:
        stage.sql("select 1")
        # The gateway connects again as fast as it can: we have to be faster once for each of its connections.
        stage.until(lambda: _take_connections(stage, held), "PostgreSQL has no connection left for the gateway")
        started = time.monotonic()
        stage.until(lambda: stage.load.failed(started)["262 ExceededTimeLimit"], "requests are told", 10.0)
    stage.recovers(stage.serving, "serving again")


def _take_connections(stage: Stage, held: ExitStack) -> bool:
    """Take every free connection, then end the gateway's; True when it has none."""
    with suppress(psycopg.OperationalError):
        while True:
            held.enter_context(connect(stage.cluster))
    backends = stage.backends()
    for pid in backends:
        stage.sql(f"select pg_terminate_backend({pid})")
    return not backends


@fault(
    "backend paused, its client gone", "others go on; pid, since and namespace in log and status",
    within=1.0, rounds=1, failures="", settings={"ferretdb.pool_min_conns": "8"},
)  # fmt: skip
def backend_paused(stage: Stage) -> None:
    options = OPTIONS | {"socketTimeoutMS": 400}
    with MongoClient[Document](stage.cluster.uri, **options) as client:
        victim: list[int] = []

        def freeze() -> None:
            stage.until(lambda: _sleeping(stage), "the slow query runs")
            victim.extend(_sleeping(stage)[:1])
            kill(victim[0], signal.SIGSTOP)

        freezer = threading.Thread(target=freeze)
        freezer.start()
        with suppress(PyMongoError):
            _slow(client)
        freezer.join()
    pid = victim[0]
    try:
        told = f"aggregate {DATABASE}.rows: PostgreSQL backend {pid} ignores its cancel request since"
        stage.until(lambda: any(told in (row["message"] or "") for row in stage.status()), "status tells of it", 15)
        stage.check(f"backend_pid={pid}" in stage.cluster.log, "the log does not tell of it")
        stage.recovers(stage.serving, "others are served")
    finally:
        kill(pid, signal.SIGCONT)
    stage.until(lambda: all(told not in (row["message"] or "") for row in stage.status()), "status forgets it", 15)
    stage.check("has ended" in stage.cluster.log, "the log does not tell of its end")


def _slow(client: MongoClient[Document]) -> None:
    """An aggregation that takes longer than anybody waits."""
    lookup = {
        "from": "rows",
        "as": "x",
        "let": {"a": "$_id"},
        "pipeline": [{"$match": {"$expr": {"$gt": ["$r", "$$a"]}}}],
    }
    unwind: list[Document] = [{"$lookup": lookup}, {"$unwind": "$x"}] * 4
    list(client[DATABASE].rows.aggregate([*unwind, {"$group": {"_id": None, "n": {"$sum": 1}}}]))


def _sleeping(stage: Stage) -> list[int]:
    """The backends that run something for longer than the load's requests take."""
    rows = stage.sql(
        "select pid from pg_stat_activity where application_name = 'pg_ferret' and state = 'active'"
        " and now() - query_start > interval '150 ms'"
    )
    return [int(row["pid"]) for row in rows]


@fault("client gone in the middle of a query", "the query is cancelled", within=1.5, failures="")
def client_gone(stage: Stage) -> None:
    options = OPTIONS | {"socketTimeoutMS": 400}
    with MongoClient[Document](stage.cluster.uri, **options) as client, suppress(PyMongoError):
        _slow(client)
    stage.recovers(lambda: not _sleeping(stage), "no query runs on")


@fault("a collection locked, its readers gone", "other reads go on, these are cancelled", within=1.5, failures="")
def locked_reads(stage: Stage) -> None:
    asking = message({"find": "locked", "filter": {"_id": 1}, "limit": 1, "singleBatch": True, "$db": DATABASE})
    with MongoClient[Document](stage.cluster.uri, **OPTIONS) as client:
        client[DATABASE].locked.replace_one({"_id": 1}, {}, upsert=True)
    catalogue = "documentdb_api_catalog.collections"
    named = f"database_name = '{DATABASE}' and collection_name = 'locked'"
    number = stage.sql(f"select collection_id from {catalogue} where {named}")[0]["collection_id"]
    with ExitStack() as stack, connect(stage.cluster) as blocker:
        readers = [raw.client(stage, stack) for _ in range(8)]
        for _ in range(5):  # so often that they share a connection with the load's point reads
            for reader in readers:
                reader.sendall(asking)
                raw.answer(reader)
        quiet = _quiet(stage, 1.0)
        blocker.execute("begin")
        blocker.execute(f"lock table documentdb_data.documents_{number} in access exclusive mode")
        for reader in readers:
            reader.sendall(asking)
        stage.until(lambda: len(_locked(stage)) == len(readers), "the reads wait, each for itself")
        time.sleep(1.0)  # the others' share of the time
        _disturbed(stage, 1.0, quiet)
        stack.close()
        stage.recovers(lambda: not _locked(stage), "the reads are cancelled")


def _locked(stage: Stage) -> list[int]:
    """The gateway's backends that wait for a lock on a table."""
    rows = stage.sql(
        "select pid from pg_stat_activity where application_name = 'pg_ferret' and wait_event = 'relation'"
    )
    return [int(row["pid"]) for row in rows]


# -- settings ---------------------------------------------------------------------------------------------------------


@fault("port of a new address in use", "named in log and status, retried, others served", within=3.0, rounds=2)
def port_in_use(stage: Stage) -> None:
    both = f"127.0.0.1:{stage.cluster.port}"
    with stage.calm(), socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        stage.configure(listen_addr=f"{both}, 127.0.0.1:{port}")
        stage.until(lambda: f"127.0.0.1:{port}: Address already in use" in stage.message(), "status tells of it")
        (row,) = stage.sql("table ferretdb.settings_errors")
        stage.check(row["name"] == "ferretdb.listen_addr" and str(port) in row["setting"], f"settings_errors: {row}")
        stage.check("ferretdb.listen_addr" in stage.cluster.log, "the log does not name the setting")
    stage.recovers(lambda: serves(port), "the new address is served when it is free")
    stage.configure(listen_addr=both)
    stage.until(lambda: port_is_free(port), "the address is closed")


def _broken_start(stage: Stage, told: str, **broken: str) -> None:
    """The supervisor cannot start with these settings: one clear line, PostgreSQL unaffected; then they are mended."""
    good = {name: stage.cluster.settings.get(f"ferretdb.{name}") for name in broken}
    stage.configure(**broken)

    def down() -> bool:
        # A supervisor that was started before the reload tells of it, too, and goes on serving.
        row = stage.status()[0]
        return row["state"] in ("failed", "backoff") and told in str(row["message"])

    stage.supervisor_anew(down, f"status tells of it: {told}")
    seen = stage.cluster.log.count(told)
    stage.check(seen >= 1, "the log does not tell of it")
    stage.sql("select 1")
    for name, value in good.items():
        if value is None:
            del stage.cluster.settings[f"ferretdb.{name}"]
        else:
            stage.cluster.settings[f"ferretdb.{name}"] = value
    mended = time.monotonic()
    stage.cluster.configure()
    stage.recovers(stage.serving, "serving again", mended)
    stage.until(stage.ready, "all workers are ready")


@fault(
    "bad interpreter (ferretdb.python)", "told with the setting's name, retried", within=2.0, rounds=1, failures=AWAY
)
def bad_interpreter(stage: Stage) -> None:
    _broken_start(stage, 'ferretdb.python: cannot execute "/nowhere/python3"', python="/nowhere/python3")


@fault("import error at start", "told, retried", within=2.0, rounds=1, failures=AWAY)
def import_error(stage: Stage) -> None:
    script = stage.cluster.directory / "python-without-packages"
    script.write_text('#!/bin/sh\nexec /usr/bin/python3 -S "$@"\n')
    script.chmod(0o755)
    _broken_start(stage, "the supervisor cannot start: ModuleNotFoundError", python=str(script))


@fault(
    "a worker cannot boot",
    "told, retried with growing pauses, the other one serves",
    within=10.0,
    rounds=1,
    failures=CUT,
)
def worker_cannot_boot(stage: Stage) -> None:
    slot, pid = stage.some_worker()
    maps = Path(f"/proc/{pid}/maps").read_text().split()
    registry = next(Path(part) for part in maps if part.endswith("/cursors.mdb"))
    registry.chmod(0)
    try:
        kill(pid)
        stage.until(lambda: _slot(stage, slot)["state"] == "backoff", "status shows the wait")
        stage.until(lambda: _slot(stage, slot)["restarts"] >= 3, "it is tried again")
        stage.check("Permission denied" in stage.cluster.log, "the log does not tell why")
        stage.check(stage.serving(), "the other worker does not serve")
    finally:
        registry.chmod(0o600)
    stage.recovers(stage.ready, "both workers are ready")


def _slot(stage: Stage, slot: int) -> Row:
    return next(row for row in stage.status() if row["slot"] == slot)


@fault("state_dir cannot be used", "told with the setting's name, retried", within=3.0, rounds=1, failures=AWAY)
def bad_state_dir(stage: Stage) -> None:
    stage.configure(enabled="off")
    stage.until(lambda: len(stage.status()) == 1, "drained")
    stage.configure(enabled="on", state_dir="/proc/nowhere")
    stage.until(lambda: "ferretdb.state_dir: /proc/nowhere" in stage.message(), "status tells of it")
    stage.check(stage.sql("table ferretdb.settings_errors")[0]["name"] == "ferretdb.state_dir", "settings_errors")
    del stage.cluster.settings["ferretdb.state_dir"]
    mended = time.monotonic()
    stage.cluster.configure()
    stage.recovers(stage.serving, "serving again", mended)
    stage.until(stage.ready, "all workers are ready")


@fault(
    "wrong ferretdb.database", "told with the setting's name, no crash loop", within=3.0, rounds=1, failures=RESTARTED
)
def wrong_database(stage: Stage) -> None:
    stage.hang_up()
    stage.cluster.stop()
    stage.cluster.settings["ferretdb.database"] = "nowhere"
    stage.cluster.start(wait=False)
    stage.until(lambda: "ferretdb.database must name an existing database" in stage.message(), "status tells of it")
    stage.sql("select 1")
    del stage.cluster.settings["ferretdb.database"]
    stage.hang_up()
    stage.cluster.stop()
    mended = time.monotonic()
    stage.cluster.start()
    stage.recovers(stage.serving, "serving again", mended)
    stage.until(stage.ready, "all workers are ready")


@fault("rolling restart (restart_workers())", "new first, no failed request", within=5.0, rounds=3)
def rolling_restart(stage: Stage) -> None:
    old = {row["pid"] for row in stage.workers().values()}
    with stage.calm():
        stage.sql("select ferretdb.restart_workers()")
        stage.recovers(lambda: stage.ready() and not old & set(stage.pids()), "all workers are new")


@fault("workers 2 -> 4 -> 1 -> 2", "no failed request", within=5.0, rounds=2)
def resized(stage: Stage) -> None:
    with stage.calm():
        for count in (4, 1, 2):
            stage.configure(workers=str(count))
            stage.recovers(lambda count=count: stage.ready(count), f"{count} workers")  # type: ignore[misc]


@fault("max_requests reached", "replaced, no failed request", within=10.0, rounds=1)
def worn_out(stage: Stage) -> None:
    old = {row["pid"] for row in stage.workers().values()}
    with stage.calm():
        stage.configure(max_requests="100", max_requests_jitter="50")
        stage.recovers(lambda: not old & set(stage.pids()), "both workers are replaced")
        stage.configure(max_requests="0")
        stage.until(stage.ready, "calm again")


# -- pressure ---------------------------------------------------------------------------------------------------------


def _disturbed(stage: Stage, seconds: float, before: float) -> None:
    """Compare the others' p99 of the last ``seconds`` with that of the time ``before`` the disturbance."""
    after = stage.load.p99(seconds)
    stage.note("p99 before ms", round(before * 1000, 1))
    stage.note("p99 under it ms", round(after * 1000, 1))
    # Below 5 ms it is the scheduler of a busy machine that is measured.
    limit = 2 * stage.patience * max(before, 0.005)
    stage.check(after <= limit, f"the others' p99 went from {before * 1000:.1f} to {after * 1000:.1f} ms")


def _quiet(stage: Stage, seconds: float) -> float:
    """The p99 of a time without disturbance."""
    time.sleep(seconds)  # the load runs on
    return stage.load.p99(seconds)


@fault("10,000 idle and 500 active clients", "all served, memory bounded", within=20.0, rounds=1)
def many_clients(stage: Stage) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    stage.configure(max_connections="20000")
    idle = 10_000
    stage.check(hard >= idle + 2_000, f"not tried: ulimit -n {hard} is too low")
    before = sum(map(pss, stage.pids()))
    with stage.calm(), ExitStack() as stack:
        started = time.monotonic()
        sockets = [raw.client(stage, stack) for _ in range(idle)]
        active = [raw.client(stage, stack) for _ in range(500)]
        for _ in range(20):
            for sock in active:
                sock.sendall(raw.FIND)
            for sock in active:
                raw.answer(sock)
        stage.recovers(lambda: raw.connections(stage) >= idle, "counted", started)
        grown = sum(map(pss, stage.pids())) - before
        stage.note("idle clients", idle)
        stage.note("kB per client", round(grown / len(sockets) / 1024, 1))
        stage.check(grown < len(sockets) * 6_000 + (16 << 20), f"{grown >> 20} MB for {idle} clients")
        loads = [row["connections"] for row in stage.workers().values()]
        stage.check(max(loads) <= 1.25 * sum(loads) / len(loads), f"not shared evenly: {loads}")


@fault(
    "garbage, half messages, 2 GB lengths", "the offenders alone are closed",
    within=4.0, rounds=2, settings={"ferretdb.client_timeout": "1s"}, load={"idle": 20},
)  # fmt: skip
def slow_clients(stage: Stage) -> None:
    quiet = _quiet(stage, 1.5)
    choose = random.Random(len(stage.recoveries))
    with stage.calm(), ExitStack() as stack:
        started = time.monotonic()
        bad = [raw.client(stage, stack) for _ in range(200)]
        for number, sock in enumerate(bad):
            half = raw.FIND[: choose.randrange(1, len(raw.FIND) - 1)]
            sock.sendall([half, struct.pack("<iiii", 2**31 - 1, 1, 0, 2013), choose.randbytes(64)][number % 3])
        time.sleep(1.5)  # the others' share of the time
        _disturbed(stage, 1.5, quiet)
        stage.recovers(lambda: all(map(raw.closed, bad)), "the offenders are closed", started)


@fault(
    "clients that never read, and never finish", "memory bounded by client_memory, the offenders alone are closed",
    within=8.0, rounds=1,
    settings={
        "ferretdb.client_timeout": "2s",
        "ferretdb.client_memory": "64MB",
        "ferretdb.pool_max_conns": "8",
    },
    load={"idle": 20},
)  # fmt: skip
def unread_replies(stage: Stage) -> None:
    with MongoClient[Document](stage.cluster.uri, **OPTIONS) as client:
        if not client[DATABASE].big.find_one({}, {"_id": 1}):
            client[DATABASE].big.insert_many([{"_id": number, "x": b"x" * (1 << 20)} for number in range(8)])
    quiet = _quiet(stage, 1.5)
    connections = raw.connections(stage)
    highest = sum(map(pss, stage.pids()))
    # client_memory, and for each connection to PostgreSQL one reply of 8 MB: in libpq's buffer, as a page, on its way.
    limit = highest + (64 << 20) + 8 * ((16 + 8 + 8) << 20)
    asking = message({"find": "big", "$db": DATABASE})
    begun = time.monotonic()
    with stage.calm(), ExitStack() as stack:
        bad = [raw.client(stage, stack) for _ in range(40)]
        for number, sock in enumerate(bad):
            time.sleep(0.1)  # it is the memory that they hold that counts; all at once they would take the processors
            sock.settimeout(5)
            with suppress(OSError):
                if number % 2:
                    sock.sendall(asking * 3)
                else:
                    sock.sendall(struct.pack("<iiii", 40 << 20, 1, 0, 2013) + bytes(4 << 20))
            highest = max(highest, sum(map(pss, stage.pids())))
        # Not by reading from them: then they would no longer be offenders.
        stage.recovers(lambda: raw.connections(stage) <= connections, "the offenders are closed")
        _disturbed(stage, time.monotonic() - begun, quiet)
    stage.note("highest PSS MB", highest >> 20)
    stage.check(highest < limit, f"PSS rose to {highest >> 20} MB")


@fault("max_connections reached", "told with 365 TemporarilyUnavailable, then served", within=2.0, rounds=2)
def too_many_clients(stage: Stage) -> None:
    stage.configure(max_connections="100")
    with stage.calm(), ExitStack() as stack:
        stage.until(lambda: len(_fill(stage, stack, 20)) < 20, "the limit is reached")
        last = raw.client(stage, stack)
        last.sendall(raw.FIND)
        answer = raw.answer(last)
        stage.check(b"ferretdb.max_connections" in answer and b"TemporarilyUnavailable" in answer, f"answer {answer!r}")
        stage.check(_eventually_closed(stage, last), "the refused connection stays open")
        stage.until(lambda: any("max_connections" in (row["message"] or "") for row in stage.status()), "status tells")
    stage.recovers(stage.serving, "new clients are served")


def _fill(stage: Stage, stack: ExitStack, count: int) -> list[socket.socket]:
    """Open connections; those that are served."""
    served = []
    for _ in range(count):
        sock = raw.client(stage, stack)
        sock.sendall(raw.FIND)
        if b"TemporarilyUnavailable" not in raw.answer(sock):
            served.append(sock)
    return served


def _eventually_closed(stage: Stage, sock: socket.socket) -> bool:
    stage.until(lambda: raw.closed(sock), "the connection is closed")
    return True


@fault("limit of file descriptors reached", "told, the others are served", within=2.0, rounds=1, load={"idle": 0})
def out_of_descriptors(stage: Stage) -> None:
    pids = [int(row["pid"]) for row in stage.workers().values()]
    for pid in pids:
        # As the server's user: root may lack the right to change another user's limits.
        found = os.stat(f"/proc/{pid}")
        command = ["prlimit", f"--pid={pid}", "--nofile=256:"]
        if os.geteuid() == 0:
            command = ["setpriv", f"--reuid={found.st_uid}", f"--regid={found.st_gid}", "--clear-groups", *command]
        subprocess.run(command, check=True)
    stage.configure(log_level="debug")  # workers look at their limit with each configuration
    with stage.calm(), ExitStack() as stack:
        stage.until(lambda: len(_fill(stage, stack, 20)) < 20, "the limit is reached")
        stage.until(
            lambda: any("descriptors" in (row["message"] or "") for row in stage.status()), "status tells of it"
        )
    stage.check(sorted(int(row["pid"]) for row in stage.workers().values()) == sorted(pids), "a worker died")
    stage.configure(log_level="info")
    stage.recovers(stage.serving, "new clients are served")


def _is_small(path: Path) -> bool:
    found = os.statvfs(path)
    return found.f_blocks * found.f_frsize <= 4 << 20


# It is switched off twice for it; PyMongo may take a while to learn that nobody listens, and until then is refused.
@fault(
    "state_dir full", "cursors fail with 14031, all else is served",
    within=2.0, rounds=1, failures=AWAY, load={"readers": 0},
)  # fmt: skip
def full_state_dir(stage: Stage) -> None:
    if not _is_small(SMALL_FILE_SYSTEM):
        raise Missed(f"not tried: {SMALL_FILE_SYSTEM} is no small file system (dev/enter --private makes one)")
    stage.configure(enabled="off")
    stage.until(lambda: len(stage.status()) == 1, "drained")
    stage.configure(enabled="on", state_dir=str(SMALL_FILE_SYSTEM))
    stage.until(stage.ready, "ready again")
    pids = stage.pids()
    codes: set[str] = set()

    def fill() -> bool:
        with MongoClient[Document](stage.cluster.uri, **OPTIONS) as client:
            try:
                for _ in range(1000):
                    command = {"find": "rows", "batchSize": 1, "comment": "x" * 4000, "noCursorTimeout": True}
                    client[DATABASE].command(command)
            except PyMongoError as error:
                codes.add(code_of(error))
        return bool(codes)

    stage.until(fill, "the file system is full")
    stage.check(codes <= {"14031 OutOfDiskSpace", "146 ExceededMemoryLimit"}, f"codes {codes}")
    stage.check(stage.pids() == pids, "a process died")
    stage.recovers(stage.serving, "others are served")
    stage.configure(enabled="off")
    stage.until(lambda: len(stage.status()) == 1, "drained")
    del stage.cluster.settings["ferretdb.state_dir"]
    stage.configure(enabled="on")
    stage.until(stage.ready, "ready again")


# -- topology ---------------------------------------------------------------------------------------------------------


@fault("standby reads; promotion", "reads never stop, writes within 2 s", within=2.0, rounds=1, load={"writers": 1})
def promotion(stage: Stage) -> None:
    standby = stage.cluster.standby(tempfile.mkdtemp(prefix="pgf-fault-", dir="/tmp"), port=free_port())
    try:
        standby.start()
        with MongoClient[Document](standby.uri, directConnection=True, **OPTIONS) as client:
            stage.until(client[DATABASE].rows.find_one, "the standby has the rows")
            greeting = client.admin.command("hello")
            stage.check(greeting["readOnly"] and not greeting["isWritablePrimary"], f"hello says {greeting}")
            stage.check(_refusal(client) == 10107, "a write is not refused with 10107")
            stage.check(standby.psql("select count(*) from ferretdb.status") == [("3",)], "no status on the standby")
            failed: list[str] = []
            ended = threading.Event()
            reader = threading.Thread(target=_read_on, args=(client, ended, failed))
            reader.start()
            promoted = time.monotonic()
            standby.promote()
            stage.recovers(lambda: _refusal(client) is None, "the promoted server takes writes", promoted)
            ended.set()
            reader.join()
            stage.check(not failed, f"reads failed: {failed[:3]}")
    finally:
        standby.destroy()


def _refusal(client: MongoClient[Document]) -> int | None:
    try:
        client[DATABASE].promoted.insert_one({})
    except NotPrimaryError as error:
        return int(error.details["code"]) if isinstance(error.details, dict) else 0
    except PyMongoError:
        return 0
    return None


def _read_on(client: MongoClient[Document], ended: threading.Event, failed: list[str]) -> None:
    while not ended.is_set():
        try:
            client[DATABASE].rows.find_one({"_id": 1})
        except PyMongoError as error:
            failed.append(code_of(error))

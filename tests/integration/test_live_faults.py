"""What a DBA may do at night: kill, stop, reload, promote."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import bson
import pytest
from pymongo import MongoClient
from pymongo.errors import NetworkTimeout, NotPrimaryError, PyMongoError

from dev.cluster import Cluster, ClusterError, answers_hello, free_port, port_is_free, wait_for
from tests.integration.conftest import CLIENT_OPTIONS
from tests.unit.fake_services import message

Document = dict[str, Any]
NewCluster = Callable[..., Cluster]


def tree(cluster: Cluster) -> list[int]:
    return [int(row["pid"]) for row in cluster.status() if row["pid"]]


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def serves(cluster: Cluster) -> bool:
    try:
        with MongoClient[Document](cluster.uri, serverSelectionTimeoutMS=500, socketTimeoutMS=2000) as client:
            client.night.c.find_one()
    except PyMongoError:
        return False
    return True


def ready(cluster: Cluster, count: int) -> bool:
    rows = cluster.status()
    return [row["state"] for row in rows] == ["ready"] * (count + 1)


def row_of(cluster: Cluster, slot: int) -> dict[str, str | None]:
    """The slot's row; of Nones as long as it has none."""
    rows = cluster.status()
    return next((row for row in rows if row["slot"] == str(slot)), dict.fromkeys(rows[0]))


def test_a_killed_worker_is_replaced_and_postgresql_does_not_notice(new_cluster: NewCluster) -> None:
    cluster = new_cluster()
    wait_for(lambda: ready(cluster, 2))
    uptime = cluster.psql("select pg_postmaster_start_time()")
    before = row_of(cluster, 1)
    os.kill(int(before["pid"] or 0), signal.SIGKILL)
    started = time.monotonic()

    def replacement() -> dict[str, str | None]:
        row = row_of(cluster, 1)
        return row if row["pid"] != before["pid"] and row["state"] == "ready" else {}

    after = wait_for(replacement)
    assert time.monotonic() - started < 1
    assert (after["restarts"], after["last_exit"], after["generation"]) == ("1", "signal KILL", "2")
    assert serves(cluster)
    assert cluster.psql("select pg_postmaster_start_time()") == uptime


def test_a_stopped_worker_is_replaced(new_cluster: NewCluster) -> None:
    cluster = new_cluster(**{"ferretdb.worker_timeout": "1s"})
    wait_for(lambda: ready(cluster, 2))
    pid = row_of(cluster, 1)["pid"]
    os.kill(int(pid or 0), signal.SIGSTOP)
    wait_for(lambda: (row := row_of(cluster, 1))["pid"] != pid and row["state"] == "ready", deadline=15)
    assert "ferretdb.worker_timeout" in cluster.log


@pytest.mark.parametrize("victim", ["supervisor", "launcher", "backend"])
def test_the_whole_tree_comes_back(new_cluster: NewCluster, victim: str) -> None:
    cluster = new_cluster()
    wait_for(lambda: ready(cluster, 2))
    old = tree(cluster)
    if victim == "supervisor":
        os.kill(old[0], signal.SIGKILL)
    else:
        condition = "backend_type = 'pg_ferret launcher'" if victim == "launcher" else "application_name = 'pg_ferret'"
        ((pid,), *_) = wait_for(lambda: cluster.psql(f"select pid from pg_stat_activity where {condition}"))
        os.kill(int(pid or 0), signal.SIGKILL)
    wait_for(lambda: not any(map(lives, old)))
    wait_for(lambda: serves(cluster))


def test_a_killed_postmaster_leaves_nothing(new_cluster: NewCluster) -> None:
    cluster = new_cluster()
    wait_for(lambda: ready(cluster, 2))
    old = tree(cluster)
    os.kill(cluster.pid or 0, signal.SIGKILL)
    wait_for(lambda: not any(map(lives, old)), deadline=2)
    assert port_is_free(cluster.port)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_stop_leaves_nothing(new_cluster: NewCluster, mode: str) -> None:
    cluster = new_cluster()
    wait_for(lambda: ready(cluster, 2))
    old = tree(cluster)
    with MongoClient[Document](cluster.uri, **CLIENT_OPTIONS) as client:
        client.night.c.insert_one({})
        cluster.stop(mode)
    wait_for(lambda: not any(map(lives, old)), deadline=2)
    assert port_is_free(cluster.port)
    cluster.start()
    assert wait_for(lambda: serves(cluster))


def test_settings_are_live(new_cluster: NewCluster) -> None:
    """Every change under load; no request fails, also not on connections to an address that is closed."""
    cluster = new_cluster()
    wait_for(lambda: ready(cluster, 2))
    path = cluster.socket_dir / "mongodb.sock"
    stop = threading.Event()
    failed: list[PyMongoError] = []

    def read(client: MongoClient[Document]) -> None:
        while not stop.is_set():
            try:
                client.night.c.find_one({"_id": 1})
            except PyMongoError as error:
                failed.append(error)

    with MongoClient[Document](cluster.uri, retryReads=False, **CLIENT_OPTIONS) as client:
        client.night.c.insert_one({"_id": 1})
        readers = [threading.Thread(target=read, args=(client,)) for _ in range(4)]
        for reader in readers:
            reader.start()
        try:
            cluster.configure(ferretdb__workers="4")
            wait_for(lambda: ready(cluster, 4))
            cluster.configure(
                ferretdb__pool_max_conns="8", ferretdb__log_level="debug", ferretdb__listen_unix=str(path)
            )
            wait_for(path.exists)
            assert path.stat().st_mode & 0o777 == 0o700
            with MongoClient[Document](f"mongodb://{quote_plus(str(path))}", **CLIENT_OPTIONS) as other:
                assert other.night.c.find_one() == {"_id": 1}
            old, cluster.port = cluster.port, free_port()
            cluster.configure()
            wait_for(lambda: serves(cluster))
        finally:
            stop.set()
            for reader in readers:
                reader.join(30)
        assert not any(reader.is_alive() for reader in readers)
        assert failed == []
    wait_for(lambda: port_is_free(old))
    cluster.configure(ferretdb__workers="1")
    wait_for(lambda: ready(cluster, 1), deadline=20)
    cluster.configure(ferretdb__enabled="off")
    wait_for(lambda: port_is_free(cluster.port) and len(cluster.status()) == 1, deadline=20)
    cluster.configure(ferretdb__enabled="on")
    wait_for(lambda: ready(cluster, 1) and serves(cluster))


def test_bad_values_are_told_and_change_nothing(new_cluster: NewCluster) -> None:
    cluster = new_cluster()
    wait_for(lambda: ready(cluster, 2))

    def message() -> str:
        return row_of(cluster, 0)["message"] or ""

    cluster.configure(ferretdb__workers="many")
    wait_for(lambda: "ferretdb.workers" in message())
    assert serves(cluster)
    cluster.configure(ferretdb__listen_addr="nonsense")
    wait_for(lambda: "ferretdb.listen_addr" in message())
    assert serves(cluster)
    cluster.configure(ferretdb__workers="2", ferretdb__listen_addr=f"127.0.0.1:{cluster.port}, 192.0.2.1:27017")
    wait_for(lambda: "ferretdb.listen_addr" in message() and "192.0.2.1" in message())
    assert serves(cluster)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cluster.configure(ferretdb__listen_addr=f"127.0.0.1:{cluster.port}, 127.0.0.1:{port}")
        wait_for(lambda: f"127.0.0.1:{port}: Address already in use" in message())
        assert serves(cluster)
    wait_for(lambda: "in use" not in message(), deadline=15)
    cluster.configure(ferretdb__python="/nowhere/python3")
    os.kill(tree(cluster)[0], signal.SIGKILL)
    wait_for(lambda: "/nowhere/python3" in message())
    cluster.configure(ferretdb__python="/usr/bin/python3")
    wait_for(lambda: serves(cluster))


def test_without_preload_there_is_a_hint(new_cluster: NewCluster) -> None:
    cluster = new_cluster(preload=False)
    with pytest.raises(ClusterError, match="shared_preload_libraries"):
        cluster.psql("load 'pg_ferret'")
    assert cluster.psql("select 1") == [("1",)]


def test_a_standby_reads_and_a_promoted_one_writes(
    new_cluster: NewCluster, new_standby: Callable[[Cluster], Cluster]
) -> None:
    primary = new_cluster()
    with MongoClient[Document](primary.uri, **CLIENT_OPTIONS) as client:
        client.night.c.insert_many([{"_id": number} for number in range(300)])
    standby = new_standby(primary)
    wait_for(lambda: ready(standby, 2))
    with MongoClient[Document](standby.uri, **CLIENT_OPTIONS) as client:
        assert client.admin.command("hello")["readOnly"] is True
        wait_for(lambda: client.night.c.count_documents({}) == 300)
        with pytest.raises(NotPrimaryError) as failure:
            client.night.c.insert_one({})
        assert isinstance(failure.value.details, dict)
        assert failure.value.details["code"] == 10107
        standby.promote()

        def writes() -> bool:
            try:
                return client.night.c.insert_one({}).acknowledged
            except PyMongoError:
                return False

        wait_for(writes, deadline=5)


def test_a_thousand_connections_are_shared_evenly(cluster: Cluster) -> None:
    wait_for(lambda: ready(cluster, 4))
    connections = [socket.create_connection(("127.0.0.1", cluster.port)) for _ in range(1000)]
    try:

        def connected() -> list[int]:
            found = [int(row["connections"] or 0) for row in cluster.status()[1:]]
            return found if sum(found) >= 1000 else []

        counts = wait_for(connected)
        assert max(counts) <= 1.25 * sum(counts) / len(counts)
    finally:
        for connection in connections:
            connection.close()


def parked(pid: int) -> int:
    """How many clients of a worker are watched by its second epoll instance, which the first one watches."""
    instances: dict[str, set[str]] = {}
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(descriptor) == "anon_inode:[eventpoll]":
                text = Path(f"/proc/{pid}/fdinfo/{descriptor.name}").read_text()
                instances[descriptor.name] = set(re.findall(r"^tfd:\s+(\d+)", text, re.MULTILINE))
    watched = set().union(*instances.values())
    return sum(len(targets) for descriptor, targets in instances.items() if descriptor in watched)


def test_quiet_clients_are_parked_and_notice_nothing(new_cluster: NewCluster) -> None:
    cluster = new_cluster(**{"ferretdb.workers": "1"})

    def the_worker() -> dict[str, str | None]:
        workers = cluster.status()[1:]
        return workers[0] if [row["state"] for row in workers] == ["ready"] else {}

    with contextlib.ExitStack() as stack:
        address = ("127.0.0.1", cluster.port)
        clients = [stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(40)]

        def ping(those: list[socket.socket]) -> None:
            for client in those:
                client.sendall(message({"ping": 1}))
            for client in those:
                assert client.recv(1000).endswith(bson.encode({"ok": 1.0}))

        ping(clients)
        pid = int(wait_for(the_worker)["pid"] or 0)
        wait_for(lambda: parked(pid) == 40, deadline=30)
        ping(clients[:20])
        assert parked(pid) == 20
        cluster.psql("select ferretdb.restart_workers()")
        wait_for(lambda: not lives(pid))
        wait_for(lambda: the_worker().get("connections") == "40")
        ping(clients)
    wait_for(lambda: the_worker().get("connections") == "0")


def test_every_column_of_the_status_view_has_a_value(cluster: Cluster) -> None:
    with MongoClient[Document](cluster.uri, **CLIENT_OPTIONS) as client:
        client.night.c.find_one()

        def used() -> list[dict[str, str | None]]:
            found = cluster.status()
            return found if any(int(row["requests"] or 0) for row in found) else []

        rows = wait_for(used)
    filled = {name for row in rows for name, value in row.items() if value is not None}
    assert filled >= set(rows[0]) - {"last_exit"}


def test_a_restart_installs_nothing_again(new_cluster: NewCluster) -> None:
    cluster = new_cluster()
    assert cluster.log.count('executed "CREATE EXTENSION pg_ferret') == 1
    cluster.restart()
    wait_for(lambda: serves(cluster))
    assert cluster.log.count('executed "CREATE EXTENSION pg_ferret') == 1


def test_a_dump_restores(new_cluster: NewCluster) -> None:
    """The extension is in the dump once and restores where pg_ferret runs; collections are mongodump's business."""
    cluster, other = new_cluster(), new_cluster()
    psql = cluster.psql_command([])[0]
    place = ["-h", str(cluster.socket_dir), "-p", str(cluster.pg_port), "-U", "postgres", "-d", "postgres"]
    dump = subprocess.run(
        [psql.replace("/psql", "/pg_dump"), *place], check=True, capture_output=True, text=True
    ).stdout
    assert dump.count("CREATE EXTENSION IF NOT EXISTS pg_ferret") == 1
    place[1] = str(other.socket_dir)
    restored = subprocess.run([psql, "-X", "-q", *place], input=dump, check=True, capture_output=True, text=True)
    assert [line for line in restored.stderr.splitlines() if "ferret" in line] == []
    assert ready(other, 2)
    assert serves(other)


def test_a_backend_that_ends_without_reading_its_query(new_cluster: NewCluster) -> None:
    """The kernel then reports an error with the last words, after which libuv watches the socket no longer."""
    cluster = new_cluster(**{"ferretdb.workers": "1", "ferretdb.pool_max_conns": "1", "ferretdb.pool_min_conns": "1"})
    with MongoClient[Document](cluster.uri, retryReads=False, **CLIENT_OPTIONS) as client:
        client.night.c.insert_one({"_id": 1})
        ((pid,),) = cluster.psql("select pid from pg_stat_activity where application_name = 'pg_ferret'")
        os.kill(int(pid or 0), signal.SIGSTOP)
        answers: list[object] = []

        def ask() -> None:
            try:
                answers.append(client.night.c.find_one())
            except PyMongoError as error:
                answers.append(error)

        asker = threading.Thread(target=ask)
        asker.start()
        wait_for(lambda: any(int(row["in_flight"] or 0) for row in cluster.status()[1:]))
        os.kill(int(pid or 0), signal.SIGTERM)
        os.kill(int(pid or 0), signal.SIGCONT)
        asker.join(5)
        assert not asker.is_alive()
        assert isinstance(answers[0], NotPrimaryError)  # 91, which drivers retry
        assert client.night.c.find_one() == {"_id": 1}


def test_reads_do_not_wait_behind_a_connection_that_stands_still(new_cluster: NewCluster) -> None:
    """Point reads share a connection: when its backend hangs, they are served by others."""
    cluster = new_cluster(**{"ferretdb.workers": "1", "ferretdb.pool_min_conns": "4"})
    with MongoClient[Document](cluster.uri, retryReads=False, **CLIENT_OPTIONS | {"socketTimeoutMS": 3000}) as client:
        client.night.c.insert_many([{"_id": number} for number in range(10)])

        def read(number: int) -> int:
            return int((client.night.c.find_one({"_id": number % 10}) or {"_id": -1})["_id"])

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(read, range(200)))

            def none_waits() -> bool:
                """Whichever connection stands still."""
                for (pid,) in cluster.psql("select pid from pg_stat_activity where application_name = 'pg_ferret'"):
                    # One after the other they are quick again, whatever the last stop has cost, and so they share.
                    assert list(map(read, range(40))) == [number % 10 for number in range(40)]
                    os.kill(int(pid or 0), signal.SIGSTOP)
                    try:
                        assert list(pool.map(read, range(40))) == [number % 10 for number in range(40)]
                    except NetworkTimeout:
                        return False
                    finally:
                        os.kill(int(pid or 0), signal.SIGCONT)
                return True

            # A busy machine makes them seem slow now and then: each then has a connection of its own, the hanging one,
            # too.  The one that they share stands still each time.
            assert any(none_waits() for _ in range(4))


def test_how_a_supervisor_ended_is_told_truly(new_cluster: NewCluster) -> None:
    cluster = new_cluster()
    os.kill(int(cluster.status()[0]["pid"] or 0), signal.SIGTERM)
    wait_for(lambda: cluster.status()[0]["restarts"] == "1" and cluster.status()[0]["state"] == "ready")
    assert cluster.status()[0]["last_exit"] == "exit 0"


def test_monitors_read_what_they_need_and_change_nothing(cluster: Cluster) -> None:
    as_monitor = "begin; create role watcher in role pg_monitor; set local role watcher;"
    counted = cluster.psql(f"{as_monitor} select count(*) from ferretdb.status where kind = 'worker'; rollback")
    assert counted == [("4",)]
    assert cluster.psql(f"{as_monitor} select name from ferretdb.settings_errors order by 1; rollback") == []
    assert cluster.psql(f"{as_monitor} select count(*) > 0 from pg_stat_activity where pid > 1; rollback") == [("t",)]
    with pytest.raises(ClusterError, match="permission denied for function restart_workers"):
        cluster.psql(f"{as_monitor} select ferretdb.restart_workers()")


def test_there_is_nothing_to_restart_without_workers(new_cluster: NewCluster) -> None:
    cluster = new_cluster()
    assert cluster.psql("select ferretdb.restart_workers()") == [("t",)]
    cluster.configure(ferretdb__enabled="off")
    wait_for(lambda: len(cluster.status()) == 1)
    with pytest.raises(ClusterError, match="pg_ferret has no workers to restart"):
        cluster.psql("select ferretdb.restart_workers()")


def test_without_its_state_nobody_is_made_to_wait(new_cluster: NewCluster) -> None:
    """Clients are refused rather than accepted by a socket that no worker serves."""
    cluster = new_cluster()
    cluster.configure(ferretdb__enabled="off")
    wait_for(lambda: len(cluster.status()) == 1)
    cluster.configure(ferretdb__enabled="on", ferretdb__state_dir="/proc")
    wait_for(lambda: cluster.status()[0]["state"] == "failed")
    assert "ferretdb.state_dir: /proc" in str(cluster.status()[0]["message"])
    assert cluster.psql("select name, setting from ferretdb.settings_errors") == [("ferretdb.state_dir", "/proc")]
    assert port_is_free(cluster.port)
    cluster.configure(ferretdb__state_dir="")
    wait_for(lambda: not port_is_free(cluster.port) and answers_hello(cluster.port))


def test_fewer_workers_do_not_take_more_connections(new_cluster: NewCluster) -> None:
    """Those who leave must not take a larger part of the connections on their way."""
    cluster = new_cluster(**{"ferretdb.workers": "12", "ferretdb.pool_min_conns": "24", "max_connections": "60"})
    gateway = "select count(*) from pg_stat_activity where application_name = 'pg_ferret'"
    wait_for(lambda: int(cluster.psql(gateway)[0][0] or 0) == 24)
    cluster.configure(ferretdb__workers="2")
    most = 0
    deadline = time.monotonic() + 10
    while len(cluster.status()) > 3 and time.monotonic() < deadline:
        most = max(most, int(cluster.psql(gateway)[0][0] or 0))
    assert len(cluster.status()) == 3
    # What the two that stay have more, those who leave may still have for a moment.
    assert most <= 24 + 2 * 12
    assert "too many clients" not in cluster.log


def test_what_is_not_in_force_is_told_with_its_reason(new_cluster: NewCluster) -> None:
    cluster = new_cluster()
    assert cluster.psql("table ferretdb.settings_errors") == []
    timeout = "ferretdb.cursor_timeout", "600000"
    expected = {
        timeout: "600 s are more than documentdb.defaultCursorExpiryTimeLimitSeconds (60)",
        ("ferretdb.log_level", "loud"): "setting could not be applied, it is one of debug, info, warning, error",
        ("ferretdb.max_workers", "65"): "takes effect when PostgreSQL is restarted",
        ("ferretdb.worker_timeout", "1ms"): "setting could not be applied, the range is 1000 .. 3600000 ms",
        ("ferretdb.workers", "5000"): "setting could not be applied, the range is 0 .. 1024",
    }
    with (cluster.data / "postgresql.conf").open("a") as file:
        file.write("documentdb.defaultCursorExpiryTimeLimitSeconds = 60\n")
        file.writelines(f"{name} = '{value}'\n" for name, value in expected if name != timeout[0])
    cluster.psql("select pg_reload_conf()")

    def told() -> dict[tuple[str, str], str]:
        rows = cluster.psql("select name, setting, error from ferretdb.settings_errors order by name")
        return {(str(name), str(setting)): str(error) for name, setting, error in rows}

    wait_for(lambda: told() == expected)
    with (cluster.data / "postgresql.conf").open("a") as file:
        file.write("ferretdb.max_workers = 100000\n")  # a restart would not help
    cluster.psql("select pg_reload_conf()")
    del expected["ferretdb.max_workers", "65"]
    expected["ferretdb.max_workers", "100000"] = "setting could not be applied, the range is 1 .. 1024"
    wait_for(lambda: told() == expected)
    message = str(cluster.status()[0]["message"])
    assert all(f"{name}: {error}" in message for (name, _), error in expected.items())

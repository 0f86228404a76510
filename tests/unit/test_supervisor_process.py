"""The supervisor as a real process tree under a stand-in launcher: real forks, signals and sockets, no PostgreSQL."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pg_ferret.status import State
from tests.unit.stand_in import Launcher, free_port, gone

FAKE_GATEWAY = [str(Path(__file__).with_name("fake_gateway.py"))]


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    launcher = Launcher(FAKE_GATEWAY, tmp_path)
    yield launcher
    launcher.close()


def test_workers_serve_on_inherited_sockets(launcher: Launcher) -> None:
    launcher.configure()
    pids = launcher.ready(2)
    client = launcher.client()
    assert client.pid == pids[client.slot]
    launcher.until(lambda: launcher.slots[client.slot].get("connections") == 1)
    own = launcher.slots[0]
    assert own.message == f"pg_ferret 0.1.0 on {launcher.settings['listen_addr']}"
    launcher.until(lambda: launcher.slots[0].get("state") == State.READY)
    launcher.until(lambda: launcher.slots[0].get("cursors") == 7)
    assert launcher.slots[client.slot].get("cursors") == -1
    assert own.get("connections") == -1
    assert own.get("rss") > 1_000_000


def test_killed_worker_is_replaced_at_once_and_others_go_on(launcher: Launcher) -> None:
    launcher.configure()
    pids = launcher.ready(2)
    client = launcher.client()
    victim = 3 - client.slot
    start = time.monotonic()
    os.kill(pids[victim], signal.SIGKILL)
    launcher.until(lambda: launcher.workers().get(victim, pids[victim]) != pids[victim])
    assert time.monotonic() - start < 1
    assert client.alive()
    slot = launcher.slots[victim]
    assert (slot.last_exit, slot.get("restarts"), slot.get("generation")) == ("signal KILL", 1, 2)


def test_hung_worker_is_ended_and_replaced_and_its_stack_logged(launcher: Launcher, tmp_path: Path) -> None:
    launcher.configure(worker_timeout="1000")
    pids = launcher.ready(2)
    client = launcher.client()
    client.sock.sendall(b"hang\n")
    launcher.until(lambda: launcher.workers().get(client.slot, client.pid) != client.pid)
    assert launcher.slots[client.slot].last_exit == "signal ABRT"
    assert launcher.workers().items() >= (pids.items() - {(client.slot, client.pid)})
    assert "hang_on_purpose" in (tmp_path / "stderr").read_text()


def test_stopped_worker_is_killed_and_replaced(launcher: Launcher) -> None:
    launcher.configure(worker_timeout="1000")
    pids = launcher.ready(2)
    os.kill(pids[1], signal.SIGSTOP)
    launcher.until(lambda: launcher.workers().get(1, pids[1]) != pids[1])
    assert launcher.slots[1].last_exit == "signal ABRT"
    assert launcher.workers()[2] == pids[2]
    assert any("SIGABRT" in line and "ferretdb.worker_timeout" in line for line in launcher.lines)


def test_listen_addr_changes_without_cutting_a_connection(launcher: Launcher, tmp_path: Path) -> None:
    launcher.configure()
    pids = launcher.ready(2)
    old, new = launcher.settings["listen_addr"], f"127.0.0.1:{free_port()}"
    before = launcher.client(old)
    path = str(tmp_path / "s")
    launcher.configure(listen_addr=new, listen_unix=path, log_level="warning")
    launcher.until(lambda: launcher.connect(new))
    assert launcher.until(lambda: launcher.connect(path))
    assert os.stat(path).st_mode & 0o777 == 0o700
    launcher.until(lambda: launcher.connect(old) is None)
    launcher.until(lambda: all("log_level=warning" in launcher.message(slot) for slot in pids))
    assert before.alive()
    assert launcher.workers() == pids
    launcher.configure(listen_unix="")
    launcher.until(lambda: not os.path.exists(path))


def test_port_in_use_is_told_and_retried_while_the_rest_serves(launcher: Launcher) -> None:
    launcher.configure()
    launcher.ready(2)
    old = launcher.settings["listen_addr"]
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        launcher.configure(listen_addr=taken)
        problem = f"ferretdb.listen_addr: {taken}: Address already in use, retrying"
        launcher.until(lambda: launcher.message() == f"{problem}; listening on {old}")
        assert launcher.slots[0].get("state") == State.READY
        assert launcher.client(old).alive()
    launcher.until(lambda: launcher.message() == f"pg_ferret 0.1.0 on {taken}")
    assert launcher.client(taken).alive()
    launcher.until(lambda: launcher.connect(old) is None)
    assert sum("Address already in use" in line for line in launcher.lines) == 1


def test_without_any_address_it_is_not_ready(launcher: Launcher) -> None:
    launcher.configure(listen_addr="0.0.0.0:27017")
    launcher.until(lambda: "listening on no address" in launcher.message())
    launcher.until(lambda: len(launcher.workers(State.READY)) == 2)
    assert launcher.slots[0].get("state") == State.FAILED
    launcher.configure(listen_addr="-")
    launcher.until(lambda: launcher.slots[0].get("state") == State.READY)


def test_invalid_configuration_leaves_the_running_one(launcher: Launcher) -> None:
    launcher.configure()
    pids = launcher.ready(2)
    launcher.configure(workers="99999")
    launcher.until(lambda: "ferretdb.workers" in launcher.message())
    launcher.configure(workers="2", listen_addr="0.0.0.0:27017")
    launcher.until(lambda: launcher.message().startswith("ferretdb.listen_addr: 0.0.0.0:27017: refused"))
    assert launcher.workers() == pids


def test_workers_grow_and_shrink(launcher: Launcher) -> None:
    launcher.configure()
    first = launcher.ready(2)
    launcher.configure(workers="4")
    assert launcher.ready(4).items() >= first.items()
    launcher.configure(workers="1")
    assert launcher.ready(1) == {1: first[1]}
    assert launcher.client().pid == first[1]


def test_drain_is_bounded_by_graceful_timeout(launcher: Launcher) -> None:
    launcher.configure(workers="1", graceful_timeout="300")
    launcher.ready(1)
    client = launcher.client()
    launcher.configure(enabled="off")
    launcher.until(lambda: launcher.workers(State.DRAINING))
    assert launcher.connect() is None
    assert client.alive()
    launcher.ready(0)
    assert gone(client.pid)
    assert launcher.message() == "ferretdb.enabled is off"
    launcher.configure(enabled="on")
    launcher.ready(1)
    assert launcher.client().alive()


def test_role_reaches_the_workers(launcher: Launcher) -> None:
    launcher.configure()
    pids = launcher.ready(2)
    launcher.channel.send(b"Rstandby")
    launcher.until(lambda: all("in_recovery=True" in launcher.message(slot) for slot in pids))


def test_worker_that_cannot_boot_is_reported_once(launcher: Launcher, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    launcher.configure()
    launcher.until(lambda: launcher.slots.get(1) and launcher.slots[1].get("restarts") == 2)
    assert launcher.slots[1].last_exit == "exit 3"
    assert launcher.message(1) == "RuntimeError: broken on purpose"
    assert sum("Traceback" in line for line in launcher.lines) == 1
    launcher.until(lambda: launcher.slots[0].get("state") == State.BACKOFF)
    broken.unlink()
    launcher.configure()  # a reload doesn't wait for the backoff
    launcher.ready(2)


@pytest.mark.parametrize("order", [b"Qfast", b"Qsmart", None])
def test_stop_is_quick_and_complete(launcher: Launcher, tmp_path: Path, order: bytes | None) -> None:
    path = tmp_path / "s"
    launcher.configure(listen_unix=str(path))
    pids = launcher.ready(2)
    client = launcher.client()  # keeps its worker from leaving at once
    start = time.monotonic()
    if order:
        launcher.channel.send(order)
    else:
        launcher.process.terminate()
    assert launcher.process.wait(2) == 0
    assert time.monotonic() - start < 0.5
    launcher.until(lambda: all(map(gone, pids.values())))
    assert not path.exists()
    assert client.sock.recv(100) == b""


def test_the_launchers_death_ends_everything(launcher: Launcher) -> None:
    launcher.configure()
    pids = launcher.ready(2)
    end = time.monotonic() + 2
    launcher.channel.close()
    assert launcher.process.wait(2) == 1
    while not all(map(gone, pids.values())):
        assert time.monotonic() < end


def test_the_supervisors_death_ends_the_workers(launcher: Launcher) -> None:
    launcher.configure()
    pids = launcher.ready(2)
    os.kill(pids[2], signal.SIGSTOP)  # a stopped one must go as well
    launcher.process.kill()
    launcher.until(lambda: all(map(gone, pids.values())), 2)


def test_stale_unix_socket_of_a_killed_supervisor_is_taken_over(launcher: Launcher, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    launcher.configure(listen_unix=path)
    launcher.ready(2)
    launcher.process.kill()
    launcher.process.wait(2)
    assert os.path.exists(path)
    second = Launcher(FAKE_GATEWAY, tmp_path)
    with contextlib.closing(second):
        second.configure(listen_unix=path)
        second.ready(2)
        assert second.client(path).alive()


def test_the_module_starts_waits_for_valid_settings_and_quits(tmp_path: Path) -> None:
    launcher = Launcher(["-m", "supervisor"], tmp_path)
    with contextlib.closing(launcher):
        launcher.configure(workers="-1")
        launcher.until(lambda: 0 in launcher.slots and launcher.slots[0].get("state") == State.FAILED)
        assert "ferretdb.workers" in launcher.message()
        launcher.channel.send(b"Qfast")
        assert launcher.process.wait(2) == 0

"""A settings message checked in a process of its own: real forks."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from supervisor import vetting
from supervisor.vetting import Vetting
from tests.unit.samples import config, message

ROOT = Path(__file__).parents[2]


def test_a_valid_message_arrives_whole() -> None:
    addresses = {"listen_addr": "127.0.0.1:27017, [::1]:27018"}
    assert Vetting(message(**addresses)).result() == config(**addresses)


def test_a_refused_one_is_refused_in_the_same_words() -> None:
    with pytest.raises(ValueError) as here:
        config(workers="-1")
    with pytest.raises(ValueError) as there:
        Vetting(message(workers="-1")).result()
    assert str(there.value) == str(here.value)


@pytest.mark.parametrize("text", [message(), b"{"])
def test_nothing_is_left_of_it(text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    pids: list[int] = []
    fork = os.fork

    def noted() -> int:
        pids.append(fork())
        return pids[-1]

    monkeypatch.setattr(os, "fork", noted)
    check = Vetting(text)
    descriptor = check.socket.fileno()
    with contextlib.suppress(ValueError):
        check.result()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    with pytest.raises(ChildProcessError):
        os.waitpid(pids[0], os.WNOHANG)


def test_it_can_be_waited_for_by_poll() -> None:
    check = Vetting(message())
    poll = select.poll()
    poll.register(check.socket, select.POLLIN)
    while not check.done():
        assert poll.poll(10_000)
    assert check.result() == config()


def test_one_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vetting, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(vetting, "_verdict", lambda _: signal.pause())
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"more than 0\.2 s"):
        Vetting(message()).result()
    assert time.monotonic() - start < 5


def test_one_that_is_given_up_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vetting, "_verdict", lambda _: signal.pause())
    check = Vetting(message())
    assert not check.done()
    assert os.WTERMSIG(check.end()) == signal.SIGKILL


def accepts(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address).close()
    except ConnectionRefusedError:
        return False
    except ConnectionResetError:
        return True  # it listened when this began, and no longer when it ended
    return True


def test_it_holds_no_address_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vetting, "_verdict", lambda _: signal.pause())
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = listening.getsockname()
        check = Vetting(message())
    deadline = time.monotonic() + 10
    try:
        while accepts(address):
            assert time.monotonic() < deadline
        assert not check.done()
    finally:
        check.end()


def test_one_that_dies_tells_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vetting, "_verdict", lambda _: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RuntimeError, match="ended by signal KILL"):
        Vetting(message()).result()


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "config.check", None)
    with pytest.raises(RuntimeError, match=r"ModuleNotFoundError: .*config\.check"):
        Vetting(message()).result()


def test_no_process_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(OSError, match="temporarily unavailable"):
        Vetting(message())


def test_an_answer_larger_than_a_socket_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vetting, "_verdict", lambda _: b"-" + b"x" * 1_000_000)
    with pytest.raises(ValueError) as caught:
        Vetting(b"").result()
    assert str(caught.value) == "x" * 1_000_000


def test_the_supervisor_and_its_workers_do_without_pydantic() -> None:
    code = (
        "import sys, supervisor.boot; supervisor.boot.load_gateway(); "
        "print([name for name in sys.modules if name.partition('.')[0].startswith('pydantic')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"

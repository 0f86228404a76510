"""Listen sockets on loopback and in a temporary directory."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisor.listen import TCP_SETTING, UNIX_SETTING, Address, ListenError, Listeners, open_tcp, wanted_addresses
from tests.unit.samples import config


@pytest.fixture
def listeners() -> Iterator[Listeners]:
    listeners = Listeners()
    yield listeners
    listeners.close()


@pytest.fixture
def other() -> Iterator[socket.socket]:
    """Somebody else's server."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "s")


def port_of(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


def free_address() -> Address:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return Address(TCP_SETTING, f"127.0.0.1:{port_of(probe)}")


def unix(path: str) -> Address:
    return Address(UNIX_SETTING, path)


def mode(path: str) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


def accepts(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(path) == 0


def test_wanted_addresses() -> None:
    settings = config(listen_addr="127.0.0.1:1, [::1]:2, 127.0.0.1:1", listen_unix="/s").settings
    assert [address.text for address in wanted_addresses(settings)] == ["127.0.0.1:1", "[::1]:2", "/s"]
    assert wanted_addresses(config(listen_addr="-").settings) == []
    assert wanted_addresses(config(listen_addr="localhost:3").settings)[0].text == "127.0.0.1:3"


def test_tcp_socket_listens_and_does_not_block() -> None:
    with open_tcp(free_address().text) as sock:
        assert not sock.getblocking()
        with socket.create_connection(sock.getsockname(), timeout=5):
            pass


def test_connections_have_the_cheapest_congestion_control() -> None:
    with open_tcp(free_address().text) as sock:
        sock.setblocking(True)
        with socket.create_connection(sock.getsockname(), timeout=5), sock.accept()[0] as accepted:
            name = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    assert name.rstrip(b"\0") == b"reno"


def test_ipv6_socket_leaves_ipv4_alone() -> None:
    port = free_address().text.rpartition(":")[2]
    try:
        sock = open_tcp(f"[::1]:{port}")
    except ListenError:
        pytest.skip("no IPv6 loopback here")
    with sock, open_tcp(f"127.0.0.1:{port}"):
        assert sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1


@pytest.mark.parametrize("text", ["0.0.0.0:27017", "192.0.2.1:27017", "[::]:27017", "example.com:27017", "nonsense"])
def test_only_loopback_without_authentication(text: str) -> None:
    with pytest.raises(ListenError, match=r"^ferretdb\.listen_addr: "):
        open_tcp(text)


def test_port_in_use_names_the_setting_and_is_retried(listeners: Listeners, other: socket.socket) -> None:
    taken, free = Address(TCP_SETTING, f"127.0.0.1:{port_of(other)}"), free_address()
    assert listeners.want([taken, free], 0o700)
    assert list(listeners.sockets) == [free.text]
    problem = listeners.problems[taken.text]
    assert str(problem) == f"ferretdb.listen_addr: {taken.text}: Address already in use, retrying"
    assert problem.hint
    assert not listeners.retry()
    other.close()
    assert listeners.retry()
    assert set(listeners.sockets) == {taken.text, free.text}
    assert not listeners.problems


def test_old_address_serves_until_the_new_one_can(listeners: Listeners, other: socket.socket, path: str) -> None:
    old, taken = free_address(), Address(TCP_SETTING, f"127.0.0.1:{port_of(other)}")
    listeners.want([old, unix(path)], 0o700)
    listeners.want([taken], 0o700)  # the Unix socket's setting has no problem: it goes
    assert list(listeners.sockets) == [old.text]
    assert not os.path.exists(path)
    other.close()
    listeners.retry()
    assert list(listeners.sockets) == [taken.text]


def test_unchanged_socket_stays_open(listeners: Listeners) -> None:
    kept, second = free_address(), free_address()
    listeners.want([kept], 0o700)
    sock = listeners.sockets[kept.text]
    assert not listeners.want([kept], 0o700)
    assert listeners.want([second, kept], 0o700)
    assert listeners.sockets[kept.text] is sock


def test_disabling_closes_all_even_with_a_problem(listeners: Listeners, other: socket.socket, path: str) -> None:
    taken = Address(TCP_SETTING, f"127.0.0.1:{port_of(other)}")
    listeners.want([free_address(), taken, unix(path)], 0o700)
    listeners.want([], 0o700)
    assert (listeners.sockets, listeners.problems, os.path.exists(path)) == ({}, {}, False)


@pytest.mark.parametrize("umask", [0o077, 0])
def test_unix_socket_has_the_mode_asked_for_under_any_umask(listeners: Listeners, path: str, umask: int) -> None:
    before = os.umask(umask)
    try:
        listeners.want([unix(path)], 0o770)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert mode(path) == 0o770
    assert not listeners.want([unix(path)], 0o700)
    assert mode(path) == 0o700
    assert accepts(path)


def test_unix_socket_has_its_mode_from_the_start(
    listeners: Listeners, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(os, "chmod", lambda path, _: seen.append(mode(path)))
    listeners.want([unix(path)], 0o770)
    assert seen == [0o770]


def test_stale_unix_socket_is_replaced(listeners: Listeners, path: str) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
        dead.listen()
    listeners.want([unix(path)], 0o700)
    assert accepts(path)


def test_living_unix_socket_is_left_alone(listeners: Listeners, path: str) -> None:
    with socket.socket(socket.AF_UNIX) as living:
        living.bind(path)
        living.listen()
        listeners.want([unix(path)], 0o700)
        assert str(listeners.problems[path]) == f"ferretdb.listen_unix: {path}: Address already in use, retrying"
        assert accepts(path)


def test_a_file_that_is_no_socket_is_left_alone(listeners: Listeners, path: str) -> None:
    Path(path).write_text("precious")
    listeners.want([unix(path)], 0o700)
    listeners.close()
    assert Path(path).read_text() == "precious"


def test_a_successors_unix_socket_is_not_removed(listeners: Listeners, path: str) -> None:
    listeners.want([unix(path)], 0o700)
    os.unlink(path)
    with socket.socket(socket.AF_UNIX) as successor:
        successor.bind(path)
        listeners.close()
        assert os.path.exists(path)


@pytest.mark.parametrize("bad", ["/nonexistent/s", "/" + "x" * 200])
def test_unusable_unix_path_names_the_setting(listeners: Listeners, bad: str) -> None:
    listeners.want([unix(bad)], 0o700)
    assert str(listeners.problems[bad]).startswith(f"ferretdb.listen_unix: {bad}: ")

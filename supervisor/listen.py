"""The listen sockets: bound once by the supervisor, inherited by every worker.

An address that can't be bound is a problem to show and to retry, never a reason to stop serving the others: the
addresses of a setting that are no longer wanted stay open until all the new ones are.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass

import structlog

from config.settings import Settings, parse_address

logger = structlog.get_logger()

TCP_SETTING = "ferretdb.listen_addr"
UNIX_SETTING = "ferretdb.listen_unix"
# The kernel cuts it to net.core.somaxconn; a burst of clients should not see refused connections.
BACKLOG = 4096
# Seconds of silence before the first probe, between probes, and how many may be lost.
_KEEPALIVE = {socket.TCP_KEEPIDLE: 120, socket.TCP_KEEPINTVL: 30, socket.TCP_KEEPCNT: 4}
_HINTS = {
    errno.EADDRINUSE: "another server listens there (ss -ltnp shows it): stop it or choose another address",
    errno.EADDRNOTAVAIL: "this machine has no such address",
    errno.EACCES: "the PostgreSQL server's user may not bind it",
    errno.EPERM: "the PostgreSQL server's user may not bind it",
    errno.ENOENT: "the directory of the socket must exist",
}


class ListenError(Exception):
    """An address can't be served now; the text says why, ``hint`` what to do."""

    def __init__(self, text: str, hint: str) -> None:
        super().__init__(text)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Address:
    """One address to listen on: the setting that asks for it, and ``host:port``, ``[host]:port`` or a path."""

    setting: str
    text: str


@dataclass(slots=True)
class _Bound:
    address: Address
    sock: socket.socket
    mode: int = 0  # of a Unix socket
    inode: tuple[int, int] | None = None  # of a Unix socket's file


def wanted_addresses(settings: Settings) -> list[Address]:
    """What the settings ask for; ``localhost`` is both loopback addresses, as far as the machine has them."""
    texts: list[str] = []
    for text in settings.listen_addr:
        host, _, port = text.rpartition(":")
        if host.lower() == "localhost":
            texts += [f"127.0.0.1:{port}"] + ([f"[::1]:{port}"] if _has_ipv6_loopback() else [])
        else:
            texts.append(text)
    addresses = [Address(TCP_SETTING, text) for text in dict.fromkeys(texts)]
    return addresses + ([Address(UNIX_SETTING, settings.listen_unix)] if settings.listen_unix else [])


class Listeners:
    """The open listen sockets and the addresses that wait to be opened."""

    def __init__(self) -> None:
        # Address -> why it isn't open; the texts name the setting.
        self.problems: dict[str, ListenError] = {}
        self._bound: dict[str, _Bound] = {}
        self._wanted: list[Address] = []
        self._mode = 0

    @property
    def sockets(self) -> dict[str, socket.socket]:
        """Address text -> listening, non-blocking socket."""
        return {text: bound.sock for text, bound in self._bound.items()}

    def want(self, addresses: list[Address], unix_mode: int) -> bool:
        """Replace the addresses to listen on; True if the open sockets have changed. ``[]`` closes all at once."""
        self._wanted = addresses
        self._mode = unix_mode
        return self.retry()

    def retry(self) -> bool:
        """Open what is wanted and isn't open, close what is no longer needed; True if something changed."""
        before = set(self._bound)
        problems: dict[str, ListenError] = {}
        for address in self._wanted:
            try:
                self._open(address)
            except ListenError as error:
                problems[address.text] = error
                self._log_problem(address, error)
        self._close_unwanted({address.setting for address in self._wanted if address.text in problems})
        self.problems = problems
        return set(self._bound) != before

    def close(self) -> None:
        """Close everything and remove the Unix socket's file."""
        self.want([], 0)

    def _open(self, address: Address) -> None:
        bound = self._bound.get(address.text)
        if address.setting == TCP_SETTING:
            if bound is None:
                self._bound[address.text] = _Bound(address, open_tcp(address.text))
        elif bound is None:
            sock, inode = open_unix(address.text, self._mode)
            self._bound[address.text] = _Bound(address, sock, self._mode, inode)
        elif bound.mode != self._mode:
            with _failing(f"{UNIX_SETTING}: {address.text}: "):
                os.chmod(address.text, self._mode)
            bound.mode = self._mode
        if bound is None:
            logger.info("listening", address=address.text)

    def _close_unwanted(self, unsettled: set[str]) -> None:
        wanted = {address.text for address in self._wanted}
        for text, bound in list(self._bound.items()):
            if text not in wanted and bound.address.setting not in unsettled:
                del self._bound[text]
                _remove_file(bound)
                bound.sock.close()
                logger.info("no longer listening", address=text)

    def _log_problem(self, address: Address, error: ListenError) -> None:
        before = self.problems.get(address.text)
        if before is None or str(before) != str(error):
            logger.warning(str(error), hint=error.hint or None)


def open_tcp(text: str) -> socket.socket:
    """A listening socket on ``127.0.0.1:27017`` or ``[::1]:27017``; raises ListenError."""
    prefix = f"{TCP_SETTING}: {text}: "
    try:
        host, port = parse_address(text)
        ip = ipaddress.ip_address(host)
    except ValueError:
        raise ListenError(
            prefix + "not an IP address and a port", "names other than localhost are not looked up"
        ) from None
    if not ip.is_loopback:
        hint = "listen on 127.0.0.1, ::1 or a Unix socket (ferretdb.listen_unix)"
        raise ListenError(prefix + "refused, there is no authentication yet: loopback addresses only", hint)
    with _failing(prefix), contextlib.ExitStack() as undo:
        family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
        sock = undo.enter_context(socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted sockets inherit these: a client whose machine has vanished is noticed.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        # The loopback has no congestion to control: the model of a network that many systems default to (BBR) costs the
        # workers 3 % there.  Reno is in every kernel and, unless the administrator says otherwise, anybody's to use.
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        if family == socket.AF_INET6:
            # Whatever net.ipv6.bindv6only says: an IPv4 address is listened on only if it is in the list.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((str(ip), port))
        sock.listen(BACKLOG)
        undo.pop_all()
    return sock


def open_unix(path: str, mode: int) -> tuple[socket.socket, tuple[int, int]]:
    """A listening Unix socket with exactly ``mode``, whatever the umask, and its file's device and inode.

    A socket file that nobody listens on, left by a killed supervisor, is replaced.  Raises ListenError.
    """
    with _failing(f"{UNIX_SETTING}: {path}: "), contextlib.ExitStack() as undo:
        # The file has its mode from the start: who finds it there need not wait for chmod.
        undo.callback(os.umask, os.umask(0o777 & ~mode))
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        with contextlib.ExitStack() as failed:
            failed.enter_context(sock)
            try:
                sock.bind(path)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or not _is_stale(path):
                    raise
                os.unlink(path)
                sock.bind(path)
            failed.callback(os.unlink, path)
            os.chmod(path, mode)  # a directory's default ACL overrules the umask; nobody can connect before listen()
            sock.listen(BACKLOG)
            status = os.stat(path)
            failed.pop_all()
    return sock, (status.st_dev, status.st_ino)


@contextlib.contextmanager
def _failing(prefix: str) -> Iterator[None]:
    """Turn an OSError into a ListenError."""
    try:
        yield
    except OSError as error:
        # "AF_UNIX path too long" is an OSError without a number.
        text = os.strerror(error.errno) if error.errno else str(error)
        raise ListenError(f"{prefix}{text}, retrying", _HINTS.get(error.errno or 0, "")) from error


def _is_stale(path: str) -> bool:
    """Whether ``path`` is a socket file that nobody listens on."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            probe.connect(path)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False  # a full backlog (EAGAIN) has somebody behind it
    return False


def _remove_file(bound: _Bound) -> None:
    """Remove a Unix socket's file, unless somebody has put another one in its place."""
    if bound.inode is None:
        return
    try:
        status = os.lstat(bound.address.text)
        if (status.st_dev, status.st_ino) == bound.inode:
            os.unlink(bound.address.text)
    except OSError:
        pass  # gone already


def _has_ipv6_loopback() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True

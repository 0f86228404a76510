"""A stand-in for the C launcher and a client of the fake gateway, for test_supervisor_process.py."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pg_ferret.status import SLOT_BYTES, Kind, Slot, State
from tests.unit.samples import SERVER, SETTINGS

ROOT = Path(__file__).parents[2]
QUICK = {"worker_timeout": "1000", "graceful_timeout": "300", "log_level": "debug"}


class Client:
    """A connection to a fake worker; knows whom it talks to."""

    def __init__(self, sock: socket.socket, address: str) -> None:
        self.sock = sock
        sock.settimeout(5)
        if address.startswith("/"):
            sock.connect(address)
        else:
            host, port = address.rsplit(":", 1)
            sock.connect((host, int(port)))
        self.slot, self.pid = map(int, sock.recv(100).split())

    def alive(self) -> bool:
        self.sock.sendall(b"hello\n")
        return self.sock.recv(100) == b"hello\n"


class Launcher:
    """What the C launcher does, as far as the supervisor sees it."""

    def __init__(self, program: list[str], state_dir: Path) -> None:
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.settings = {**SETTINGS, **QUICK, "listen_addr": f"127.0.0.1:{free_port()}", "state_dir": str(state_dir)}
        self.slots: dict[int, Slot] = {}
        self.lines: list[str] = []
        self.clients = contextlib.ExitStack()
        environment = {"PYTHONPATH": str(ROOT), "PATH": os.defpath, "LC_ALL": "C.UTF-8"}
        program = [sys.executable, "-P", *program]
        # A shell puts the channel where the launcher puts it; sh cannot redirect descriptors above 9.
        number = theirs.fileno()
        command = ["bash", "-c", f'exec 3<&{number} && exec "$@"', "launcher", *program]
        with open(state_dir / "stderr", "ab") as stderr:
            self.process = subprocess.Popen(
                command, env=environment, pass_fds=[number], stderr=stderr, start_new_session=True
            )
        theirs.close()

    def configure(self, **settings: str) -> None:
        self.settings.update(settings)
        self.channel.send(b"S" + json.dumps({"settings": self.settings, "server": SERVER}).encode())

    def until(self, condition: Callable[[], Any], seconds: float = 10.0) -> Any:
        """Take in messages until ``condition`` gives something true, and return that."""
        end = time.monotonic() + seconds
        while not (result := condition()):
            left = end - time.monotonic()
            assert left > 0, self.account()
            self.channel.settimeout(min(left, 0.05))
            with contextlib.suppress(TimeoutError, ConnectionResetError):
                self.take(self.channel.recv(300_000))
        return result

    def take(self, message: bytes) -> None:
        if message[:1] == b"s":
            index = struct.unpack_from("<i", message, 1)[0]
            assert len(message) == 5 + SLOT_BYTES
            self.slots[index] = Slot(memoryview(bytearray(message[5:])))
        elif message[:1] == b"l":
            self.lines.append(message[1:].decode())

    def account(self) -> str:
        rows = [f"{i}: {s.get('kind')} {s.get('pid')} {State(s.get('state')).name} {s.last_exit} {s.message}"
                for i, s in sorted(self.slots.items())]  # fmt: skip
        return "\n".join([*rows, *self.lines, f"exit {self.process.poll()}"])

    def workers(self, state: State = State.READY) -> dict[int, int]:
        """Slot -> pid of the workers in ``state``."""
        return {i: s.get("pid") for i, s in self.slots.items()
                if s.get("kind") == Kind.WORKER and s.get("state") == state}  # fmt: skip

    def ready(self, count: int) -> dict[int, int]:
        """Wait until exactly so many workers are ready and no other exists."""

        def settled() -> bool:
            kinds = [slot.get("kind") for slot in self.slots.values()]
            return len(self.workers()) == count == kinds.count(Kind.WORKER)

        self.until(settled)
        return self.workers()

    def message(self, index: int = 0) -> str:
        return self.slots[index].message if index in self.slots else ""

    def client(self, address: str = "") -> Client:
        """Connect, to listen_addr unless told otherwise; closed with the launcher."""
        address = address or self.settings["listen_addr"]
        family = socket.AF_UNIX if address.startswith("/") else socket.AF_INET
        return Client(self.clients.enter_context(socket.socket(family)), address)

    def connect(self, address: str = "") -> Client | None:
        try:
            return self.client(address)
        except (ConnectionError, FileNotFoundError):
            return None

    def close(self) -> None:
        self.clients.close()
        self.channel.close()
        try:
            self.process.wait(2)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def gone(pid: int) -> bool:
    """Whether the process has ended; one that only waits to be reaped has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True

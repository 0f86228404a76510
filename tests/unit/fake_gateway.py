"""A supervisor whose workers need no PostgreSQL: run by test_supervisor_process.py with the channel on descriptor 3.

A worker accepts on its listen sockets, greets each client with its slot and pid, and answers a line with itself.
The line ``crash`` ends the worker, ``hang`` stops its loop; a file ``broken`` in state_dir makes every start fail.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from pathlib import Path

from config.settings import Config
from pg_ferret.status import State
from supervisor.boot import boot
from supervisor.child import Spawn
from supervisor.prefork import Gateway

BEAT_MS = 100


class Worker:
    """One fake worker: a poll loop over listeners, clients and the control socket."""

    def __init__(self, spawn: Spawn) -> None:
        self.spawn = spawn
        self.slot = spawn.status[spawn.slot]
        self.listeners = dict(spawn.listeners)
        self.clients: dict[int, socket.socket] = {}
        self.draining = False

    def run(self) -> int:
        signal.signal(signal.SIGTERM, self.drain)
        if Path(self.spawn.config.settings.state_dir, "broken").exists():
            raise RuntimeError("broken on purpose")
        self.slot.set(state=State.READY)
        while not self.draining or self.clients:
            self.slot.beat()
            self.slot.set(connections=len(self.clients), cursors=7)
            self.turn()
        return 0

    def drain(self, *_: object) -> None:
        self.draining = True
        self.slot.set(state=State.DRAINING)
        self.replace_listeners({})

    def turn(self) -> None:
        by_number = {sock.fileno(): sock for sock in self.listeners.values()}
        poll = select.poll()
        for number in [*by_number, *self.clients, self.spawn.control.fileno()]:
            poll.register(number, select.POLLIN)
        for number, _ in poll.poll(BEAT_MS):
            if number in self.clients:
                self.answer(number)
            elif number in by_number:
                self.accept(by_number[number])
            else:
                self.obey()

    def accept(self, listener: socket.socket) -> None:
        try:
            client, _ = listener.accept()
        except OSError:
            return  # another worker was faster
        self.clients[client.fileno()] = client
        client.sendall(b"%d %d\n" % (self.spawn.slot, os.getpid()))

    def answer(self, number: int) -> None:
        line = self.clients[number].recv(1000)
        if line == b"crash\n":
            os._exit(9)
        if line == b"hang\n":
            self.hang_on_purpose()
        if line:
            self.clients[number].sendall(line)
        else:
            self.clients.pop(number).close()

    def hang_on_purpose(self) -> None:
        while True:
            pass

    def obey(self) -> None:
        message, descriptors, _, _ = socket.recv_fds(self.spawn.control, 100_000, 250)
        if not message:
            os._exit(0)
        orders = json.loads(message)
        config = Config.of(orders["config"])
        sockets = [socket.socket(fileno=number) for number in descriptors]
        self.replace_listeners(dict(zip(orders["listeners"], sockets, strict=True)))
        self.slot.message = f"log_level={config.settings.log_level} in_recovery={config.server.in_recovery}"

    def replace_listeners(self, listeners: dict[str, socket.socket]) -> None:
        for sock in self.listeners.values():
            sock.close()
        self.listeners = listeners


def load() -> Gateway:
    return Gateway(lambda spawn: Worker(spawn).run(), lambda config: Path(config.settings.state_dir))


if __name__ == "__main__":
    sys.exit(boot(socket.socket(fileno=3), load))

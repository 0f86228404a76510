"""The instance behind ``make run``, ``start``, ``stop`` and ``psql``: a Cluster in $PG_FERRET_INSTANCE.

``python3 -m dev.instance COMMAND`` inside dev/enter. What a later call has to know (the ports) is kept in the folder.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dev.cluster import Cluster, ClusterError, port_is_free, server_user

_TRY = """\
MongoDB drivers are served at {uri}, for example:

  mongosh {uri}
  dev/enter python3 -c 'from pymongo import MongoClient; print(MongoClient("{uri}").test.things.insert_one({{}}))'
  make psql {where}ARGS="-xc 'select * from ferretdb.status'"
"""


class Instance:
    """The cluster in ``directory``, its ports, and the lock that keeps two calls from starting or stopping at once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._ports_file = directory / "ports.json"
        self._uri_file = directory / "uri"

    def cluster(self) -> Cluster:
        """The cluster as last started. ClusterError if it never was."""
        try:
            ports = json.loads(self._ports_file.read_text())
        except FileNotFoundError:
            raise ClusterError("nothing was started here yet: try make start") from None
        return Cluster(self.directory, port=ports["port"], pg_port=ports["pg_port"])

    def running(self) -> Cluster | None:
        """The cluster if its server runs."""
        if not self._ports_file.exists():
            return None
        cluster = self.cluster()
        return cluster if cluster.pid is not None else None

    def start(self, port: int, pg_port: int) -> Cluster:
        """Start on these ports; returns when the gateway answers. ClusterError if it can't, or if a port is taken."""
        if not port_is_free(port):
            raise ClusterError(f"port {port} is in use: choose another, as in make start PORT={port + 1}")
        if not port_is_free(pg_port):
            raise ClusterError(f"port {pg_port} is in use: choose another, as in make start PG_PORT={pg_port + 1}")
        settings = {"listen_addresses": "127.0.0.1"}
        cluster = Cluster(self.directory, port=port, pg_port=pg_port, settings=settings)
        if not (cluster.data / "PG_VERSION").exists():
            _say("making a new database cluster")
        cluster.init()
        self._ports_file.write_text(json.dumps({"port": port, "pg_port": pg_port}))
        try:
            cluster.start()
        except (ClusterError, TimeoutError) as error:
            if cluster.pid is None:
                raise
            hint = "PostgreSQL runs: make psql reaches it, for example to reset a setting; make stop ends it"
            raise ClusterError(f"{error}\n{hint}") from None
        self.remember(cluster)
        return cluster

    def remember(self, cluster: Cluster) -> None:
        """For make uri."""
        self._uri_file.write_text(cluster.uri + "\n")

    def stop(self) -> bool:
        """Stop the server; whether one ran."""
        self._uri_file.unlink(missing_ok=True)
        cluster = self.running()
        if cluster:
            cluster.stop()
        return cluster is not None

    def forgotten(self) -> bool:
        """Whether a stop was asked for since the start."""
        return not self._uri_file.exists()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One start or stop at a time."""
        with (self.directory / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def start(instance: Instance, port: int, pg_port: int) -> int:
    """Start in the background, or find it running; the URI is the last line."""
    with instance.locked():
        cluster = instance.running()
        if cluster is None:
            cluster = instance.start(port, pg_port)
        elif (cluster.port, cluster.pg_port) != (port, pg_port):
            _say(f"runs already, on PORT={cluster.port} PG_PORT={cluster.pg_port}; make stop ends it")
        else:
            _say("runs already")
            cluster.wait()
            instance.remember(cluster)
    print(cluster.uri)
    return 0


def run(instance: Instance, port: int, pg_port: int) -> int:
    """Start, show what to try, and stop at Ctrl-C, hangup or SIGTERM. 1 if the server ended by itself."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    started = False

    def ignore_signals() -> None:
        """From now on, here and in pg_ctl, which inherits it: nothing more may interrupt the end."""
        for number in signals:
            signal.signal(number, signal.SIG_IGN)

    def end(*_: object) -> None:
        ignore_signals()
        raise KeyboardInterrupt

    for number in signals:
        signal.signal(number, end)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # dev/enter --finish holds it back until now
        with instance.locked():
            if instance.running():
                raise ClusterError("runs already: make stop ends it")
            started = True  # or half so: what is there is to be stopped
            cluster = instance.start(port, pg_port)
        print(_TRY.format(uri=cluster.uri, where=_where()))
        print(f"Ctrl-C stops it. The log is {_shown_directory()}/log", flush=True)
        while cluster.pid is not None:
            time.sleep(0.2)
        if instance.forgotten():
            _say("stopped by make stop")
            return 0
        _say(f"PostgreSQL has ended, see {_shown_directory()}/log")
        return 1
    except KeyboardInterrupt:
        return 0
    finally:
        ignore_signals()
        if started:
            with instance.locked():
                if instance.stop():
                    _say("stopped")


def stop(instance: Instance) -> int:
    """Stop; not an error if nothing runs."""
    with instance.locked():
        _say("stopped" if instance.stop() else "was not running")
    return 0


def psql(instance: Instance, arguments: list[str]) -> int:
    """Become psql on the running server. Never returns."""
    cluster = instance.running()
    if cluster is None:
        raise ClusterError("not running: try make start")
    command = cluster.psql_command(arguments)
    user, group, groups = server_user()
    if user is not None and group is not None and groups is not None:
        os.setgroups(groups)
        os.setgid(group)
        os.setuid(user)
    os.execv(command[0], command)


def _shown_directory() -> str:
    """RUN_DIR as the user knows it: inside dev/enter it has another name."""
    return os.environ.get("PG_FERRET_RUN_DIR", os.environ["PG_FERRET_INSTANCE"])


def _where() -> str:
    """What a make command has to say to mean this instance; nothing for the default one."""
    shown = _shown_directory()
    return "" if shown == os.environ.get("PG_FERRET_DEFAULT_RUN_DIR") else f"RUN_DIR={shown} "


def _say(text: str) -> None:
    print(f"pg_ferret: {text}", file=sys.stderr, flush=True)


def main() -> int:
    """The command line; see the Makefile."""
    parser = argparse.ArgumentParser(prog="python3 -m dev.instance")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "start"):
        command = commands.add_parser(name)
        command.add_argument("--port", type=int, default=27017)
        command.add_argument("--pg-port", type=int, default=5433)
    commands.add_parser("stop")
    commands.add_parser("psql").add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    instance = Instance(Path(os.environ["PG_FERRET_INSTANCE"]))
    try:
        match options.command:
            case "run":
                return run(instance, options.port, options.pg_port)
            case "start":
                return start(instance, options.port, options.pg_port)
            case "stop":
                return stop(instance)
            case _:
                return psql(instance, options.arguments[1:])  # after the "--"
    except (ClusterError, TimeoutError) as error:
        _say(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())

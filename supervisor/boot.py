"""From the first settings message to the running loop."""

from __future__ import annotations

import faulthandler
import gc
import resource
import select
import socket
import time
from collections.abc import Callable
from dataclasses import fields

import structlog

from config.settings import Config
from pg_ferret import log
from pg_ferret.status import State, StatusTable
from supervisor.channel import Channel, Closed, Verb
from supervisor.child import Spawn, die_with_parent
from supervisor.prefork import Gateway, Supervisor
from supervisor.report import REPORT_SECONDS, Reporter
from supervisor.vetting import Vetting

logger = structlog.get_logger()


def load_gateway() -> Gateway:
    """Import what every worker needs, once, before the first fork."""
    from pg_ferret import server
    from pg_ferret.state import directory

    def work(spawn: Spawn) -> int:
        return server.serve(server.Boot(**{item.name: getattr(spawn, item.name) for item in fields(Spawn)}))

    return Gateway(work, directory.prepare)


def boot(sock: socket.socket, load: Callable[[], Gateway] = load_gateway) -> int:
    """Supervise for the launcher at the other end of ``sock``; returns the exit status."""
    die_with_parent()
    faulthandler.enable()  # the launcher ends a supervisor that reports no more by SIGABRT
    log.configure(sock, "info", "supervisor")
    raise_descriptor_limit()
    channel = Channel(sock)
    try:
        first = first_config(channel, load)
    except Closed:
        return 1
    if first is None:
        return 0
    config, gateway = first
    supervisor = Supervisor(channel, config, gateway, Vetting)
    # What is loaded by now stays shared with the workers: a collection must not write to its pages.
    gc.collect()
    gc.freeze()
    return supervisor.run()


def first_config(channel: Channel, load: Callable[[], Gateway]) -> tuple[Config, Gateway] | None:
    """Wait for the first valid settings, loading meanwhile; None when asked to stop before.

    Raises Closed, and RuntimeError or OSError when settings cannot be checked.
    """
    reporter = Reporter(channel, StatusTable(0))
    reporter.own(State.STARTING, "waiting for the settings")
    poll = select.poll()
    poll.register(channel.socket, select.POLLIN)
    while True:
        reporter.report(time.monotonic())
        poll.poll(int(REPORT_SECONDS * 1000))
        for verb, body in channel.receive():
            if verb is Verb.QUIT:
                return None
            if verb is Verb.SETTINGS:
                vetting = Vetting(body)
                gateway = load()
                try:
                    return vetting.result(), gateway
                except ValueError as error:
                    logger.error("cannot start with these settings", error=str(error))
                    reporter.own(State.FAILED, str(error))


def raise_descriptor_limit() -> None:
    """Lift the soft limit to the hard one: 1024 descriptors are too few for ferretdb.max_connections."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

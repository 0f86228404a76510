"""The supervisor's loop: one deadline, one poll, everything else is decided elsewhere and done here.

``supervisor/__main__.py`` runs it.  Signal handlers only queue; the channel's messages, the children's deaths
and the clock are looked at once per round.
"""

from __future__ import annotations

import contextlib
import math
import select
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from config.settings import PREFIX, Config, SettingError
from pg_ferret import log
from pg_ferret.status import State, StatusTable
from supervisor.channel import Channel, Closed, Verb
from supervisor.child import Work
from supervisor.conflicts import conflicts
from supervisor.crew import Crew, Orders, System
from supervisor.intake import Intake, Watch
from supervisor.listen import Listeners, wanted_addresses
from supervisor.plan import Limits, deadline
from supervisor.report import Problems, Reporter, serving_message
from supervisor.vetting import Vetting

logger = structlog.get_logger()

# PostgreSQL is going down and takes our backends with it: there is nothing to drain. The launcher kills
# what is left after 300 ms.
STOP_GRACE = 0.2
STOP_LIMIT = 0.28
RETRY_SECONDS = 1.0
# A draining worker watches ferretdb.graceful_timeout itself, then closes its connections: let it finish.
DRAIN_SLACK = 1.5
# Nothing wakes us when a worker that starts becomes ready, so we look.
BRISK_SECONDS = 0.02
# Later than this, the whole machine or our process group stood still: no worker is to blame for its silence.
OVERSLEPT = 1.0
_STAYS = "the running configuration stays in force"


class Wakeup:
    """The queue of signals, and the socket that ends poll() when one arrives."""

    def __init__(self) -> None:
        self.queue: list[int] = []
        self.sockets = socket.socketpair()
        for sock in self.sockets:
            sock.setblocking(False)

    def install(self) -> None:
        """Take over the process's signals."""
        signal.set_wakeup_fd(self.sockets[1].fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, lambda received, _frame: self.queue.append(received))
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)

    def drain(self) -> list[int]:
        """The signals since the last call."""
        with contextlib.suppress(BlockingIOError):
            while self.sockets[0].recv(4096):
                pass
        queued, self.queue = self.queue, []
        return queued


@dataclass(frozen=True, slots=True)
class Gateway:
    """What the supervisor needs of pg_ferret: a worker's work, and the directory its workers share."""

    work: Work
    prepare: Callable[[Config], Path]  # may be called again: it changes nothing that is well


class Supervisor:
    """Everything there is to supervise, and the loop that does it."""

    def __init__(
        self,
        channel: Channel,
        config: Config,
        gateway: Gateway,
        vet: Callable[[bytes], Vetting],
        system: System | None = None,
    ) -> None:
        """``vet`` begins to check a message with new settings."""
        self.wakeup = Wakeup()
        self._system = system or System()
        self._channel = channel
        self._config = config
        self._gateway = gateway
        self._in_recovery: bool | None = None  # what has been heard of the role since the newest settings message
        # Every worker may have its successor beside it.
        self.table = StatusTable(2 * config.settings.max_workers)
        self.listeners = Listeners()
        self.crew = Crew(self.table, channel.socket, gateway.work, self._system)
        self.crew.private += self.wakeup.sockets
        self._problems = Problems()
        self._reporter = Reporter(channel, self.table)
        self._prepared = False
        self._look_at_state = True
        self._state_place: tuple[int, int] | None = None  # device and inode of what the workers share
        self._retry_at = 0.0
        self._awake = self._system.clock()
        self._exit: tuple[int, float] | None = None  # status, and when to wait no longer for the workers
        self._poll = select.poll()
        self._intake = Intake(vet, Watch(self._poll, self.crew.private))

    def run(self) -> int:
        """Supervise until asked to stop or until the launcher is gone; returns the exit status."""
        self._poll.register(self.wakeup.sockets[0], select.POLLIN)
        self._poll.register(self._channel.socket, select.POLLIN)
        self.wakeup.install()
        self._apply(self._config)
        while (status := self.turn()) is None:
            self._wait()
        self.close()
        return status

    def close(self) -> None:
        """Give back every socket but the channel."""
        self._intake.end()
        self.listeners.close()
        self.crew.close()
        signal.set_wakeup_fd(-1)
        for sock in self.wakeup.sockets:
            sock.close()

    def turn(self) -> int | None:
        """One round without waiting; an exit status ends the loop."""
        self._hear()
        if self.crew.reap():
            self._look_at_state = True  # somebody may have removed what the workers share
        self.crew.observe()
        now = self._system.clock()
        if not self._exit:
            self._take_settings(now)
        if self._exit and (not self.crew.alive or now >= self._exit[1]):
            return self._exit[0]
        if not self._exit and now >= self._retry_at:
            self._retry(now)
        self.crew.step(self._limits())
        self._reporter.own(self._state(), self._message())
        self._reporter.setting_errors(self._setting_errors())
        self._reporter.report(now)
        return None

    # -- what comes in ------------------------------------------------------------------------------------------

    def _hear(self) -> None:
        for number in self.wakeup.drain():
            if number in (signal.SIGTERM, signal.SIGINT):
                self._stop(0)
        if self._exit:
            return
        try:
            for verb, body in self._channel.receive():
                self._obey(verb, body)
        except Closed:
            logger.error("the launcher is gone")
            self._stop(1)

    def _obey(self, verb: Verb, body: bytes) -> None:
        if verb is Verb.QUIT:
            self._stop(0)  # smart as well as fast: a smart shutdown gets here only when the last session has left
        elif verb is Verb.ROLL:
            logger.info("replacing all workers, as ferretdb.restart_workers() asks")
            self.crew.replace_all()
        elif verb is Verb.ROLE:
            self._in_recovery = body == b"standby"
            self._apply(self._config)
        else:
            self._intake.put(body, self._system.clock())
            self._in_recovery = None

    def _take_settings(self, now: float) -> None:
        """Make new settings the running ones when they have been checked."""
        try:
            config = self._intake.take(now)
        except ValueError as error:
            self._problems.set("settings", f"{error}; {_STAYS}")
        except RuntimeError as error:
            hint = "it will be tried again; if pg_ferret or pydantic has been upgraded, end this supervisor"
            self._problems.set("settings", f"new settings cannot be checked: {error}; {_STAYS}", hint)
        else:
            if config is not None:
                self._problems.solved("settings")
                self._apply(config)

    def _apply(self, new: Config) -> None:
        """Make ``new`` the running configuration."""
        if self._in_recovery is not None:
            new = replace(new, server=replace(new.server, in_recovery=self._in_recovery))
        log.configure(self._channel.socket, new.settings.log_level, "supervisor")
        self._config = self._with_state_dir(new)
        for name, conflict in conflicts(self._config).items():
            if conflict:
                self._problems.set(name, *conflict)
            else:
                self._problems.solved(name)
        self._prepare()
        self._listen()
        self.crew.retry_now()
        self._retry_at = self._system.clock()

    def _listen(self) -> None:
        """Accept where the settings say, if there are workers to do it: a client must not wait for nobody."""
        settings = self._config.settings
        serving = settings.enabled and self._prepared
        self.listeners.want(wanted_addresses(settings) if serving else [], settings.unix_socket_permissions)
        self.crew.give(Orders(self._config, self.listeners.sockets))

    def _with_state_dir(self, new: Config) -> Config:
        """``new``, but with the running state_dir while workers share it: half of them must not move elsewhere."""
        running = self._config.settings.state_dir
        if new.settings.state_dir == running or not self.crew.alive:
            self._prepared &= new.settings.state_dir == running
            self._problems.solved("state_dir")
            return new
        text = "ferretdb.state_dir: a change takes effect when the workers are gone"
        hint = "restart PostgreSQL, or reload with ferretdb.enabled = off and then on"
        self._problems.set("state_dir", text, hint, new.settings.state_dir)
        return replace(new, settings=replace(new.settings, state_dir=running))

    def _retry(self, now: float) -> None:
        """What failed and may work by now."""
        self._retry_at = now + RETRY_SECONDS
        if self._look_at_state or not self._prepared:
            before = self._prepared
            self._prepare()
            if self._prepared and not before:
                self._listen()
        if self.listeners.problems and self.listeners.retry():
            self.crew.give(Orders(self._config, self.listeners.sockets))

    def _prepare(self) -> None:
        """Have the directory that the workers share."""
        try:
            place = self._gateway.prepare(self._config).stat()
        except Exception as error:  # whatever it is, PostgreSQL must go on and the DBA must see it
            hint = "the server's user must be able to write there"
            self._problems.set("prepare", str(error), hint, self._config.settings.state_dir)
            self._look_at_state = True
        else:
            self._problems.solved("prepare")
            self._prepared = True
            self._look_at_state = False
            self._share((place.st_dev, place.st_ino))

    def _share(self, place: tuple[int, int]) -> None:
        """The workers' shared directory is there; somebody may have removed the one they began with."""
        if self.crew.alive and self._state_place not in (None, place):
            logger.warning("the directory of ferretdb.state_dir had been removed: replacing all workers")
            self.crew.replace_all()
        self._state_place = place

    def _stop(self, status: int) -> None:
        if self._exit is None:
            self._exit = status, self._system.clock() + STOP_LIMIT
            self._intake.end()
            self.listeners.close()
            self.crew.hurry()
            with contextlib.suppress(KeyError):
                self._poll.unregister(self._channel.socket)  # no longer read: its end would wake us for ever

    # -- what follows from it -----------------------------------------------------------------------------------

    def _limits(self) -> Limits:
        settings = self._config.settings
        if self._exit:
            return Limits(0, math.inf, STOP_GRACE)
        wanted = settings.worker_count() if settings.enabled and self._prepared else 0
        graceful = settings.graceful_timeout / 1000 + DRAIN_SLACK
        worn_out = settings.max_requests, settings.max_requests_jitter
        return Limits(wanted, settings.worker_timeout / 1000, graceful, self._awake, *worn_out)

    def _state(self) -> State:
        if self._exit:
            return State.STOPPING
        if self._config.settings.enabled and self._serves_nobody():
            return State.FAILED
        seats = [seat for seat in self.crew.seats if seat.serving]
        if not self._config.settings.enabled or any(seat.process and seat.process.ready for seat in seats):
            return State.READY
        return State.BACKOFF if seats and all(seat.retry is not None for seat in seats) else State.STARTING

    def _serves_nobody(self) -> bool:
        """Whether something keeps every client away: the workers' directory, or all addresses that were asked for."""
        if "prepare" in self._problems and not self._prepared:
            return True
        return bool(self.listeners.problems) and not self.listeners.sockets

    def _message(self) -> str:
        problems = [*self._problems.texts, *map(str, self.listeners.problems.values())]
        if problems:
            return "; ".join([*problems, f"listening on {', '.join(self.listeners.sockets) or 'no address'}"])
        if not self._config.settings.enabled:
            return "ferretdb.enabled is off"
        return serving_message(self.listeners.sockets)

    def _setting_errors(self) -> list[SettingError]:
        """What is not in force as it was written: refused by PostgreSQL, refused here, or not possible now."""
        found = [_setting_error(text, value) for text, value in self._problems.values]
        found += [_setting_error(str(error), address) for address, error in self.listeners.problems.items()]
        return [*self._config.server.setting_errors, *filter(None, found)]

    def _wait(self) -> None:
        """Sleep until something arrives or is due."""
        due = [self._reporter.due, deadline(self.crew.seats, self._limits()), self._intake.due]
        if self.listeners.problems or self._look_at_state or not self._prepared:
            due.append(self._retry_at)
        if self.crew.booting(self._system.clock()):
            due.append(self._system.clock() + BRISK_SECONDS)
        if self._exit:
            due.append(self._exit[1])
        until = min(due)
        self._poll.poll(max(0, math.ceil((until - self._system.clock()) * 1000)))
        now = self._system.clock()
        if now > until + OVERSLEPT:
            self._awake = now


def _setting_error(problem: str, value: str) -> SettingError | None:
    """A problem as a row of ferretdb.settings_errors, if its text begins with a setting's name."""
    name, _, error = problem.partition(": ")
    if not name.startswith(PREFIX):
        return None
    return SettingError(name=name, setting=value, error=error.removeprefix(f"{value}: "))

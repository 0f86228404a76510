"""What a handler may touch: the client it answers and the services of the worker it runs in."""

from __future__ import annotations

from datetime import UTC, datetime

from config.settings import Config
from pg_ferret.engine.pool import Pool
from pg_ferret.state.backlog import Backlog
from pg_ferret.state.cursors import Cursors
from pg_ferret.status import StatusTable


class Counters:
    """What this worker has done since it started; copied into its status slot with each heartbeat."""

    __slots__ = ("bytes_in", "bytes_out", "errors", "in_flight", "requests")

    def __init__(self) -> None:
        self.requests = 0
        self.errors = 0
        self.in_flight = 0
        self.bytes_in = 0
        self.bytes_out = 0


class Services:
    """One worker's share of everything."""

    __slots__ = (
        "_going_on",
        "_latest",
        "backlog",
        "config",
        "counters",
        "cursors",
        "engine",
        "slot",
        "status",
        "unordered",
    )

    def __init__(self, config: Config, engine: Pool, cursors: Cursors, status: StatusTable, slot: int) -> None:
        self.config = config  # replaced by the server when the configuration changes
        self.engine = engine
        self.cursors = cursors
        self.status = status
        self.slot = slot
        self.counters = Counters()
        self.backlog = Backlog()
        # Namespaces whose finds the engine has lately read in another order than that of _id; forgotten now and then.
        self.unordered: set[bytes] = set()
        self._going_on: dict[str, str] = {}  # problem -> how it is shown, with the time it began
        self._latest = ""

    def trouble(self, text: str) -> None:
        """Show a problem as this worker's message in ferretdb.status."""
        self._latest = _stamped(text)
        self._show()

    def going_on(self, text: str, begins: bool) -> None:
        """Show a problem from its beginning to its end, beside whatever else happens."""
        if begins:
            self._going_on[text] = _stamped(text)
        else:
            self._going_on.pop(text, None)
        self._show()

    def _show(self) -> None:
        lines = [*self._going_on.values(), self._latest]
        self.status[self.slot].message = "; ".join(filter(None, lines))


def _stamped(text: str) -> str:
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC: {text}"


class Client:
    """One client connection."""

    __slots__ = ("connection_id", "peer", "services", "user")

    def __init__(self, services: Services, connection_id: int, peer: str) -> None:
        self.services = services
        self.connection_id = connection_id
        self.peer = peer  # `host:port`, or the path of the Unix socket
        self.user = b""  # nobody: there is no authentication yet

"""What make run does with an instance that runs, and with signals."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from dev.cluster import Cluster, ClusterError
from dev.instance import Instance, run

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class _Instance(Instance):
    """Without a server; signals come at the worst moments."""

    runs = False
    stopped = False

    def running(self) -> Cluster | None:
        return Cluster(self.directory, port=1, pg_port=2) if self.runs else None

    def start(self, port: int, pg_port: int) -> Cluster:
        self.runs = True
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGTERM)
        raise AssertionError("it went on")

    def stop(self) -> bool:
        signal.raise_signal(signal.SIGINT)
        assert all(signal.getsignal(number) == signal.SIG_IGN for number in _SIGNALS), "pg_ctl would end by a signal"
        self.stopped = True
        return True


def test_an_instance_that_runs_is_left_alone(tmp_path: Path) -> None:
    instance = _Instance(tmp_path)
    instance.runs = True
    with pytest.raises(ClusterError, match="runs already"):
        run(instance, 1, 2)
    assert not instance.stopped


def test_what_has_been_started_is_stopped_however_many_signals_come(tmp_path: Path) -> None:
    instance = _Instance(tmp_path)
    assert run(instance, 1, 2) == 0
    assert instance.stopped

"""How processes are scheduled, asked from the kernel."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import pytest

from dev.cluster import wait_for
from pg_ferret.engine.scheduling import Lag, Stopwatch, Work, schedule, work_of
from tests.unit.fake_line import Loop


@pytest.fixture
def pid() -> Iterator[int]:
    """An ordinary process."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process.pid
        process.kill()


def test_as_batch_work_and_ordinarily_again(pid: int) -> None:
    schedule(pid, batch=True)
    assert os.sched_getscheduler(pid) == os.SCHED_BATCH
    schedule(pid, batch=True)
    assert os.sched_getscheduler(pid) == os.SCHED_BATCH
    schedule(pid, batch=False)
    assert os.sched_getscheduler(pid) == os.SCHED_OTHER


def test_a_policy_that_somebody_chose_stays(pid: int) -> None:
    os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
    for batch in (True, False):
        schedule(pid, batch=batch)
        assert os.sched_getscheduler(pid) == os.SCHED_IDLE


def test_a_process_that_has_ended_is_passed_over(pid: int) -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    schedule(process.pid, batch=True)
    assert work_of(process.pid) is None


def test_of_its_own_work_the_file_stays_open_and_no_other(pid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    work_of(os.getpid())
    before = os.listdir("/proc/self/fd")
    wait_for(lambda: work_of(pid))
    with subprocess.Popen(["true"]) as process:
        process.wait()
    for other in (pid, process.pid):
        work_of(other)
    assert os.listdir("/proc/self/fd") == before
    monkeypatch.setattr(os, "open", None)
    first = work_of(os.getpid())
    assert first is not None
    wait_for(lambda: (work_of(os.getpid()) or first).ran > first.ran)


def test_what_a_process_has_done() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        first = wait_for(lambda: work_of(process.pid))
        assert first is not None

        def later() -> Work | None:
            done = work_of(process.pid)
            return done if done is not None and done.ran > first.ran + 0.05 else None

        then = wait_for(later)
        process.kill()
    assert then is not None
    assert then.ran < 10
    assert first.waited <= then.waited < 10


_ITS, _OURS = 1, os.getpid()


@pytest.mark.parametrize(
    ("its", "ours", "lag", "seconds"),
    [
        (Work(0.1, 0.0), Work(0.0, 0.0), 0.0, 1.0),  # the rest it has slept
        (Work(0.1, 0.6), Work(0.0, 0.0), 0.0, 0.4),
        (Work(0.1, 0.6), Work(0.0, 0.1), 0.0, 0.3),
        (Work(0.1, 0.6), Work(0.2, 0.1), 0.05, 0.25),  # this process was busy, but hardly late
        (Work(0.1, 0.6), Work(0.2, 0.1), 0.5, 0.1),
        (Work(0.1, 0.6), Work(0.0, 0.0), 0.5, 0.4),  # it cannot have been late
        (Work(0.9, 0.1), Work(1.0, 0.0), 1.0, 0.9),
    ],
)
def test_what_it_waits_for_a_processor_and_its_answer_for_us_does_not_count(
    monkeypatch: pytest.MonkeyPatch, its: Work, ours: Work, lag: float, seconds: float
) -> None:
    works = {
        _ITS: [Work(1.0, 2.0), Work(1.0 + its.ran, 2.0 + its.waited)],
        _OURS: [Work(7.0, 3.0), Work(7.0, 3.0 + ours.waited)],
    }
    times = {"monotonic": [5.0, 6.0], "thread_time": [4.0, 4.0 + ours.ran]}
    monkeypatch.setattr("pg_ferret.engine.scheduling.work_of", lambda pid: works[pid].pop(0))
    for clock, readings in times.items():
        monkeypatch.setattr(f"pg_ferret.engine.scheduling.{clock}", partial(readings.pop, 0))
    watch = Stopwatch()
    watch.start(_ITS)
    assert watch.seconds(lag) == pytest.approx(seconds)


def test_without_an_account_all_of_the_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [5.0, 6.0]
    monkeypatch.setattr("pg_ferret.engine.scheduling.work_of", lambda _: None)
    monkeypatch.setattr("pg_ferret.engine.scheduling.monotonic", lambda: times.pop(0))
    watch = Stopwatch()
    watch.start(_ITS)
    assert watch.seconds(1.0) == 1.0


def test_a_process_that_sleeps_counts_and_our_own_work_does_not(pid: int) -> None:
    wait_for(lambda: work_of(pid))
    watch = Stopwatch()
    watch.start(pid)
    began, until = time.monotonic(), time.thread_time() + 0.2
    while time.thread_time() < until:
        pass
    assert watch.seconds(1.0) < (time.monotonic() - began) / 2
    assert watch.seconds(0.0) > 0.1
    watch.start(pid)
    wait_for(lambda: watch.seconds(1.0) > 0.1)


def test_a_lag_is_the_longest_turn_and_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop()
    now = 5.0
    for clock in ("monotonic", "thread_time"):
        monkeypatch.setattr(f"pg_ferret.engine.scheduling.{clock}", lambda: now)
    lag = Lag(cast(Any, loop))
    for pause, turn, longest in (
        (0.0, 0.01, 0.01),
        (0.0, 0.06, 0.06),
        (0.0, 0.01, 0.06),
        (0.2, 0.01, 0.06),  # the next span
        (0.2, 0.02, 0.06),
        (0.05, 0.01, 0.02),  # one more
        (0.6, 0.01, 0.01),
    ):
        now += pause
        lag.look()
        now += 0.001  # of this turn it sees nothing
        loop.soon.pop(0)()
        now += turn / 2
        lag.look()  # which is too late to see all of it
        now += turn / 2
        loop.run()
        assert lag.seconds == pytest.approx(longest)

"""How processes are scheduled, asked from the kernel."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from pg_ferret.engine.scheduling import Work, schedule, work


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
    assert work(process.pid) is None


def test_what_a_process_has_done() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as echo:
        assert echo.stdin is not None
        assert echo.stdout is not None

        def call() -> Work:
            assert echo.stdin is not None
            assert echo.stdout is not None
            echo.stdin.write(b"x")
            assert echo.stdout.read(1) == b"x"
            done = work(echo.pid)
            assert done is not None
            return done

        before = call()
        for _ in range(50):
            after = call()
        assert 5 <= after.sleeps - before.sleeps <= 55
        assert 0 < after.seconds - before.seconds < 1

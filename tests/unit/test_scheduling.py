"""How processes are scheduled, asked from the kernel."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from pg_ferret.engine.scheduling import schedule


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

"""The supervisor's decisions: seats, a clock and limits in, actions out."""

from __future__ import annotations

import signal

import pytest

from supervisor import plan
from supervisor.plan import Drain, Kill, Limits, Process, Release, Seat, Start

LIMITS = Limits(wanted=2, worker_timeout=5, graceful_timeout=3)


def seats(count: int, beat: float = 0.0, draining: float | None = None) -> list[Seat]:
    return [Seat(index, Process(100 + index, 0.0, True, beat, draining)) for index in range(1, count + 1)]


def test_grows_into_the_lowest_free_seats() -> None:
    crew = [Seat(1, Process(101, 0.0)), Seat(2), Seat(3), Seat(4)]
    assert plan.decide(crew, Limits(3, 5, 5), 0.0) == [Start(crew[1]), Start(crew[2])]


def test_shrinks_waiting_seats_first_then_the_highest() -> None:
    crew = seats(3, beat=0.0)
    crew.insert(0, Seat(9, retry=50.0))
    assert plan.decide(crew, Limits(1, 5, 5), 0.0) == [Drain(crew[2]), Drain(crew[3]), Release(crew[0])]


def test_a_draining_worker_neither_counts_nor_blocks_its_successor() -> None:
    crew = [*seats(2), Seat(3)]
    assert crew[0].process is not None
    crew[0].process.draining = 0.0
    assert plan.decide(crew, LIMITS, 0.0) == [Start(crew[2])]


def test_no_free_seat_means_waiting_for_the_drain() -> None:
    crew = seats(2, draining=0.0)
    assert plan.decide(crew, LIMITS, 1.0) == []


def test_drain_ends_at_graceful_timeout() -> None:
    crew = seats(1, draining=10.0, beat=12.9)
    assert plan.decide(crew, Limits(0, 5, 3), 12.9) == []
    assert plan.deadline(crew, LIMITS) == 13.0
    (kill,) = plan.decide(crew, Limits(0, 5, 3), 13.0)
    assert isinstance(kill, Kill)
    assert kill.signal == signal.SIGKILL


def test_hung_worker_gets_abrt_then_kill() -> None:
    crew = seats(1, beat=10.0)
    limits = Limits(1, 5, 3)
    assert plan.decide(crew, limits, 15.0) == []
    (first,) = plan.decide(crew, limits, 15.1)
    assert isinstance(first, Kill)
    assert first.signal == signal.SIGABRT
    process = crew[0].process
    assert process is not None
    process.aborted = 15.1
    assert plan.decide(crew, limits, 16.0) == []
    (second,) = plan.decide(crew, limits, 16.1)
    assert isinstance(second, Kill)
    assert second.signal == signal.SIGKILL
    process.killed = True
    assert plan.decide(crew, limits, 99.0) == []


def test_silence_while_the_supervisor_slept_is_nobodys_fault() -> None:
    crew = seats(1, beat=10.0)
    assert plan.decide(crew, Limits(1, 5, 3, awake=100.0), 104.0) == []
    assert plan.decide(crew, Limits(1, 5, 3, awake=100.0), 105.5) != []


def test_a_starting_worker_has_more_patience() -> None:
    crew = [Seat(1, Process(101, 0.0, beat=0.0))]
    assert plan.decide(crew, Limits(1, 1, 3), 9.0) == []
    assert plan.decide(crew, Limits(1, 1, 3), 10.5) != []


def test_backoff_grows_to_thirty_seconds() -> None:
    crashes = [plan.backoff(count, boot_failed=False) for count in range(12)]
    assert crashes == [0, 0, 0.25, 0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    boots = [plan.backoff(count, boot_failed=True) for count in range(1, 8)]
    assert boots == [1, 2, 4, 8, 16, 30, 30]
    assert plan.backoff(10_000, boot_failed=False) == 30


def test_a_late_death_forgives_the_early_ones() -> None:
    seat = Seat(1, Process(101, born=0.0), failures=5)
    assert plan.bury(seat, None, now=100.0)
    assert (seat.failures, seat.retry, seat.restarts) == (0, 100.0, 1)


@pytest.mark.parametrize(
    ("wait_status", "text"), [(3 << 8, "exit 3"), (9, "signal KILL"), (6 | 0x80, "signal ABRT"), (0, "exit 0")]
)
def test_exit_text(wait_status: int, text: str) -> None:
    assert plan.exit_text(wait_status) == text


def roll(crew: list[Seat]) -> None:
    """Mark every worker as outdated."""
    for seat in crew:
        if seat.process:
            seat.process.outdated = True


def test_a_replacement_needs_everybody_ready() -> None:
    crew = [*seats(2), Seat(3), Seat(4)]
    roll(crew)
    assert crew[1].process is not None
    crew[1].process.ready = False
    assert plan.decide(crew, LIMITS, 0.0) == []
    crew[1].process.ready = True
    assert plan.decide(crew, LIMITS, 0.0) == [Start(crew[2])]
    crew[2].process = Process(103, 0.0)
    assert plan.decide(crew, LIMITS, 0.0) == []
    crew[2].process.ready = True
    assert plan.decide(crew, LIMITS, 0.0) == [Drain(crew[0])]


def test_a_successor_that_cannot_start_keeps_the_old_ones() -> None:
    crew = [*seats(2), Seat(3, retry=5.0), Seat(4)]
    roll(crew)
    assert plan.decide(crew, LIMITS, 1.0) == []
    assert plan.decide(crew, LIMITS, 5.0) == [Start(crew[2])]


def test_a_crash_during_a_replacement_is_mended_first() -> None:
    crew = [Seat(1, retry=0.0), *seats(3)[1:], Seat(4)]
    roll(crew[1:2])
    assert plan.decide(crew, LIMITS, 0.0) == [Start(crew[0])]


@pytest.mark.parametrize("wanted", [0, 1])
def test_shrinking_prefers_workers_that_are_to_go_anyway(wanted: int) -> None:
    crew = seats(3)
    roll(crew[:2])
    drained = [action.seat for action in plan.decide(crew, Limits(wanted, 5, 5), 0.0) if isinstance(action, Drain)]
    assert drained
    assert drained[: 1 if wanted else 3] == ([crew[0]] if wanted else [crew[2], crew[0], crew[1]])


def test_without_a_free_seat_a_replacement_waits() -> None:
    crew = seats(2)
    roll(crew)
    assert plan.decide(crew, LIMITS, 0.0) == []


@pytest.mark.parametrize(("requests", "luck", "gone"), [(99, 0.0, False), (100, 0.0, True), (120, 0.5, False)])
def test_jitter_spreads_the_replacements(requests: int, luck: float, gone: bool) -> None:
    process = Process(1, 0.0, ready=True, requests=requests, luck=luck)
    assert plan.retires(process, Limits(1, 5, 5, 0.0, max_requests=100, max_requests_jitter=50)) is gone
    assert not plan.retires(process, LIMITS)

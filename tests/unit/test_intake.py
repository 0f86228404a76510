"""Which settings message is checked, and when again."""

from __future__ import annotations

import math
import select
import socket
from collections.abc import Callable, Iterator
from typing import cast

import pytest

from config.settings import Config
from supervisor.intake import AGAIN_SECONDS, Intake, Watch
from supervisor.vetting import Vetting
from tests.unit.samples import config


class Check:
    """The check of one message; it ends when a test says so."""

    deadline = 100.0

    def __init__(self, text: bytes) -> None:
        self.text = text
        self.socket, self._other = socket.socketpair()
        self.verdict: Config | Exception | None = None
        self.ended = False

    def done(self) -> bool:
        return self.verdict is not None

    def result(self) -> Config:
        self.end()
        if isinstance(self.verdict, Config):
            return self.verdict
        assert self.verdict is not None
        raise self.verdict

    def end(self) -> None:
        self.ended = True
        self.socket.close()
        self._other.close()


class Stage:
    """An intake and the checks it has begun."""

    def __init__(self) -> None:
        self.checks: list[Check] = []
        self.watch = Watch(select.poll(), [])
        self.intake = Intake(cast(Callable[[bytes], Vetting], self._vet), self.watch)

    def _vet(self, text: bytes) -> Check:
        self.checks.append(Check(text))
        return self.checks[-1]


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.intake.end()
    assert not stage.watch.private
    assert all(check.ended for check in stage.checks)


def test_nothing_is_due_without_a_message(stage: Stage) -> None:
    assert stage.intake.due == math.inf
    assert stage.intake.take(1.0) is None


def test_a_configuration_is_taken_once(stage: Stage) -> None:
    stage.intake.put(b"a", 1.0)
    assert stage.intake.due == 1.0
    assert stage.intake.take(1.0) is None
    assert stage.intake.due == Check.deadline
    assert stage.watch.private == [stage.checks[0].socket]
    stage.checks[0].verdict = config()
    assert stage.intake.take(2.0) == config()
    assert stage.intake.take(2.0) is None
    assert stage.intake.due == math.inf


def test_the_newest_message_counts(stage: Stage) -> None:
    for text in (b"a", b"b"):
        stage.intake.put(text, 1.0)
        assert stage.intake.take(1.0) is None
    assert [(check.text, check.ended) for check in stage.checks] == [(b"a", True), (b"b", False)]


def test_what_is_refused_is_not_checked_again(stage: Stage) -> None:
    stage.intake.put(b"a", 1.0)
    stage.intake.take(1.0)
    stage.checks[0].verdict = ValueError("no")
    with pytest.raises(ValueError, match="no"):
        stage.intake.take(1.0)
    assert stage.intake.due == math.inf


def test_what_cannot_be_checked_is_tried_again_unless_there_is_a_newer_one(stage: Stage) -> None:
    stage.intake.put(b"a", 1.0)
    stage.intake.take(1.0)
    stage.checks[0].verdict = RuntimeError("no library")
    with pytest.raises(RuntimeError):
        stage.intake.take(2.0)
    assert stage.intake.due == 2.0 + AGAIN_SECONDS
    assert stage.intake.take(2.0 + AGAIN_SECONDS / 2) is None
    assert len(stage.checks) == 1
    stage.intake.take(2.0 + AGAIN_SECONDS)
    assert [check.text for check in stage.checks] == [b"a", b"a"]
    stage.checks[1].verdict = RuntimeError("no library")
    stage.intake.put(b"b", 9.0)
    stage.intake.take(9.0)
    assert stage.checks[-1].text == b"b"

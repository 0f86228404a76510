"""A settings message checked in a process of its own: real forks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from supervisor import vetting
from supervisor.vetting import Vetting, vetted
from tests.unit.samples import config, message

ROOT = Path(__file__).parents[2]


def test_a_valid_message_arrives_whole() -> None:
    assert vetted(message(listen_addr="127.0.0.1:27017, [::1]:27018")) == config(
        listen_addr="127.0.0.1:27017, [::1]:27018"
    )


def test_a_refused_one_is_refused_in_the_same_words() -> None:
    with pytest.raises(ValueError) as here:
        config(workers="-1")
    with pytest.raises(ValueError) as there:
        vetted(message(workers="-1"))
    assert str(there.value) == str(here.value)


def test_nothing_is_left_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/proc/self/fd"))
    vetted(message())
    with pytest.raises(ValueError):
        vetted(b"{")
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_one_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vetting, "_SECONDS", 0.2)
    monkeypatch.setattr(vetting, "_verdict", lambda _: signal.pause())
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="in time"):
        vetted(message())
    assert time.monotonic() - start < 5


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "config.check", None)
    with pytest.raises(RuntimeError, match=r"ModuleNotFoundError: .*config\.check"):
        vetted(message())


def test_an_answer_larger_than_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vetting, "_verdict", lambda _: b"-" + b"x" * 1_000_000)
    with pytest.raises(ValueError) as caught:
        Vetting(b"").result()
    assert str(caught.value) == "x" * 1_000_000


def test_the_supervisor_and_its_workers_do_without_pydantic() -> None:
    code = (
        "import sys, supervisor.boot; supervisor.boot.load_gateway(); "
        "print([name for name in sys.modules if name.partition('.')[0].startswith('pydantic')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"

"""The directory for the state that workers share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from config.settings import Config
from pg_ferret.errors import StateDirError
from pg_ferret.state import directory
from tests.unit.samples import config


def configured(state: Path, data: Path, started: str = "today") -> Config:
    data.mkdir(exist_ok=True)
    base = config()
    return Config(
        settings=replace(base.settings, state_dir=str(state)),
        server=replace(base.server, data_directory=str(data), started=started),
    )


def test_it_is_private_and_one_per_data_directory(tmp_path: Path) -> None:
    first = directory.prepare(configured(tmp_path, tmp_path / "a"))
    second = directory.prepare(configured(tmp_path, tmp_path / "b"))
    assert first != second
    assert first.stat().st_mode & 0o777 == 0o700


def test_equal_paths_in_two_containers_are_told_apart(tmp_path: Path) -> None:
    """The path of a data directory says nothing where each container has the same."""
    data = tmp_path / "data"
    first = directory.prepare(configured(tmp_path, data))
    data.rename(tmp_path / "elsewhere")
    assert directory.prepare(configured(tmp_path, data)) != first
    assert first.exists()


def test_what_another_version_has_written_is_of_no_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = directory.prepare(configured(tmp_path, tmp_path / "data"))
    written = place / "written"
    written.touch()
    monkeypatch.setattr(directory, "FORMAT", "another")
    directory.prepare(configured(tmp_path, tmp_path / "data"))
    assert not written.exists()


def test_a_new_postmaster_starts_afresh_and_the_same_one_goes_on(tmp_path: Path) -> None:
    place = directory.prepare(configured(tmp_path, tmp_path / "data"))
    written = place / "written"
    written.touch()
    directory.prepare(configured(tmp_path, tmp_path / "data"))
    assert written.exists()
    directory.prepare(configured(tmp_path, tmp_path / "data", "tomorrow"))
    assert not written.exists()


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    occupied = directory.path(configured(tmp_path, tmp_path / "data"))
    occupied.touch()
    with pytest.raises(StateDirError, match=r"ferretdb\.state_dir: .*pg_ferret\."):
        directory.prepare(configured(tmp_path, tmp_path / "data"))
    with pytest.raises(StateDirError, match=r"ferretdb\.state_dir"):
        directory.prepare(configured(tmp_path / "missing", tmp_path / "data"))


def test_a_link_laid_by_somebody_else_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    directory.path(configured(tmp_path, tmp_path / "data")).symlink_to(elsewhere)
    with pytest.raises(StateDirError, match="belongs to another user"):
        directory.prepare(configured(tmp_path, tmp_path / "data"))

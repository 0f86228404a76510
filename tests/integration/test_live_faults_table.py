"""The table of faults in short, and every setting changed under load (``make faults`` does it at length)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from config.settings import gucs
from tests.faults.load import Load
from tests.faults.runner import FAULTS, Fault, run
from tests.faults.settings import CHANGES, Change, apply
from tests.faults.stage import Stage, new_cluster

# Here it counts that all comes back; how fast is for make faults, on a machine that does nothing else.
_PATIENCE = 5.0
# Covered at length by make faults: on a machine busy with tests their figures mean nothing, and settings come below.
ONLY_MEASURED = {
    "10,000 idle and 500 active clients",
    "clients that never read, and never finish",
    "every setting changed and changed back",
}


@pytest.mark.parametrize(
    "fault", [item for item in FAULTS if item.name not in ONLY_MEASURED], ids=lambda item: item.name
)
def test_fault(fault: Fault) -> None:
    result = run(fault, 1, _PATIENCE)
    assert result.problems == []
    assert result.requests > 0


@pytest.fixture(scope="module")
def loaded_stage() -> Iterator[Stage]:
    """A cluster under load for the whole module."""
    cluster = new_cluster({"ferretdb.graceful_timeout": "2s"})
    try:
        cluster.start()
        load = Load(cluster.uri, writers=2, readers=2, idle=10)
        stage = Stage(cluster, load, 5.0, _PATIENCE)
        stage.until(stage.ready, "ready")
        load.start()
        yield stage
        load.stop()
        assert load.lost(cluster.uri) == 0
        assert load.wrong == []
        stage.hang_up()
    finally:
        cluster.destroy()


@pytest.mark.parametrize("item", CHANGES, ids=lambda item: item.name)
def test_setting(loaded_stage: Stage, item: Change) -> None:
    loaded_stage.problems.clear()
    apply(loaded_stage, item)
    assert loaded_stage.problems == []


def test_every_reloadable_setting_is_changed() -> None:
    live = {name for name, guc in gucs().items() if not guc.restart}
    assert {item.name for item in CHANGES} == live

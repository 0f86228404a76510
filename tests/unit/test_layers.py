"""Who may import whom (docs/architecture.md), read from the source with ast: no module is imported here."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("pg_ferret", "supervisor", "config")

# From the bottom up. A module may import from its own unit, except between the units of one row ('|'), and from
# every row below.
ROWS = (
    "config | pg_ferret.errors pg_ferret.codes pg_ferret.status pg_ferret.log pg_ferret.sockets pg_ferret.runner"
    " pg_ferret",
    "pg_ferret.wire | pg_ferret.engine",
    "pg_ferret.state",
    "pg_ferret.registry",
    "pg_ferret.commands",
    "pg_ferret.dispatch | pg_ferret.housekeeping",
    "pg_ferret.connection | pg_ferret.listener | pg_ferret.refusal",
    "pg_ferret.parking",
    "pg_ferret.server",
    "supervisor",
)
# Edges against the table, each with its reason.
EXCEPTIONS = {
    # The C struct of a status slot is generated from the Python one.
    ("config.generate", "pg_ferret.status"),
}
# Who alone may, or who may not, use a package from outside.
PSYCOPG_ONLY_IN = "pg_ferret.engine"
NO_BSON_IN = ("pg_ferret.wire", "pg_ferret.connection", "pg_ferret.dispatch")
PYDANTIC_ONLY_IN = "config.check"
# What requests run through.
WITHOUT_A_TASK = (
    "pg_ferret.connection",
    "pg_ferret.dispatch",
    "pg_ferret.commands",
    "pg_ferret.state",
    "pg_ferret.engine",
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imports(name: str) -> Iterator[str]:
    """Every module that the module imports, anywhere in it; of ours, the deepest one named."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
                outer = package.rsplit(".", node.level - 1)[0]
                base = f"{outer}.{base}".rstrip(".")
            for alias in node.names:
                deeper = f"{base}.{alias.name}"
                yield deeper if deeper in MODULES else base


def within(name: str, unit: str) -> bool:
    return name == unit or name.startswith(unit + ".")


def place(name: str) -> tuple[int, int]:
    """The row of a module of ours and its unit within the row."""
    best = ("", (-1, -1))
    for row, line in enumerate(ROWS):
        for column, units in enumerate(line.split("|")):
            for unit in units.split():
                if (name == unit or (unit != "pg_ferret" and within(name, unit))) and len(unit) > len(best[0]):
                    best = unit, (row, column)
    return best[1]


def ours(name: str) -> bool:
    return name.partition(".")[0] in PACKAGES


@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_a_place(name: str) -> None:
    assert place(name) != (-1, -1), f"{name} is in no row of ROWS"


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down_only(name: str) -> None:
    row, column = place(name)
    for target in filter(ours, imports(name)):
        if (name, target) not in EXCEPTIONS:
            target_row, target_column = place(target)
            down = target_row < row or (target_row, target_column) == (row, column)
            assert down, f"{name} imports {target}"


@pytest.mark.parametrize("name", MODULES)
def test_foreign_packages_stay_where_they_belong(name: str) -> None:
    roots = {target.partition(".")[0] for target in imports(name)}
    if not within(name, PSYCOPG_ONLY_IN):
        assert not roots & {"psycopg", "psycopg_c", "psycopg_pool"}
    if any(within(name, unit) for unit in NO_BSON_IN):
        assert not roots & {"bson", "pymongo"}, "the hot path never decodes a document"
    if name == PYDANTIC_ONLY_IN:
        roots.remove("pydantic")
    assert "pydantic" not in roots, "too large for processes that live long"
    if within(name, "config"):
        assert roots <= {*sys.stdlib_module_names, *PACKAGES}
    if within(name, "supervisor"):
        assert not roots & {"asyncio", "uvloop", "threading", "concurrent"}, "its forks must be clean"


@pytest.mark.parametrize("name", [name for name in MODULES if any(within(name, unit) for unit in WITHOUT_A_TASK)])
def test_requests_have_no_task(name: str) -> None:
    """See pg_ferret/runner.py: what needs one fails there, or ends somebody else's."""
    tree = ast.parse(MODULES[name].read_text())
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    used = {node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id == "asyncio"}
    assert not used & {"current_task", "timeout", "timeout_at", "Timeout", "wait_for", "TaskGroup"}
    assert not any(isinstance(node, ast.ImportFrom) and node.module == "asyncio" for node in ast.walk(tree))


def test_the_rule_bites() -> None:
    """The table of rows says what the design says."""
    assert place("pg_ferret.wire.bson")[0] == place("pg_ferret.engine.pool")[0]
    assert place("pg_ferret.wire.bson") != place("pg_ferret.engine.pool")
    assert place("pg_ferret.commands.reads") < place("pg_ferret.dispatch") < place("supervisor.prefork")
    assert place("pg_ferret.elsewhere") == (-1, -1)


@pytest.mark.parametrize("package", PACKAGES)
def test_our_packages_win_over_namesakes(package: str, tmp_path: Path) -> None:
    """``supervisor`` and ``config`` are names on PyPI too: started as the launcher does, ours must be found."""
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise RuntimeError('the namesake')")
    code = f"import {package}; print({package}.__file__)"
    environment = {"PYTHONPATH": str(ROOT), "PATH": os.defpath, "LC_ALL": "C.UTF-8"}
    command = [sys.executable, "-P", "-c", code]
    found = subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert Path(found.stdout.strip()) == ROOT / package / "__init__.py"

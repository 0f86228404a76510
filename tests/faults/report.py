"""The table for people, the JSON for machines, docs/reliability.md for both."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.faults.runner import Result

_COLUMNS = ("fault", "expected", "n", "p50", "max", "requests", "failed", "lost", "orphans", "leaks", "")


def seconds(value: float) -> str:
    """A time for people."""
    if not math.isfinite(value):
        return "-"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def cells(result: Result) -> tuple[str, ...]:
    """One row of the table."""
    failed = ", ".join(f"{count} x {code}" for code, count in result.failed.most_common())
    leaks = sum("grew" in problem or "left" in problem for problem in result.problems)
    figures = "; ".join(f"{name} {value:g}" for name, value in result.notes.items())
    expected = result.fault.expected + (f" ({figures})" if figures else "")
    return (
        result.fault.name,
        expected,
        str(result.rounds),
        seconds(result.p50),
        seconds(result.worst),
        str(result.requests),
        failed or "0",
        str(result.lost),
        str(result.orphans),
        str(leaks),
        "MISSED" if result.problems else "ok",
    )


def line(result: Result) -> str:
    """One row as it is printed while the run goes on."""
    row = cells(result)
    text = f"{row[-1]:6} {row[0]:44} n={row[2]:2} p50 {row[3]:>7} max {row[4]:>7} requests {row[5]:>6} failed {row[6]}"
    text += f"; lost {row[7]}, orphans {row[8]}, leaks {row[9]} ({result.seconds:.0f} s)"
    text += "".join(f"; {name} {value:g}" for name, value in result.notes.items())
    return "\n".join([text, *(f"       - {problem}" for problem in result.problems)])


def as_json(results: Sequence[Result], facts: dict[str, Any]) -> str:
    """Everything that was measured."""
    rows = [
        {
            "fault": result.fault.name,
            "expected": result.fault.expected,
            "within_seconds": result.fault.within,
            "rounds": result.rounds,
            "recoveries_seconds": [round(value, 4) for value in result.recoveries],
            "requests": result.requests,
            "failed": dict(result.failed),
            "lost": result.lost,
            "orphans": result.orphans,
            "before": asdict(result.before),
            "after": asdict(result.after),
            "figures": result.notes,
            "problems": result.problems,
        }
        for result in results
    ]
    return json.dumps({"facts": facts, "faults": rows}, indent=1) + "\n"


def page(results: Sequence[Result], facts: dict[str, Any]) -> str:
    """docs/reliability.md."""
    told = "; ".join(f"{name} {value}" for name, value in facts.items())
    table = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    table += ["| " + " | ".join(cells(result)) + " |" for result in results]
    head = Path(__file__).with_name("reliability.head.md").read_text()
    return head + f"\n{told}.\n\n" + "\n".join(table) + "\n"


def machine() -> str:
    """The processor, for the facts."""
    models = [
        row.partition(":")[2].strip() for row in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in row
    ]
    return f"{len(models)} x {models[0]}" if models else platform.machine()


def soak_line(item: dict[str, float]) -> str:
    """One sample of a soak."""
    return (
        f"{item['seconds'] / 60:5.1f} min  PSS {item['pss'] / (1 << 20):5.1f} MB  descriptors {item['descriptors']:.0f}"
        f"  PostgreSQL connections {item['connections']:.0f}  registry {item['registry_bytes'] / 1024:.0f} kB"
        f"  cursor files {item['cursor_files']:.0f}  requests {item['requests']:.0f}  failed {item['failed']:.0f}"
    )

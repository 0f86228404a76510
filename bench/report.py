"""Turns the JSON of a run into a table and a plot.

``python3 -m bench.report FILE`` prints the table; with a folder as second argument it also writes performance.json,
performance.svg and, between its two markers, performance.md there. Each figure is the median of its rounds.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from bench.figures import Cell, Key, cells, ratios_of, slowdowns
from bench.goals import BESIDE, goals
from bench.plan import LONG, LONGER, PACED_BY, TITLES, paced
from bench.plot import plot

_BEGIN, _END = "<!-- make bench writes from here -->", "<!-- to here -->"


def table(run: dict[str, Any]) -> str:
    """The Markdown between the markers."""
    more = f", of {run['rounds'] + run['more']} where a goal depends on it" if run.get("more") else ""
    found = cells(run)
    long = "; ".join(f"{TITLES[one.op]}, {one.clients} clients" for one in LONG if (one.op, one.clients) in found)
    longer = f", {LONGER} times as long for {long}" if long else ""
    versions = "; ".join(f"{name} {version}" for name, version in run["versions"].items())
    lines = [
        f"`{run['command']}` on {run['date']}: medians of {run['rounds']} rounds of {run['seconds']:g} s{more}"
        f"{longer}.",
        f"{run['machine']['cpu']}, {run['machine']['memory']}, {run['machine']['system']}; the load generator runs on"
        " the same machine.",
        f"{versions}.",
        f"Other programs took {_mean(found, 'others'):.2f} cores in those rounds, the machine's host"
        f" {_mean(found, 'stolen'):.2f} (steal). A million additions in Python took {_additions(run)}.",
        "",
        "| operation | clients | target | ops/s | p50 ms | p99 ms | p99.9 ms | CPU µs per op: gateway | PostgreSQL |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    ratios = [
        "",
        "pg_ferret divided by FerretDB (ops/s: more is better; the others: less is better): the medians of the rounds'"
        " ratios, because the machine's speed changes from round to round.",
        "",
        "| operation | clients | ops/s | least - most | p99 | CPU of gateway | CPU of PostgreSQL |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    compared = ratios_of(run)
    problems = []
    for (op, clients), row in found.items():
        for target, cell in row.items():
            if not cell.rate:
                lines.append(f"| {TITLES[op]} | {clients} | {target} | failed | | | | | |")
            else:
                milliseconds = " | ".join(f"{value / 1000:.2f}" for value in (cell.p50, cell.p99, cell.p999))
                gateway = f"{cell.gateway:,.1f}" if cell.gateway else "-"
                lines.append(
                    f"| {TITLES[op]} | {clients} | {target} | {cell.rate:,.0f} | {milliseconds}"
                    f" | {gateway} | {cell.postgres:,.1f} |"
                )
            if cell.error:
                problems.append(f"- {TITLES[op]}, {clients} clients, {target}: {cell.errors} errors, {cell.error}")
        if ratio := compared.get((op, clients)):
            rate, *others = (
                f"{statistics.median(found):.2f}" for found in (ratio.rate, ratio.p99, ratio.gateway, ratio.postgres)
            )
            extremes = f"{min(ratio.rate):.2f} - {max(ratio.rate):.2f}"
            ratios.append(f"| {TITLES[op]} | {clients} | {rate} | {extremes} | {' | '.join(others)} |")
    problems += [f"- idle clients, {idle['target']}: {idle['error']}" for idle in run["idle"] if "error" in idle]
    return (
        "\n".join(
            lines
            + ratios
            + _beside(run)
            + _memory(run)
            + goals(run)
            + _growth(run)
            + (["", "Errors:", "", *problems] if problems else [])
        )
        + "\n"
    )


def _mean(points: dict[Key, dict[str, Cell]], figure: str) -> float:
    found = [getattr(cell, figure) for row in points.values() for cell in row.values() if cell.rate]
    return sum(found) / len(found) if found else 0.0


def _additions(run: dict[str, Any]) -> str:
    """By this runs on different machines, or at different times of day, can be told apart."""
    found = sorted(run["additions"])
    return f"{statistics.median(found):.0f} ms ({found[0]:.0f} to {found[-1]:.0f})"


def _beside(run: dict[str, Any]) -> list[str]:
    ways = []
    for op, way in BESIDE.items():
        if factors := slowdowns(run, op):
            ways.append(
                f"{way}: " + ", ".join(f"{target} {statistics.median(found):.2f}" for target, found in factors.items())
            )
    if not ways:
        return []
    paced_by = ""
    if any(paced(op) for op, _ in cells(run)) and "pace" in run:
        paced_by = (
            f" Paced clients send {run['pace']:.0%} of what the slower gateway has answered"
            f" {PACED_BY.clients} of them in the same round; the time of a request counts from when it was due."
        )
    return [
        "",
        f"p99 of 63 clients' point reads beside the aggregation, divided by p99 without. {'; '.join(ways)}." + paced_by,
    ]


def _growth(run: dict[str, Any]) -> list[str]:
    """What pg_ferret's requests cost under conditions that must not matter."""
    found = cells({"samples": run.get("growth", [])})
    if not found:
        return []
    lines = [
        "",
        "pg_ferret alone, 16 clients, one condition after the other, one and two workers in turns (ops/s, and CPU µs of"
        " the gateway per operation):",
        "",
        "| condition | " + " | ".join(TITLES[op] for op, _ in found) + " |",
        "|---|" + "--:|" * len(found),
    ]
    for condition in next(iter(found.values())):
        figures = [
            f"{cell.rate:,.0f} ({cell.gateway:,.0f})" if (cell := row.get(condition)) else "" for row in found.values()
        ]
        lines.append(f"| {condition} | " + " | ".join(figures) + " |")
    return lines


def _memory(run: dict[str, Any]) -> list[str]:
    if not run["idle"]:
        return []
    counts = run["idle"][0]["clients"]
    lines = [
        "",
        "Memory (PSS of the gateway; for pg_ferret the supervisor and all workers):",
        "",
        f"| target | just started | {counts[0]:,} clients that have said hello | "
        + "".join(f"{count:,} of which each has read a document | " for count in counts)
        + "none, when these have gone | after the last round |",
        "|---|" + "--:|" * (len(counts) + 4),
    ]
    for idle in run["idle"]:
        name = idle["target"]
        fresh, loaded = run["fresh_memory"][name][0], run["loaded_memory"][name][0]
        figures = [fresh, idle.get("said_hello"), *idle["asked"]]
        figures += [None] * (len(counts) - len(idle["asked"])) + [idle["gone"], loaded]
        texts = ["failed" if figure is None else _megabytes(figure) for figure in figures]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return lines


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.0f} MB"


_PAGE = f"""# Performance

`make bench` measures pg_ferret, FerretDB and, as the limit, pgbench calling DocumentDB's function directly, all on one
PostgreSQL, in several rounds, with everything started anew before each. `make bench QUICK=1` takes about a minute and
prints the table only. All figures: [performance.json](performance.json).

![operations per second over clients, and CPU per operation](performance.svg)

{_BEGIN}
{_END}
"""


def write(source: Path, folder: Path) -> None:
    """Bring the page, the plot and the figures in ``folder`` up to date."""
    run = json.loads(source.read_text())
    page = folder / "performance.md"
    text = page.read_text() if page.exists() else _PAGE
    before, found, rest = text.partition(_BEGIN)
    if not found:
        raise SystemExit(f"bench: {page} has no line {_BEGIN}")
    page.write_text(f"{before}{_BEGIN}\n{table(run)}{_END}{rest.partition(_END)[2]}")
    (folder / "performance.svg").write_text(plot(run))
    shutil.copyfile(source, folder / "performance.json")


def main() -> None:
    """The command line; see the Makefile."""
    source = Path(sys.argv[1])
    print(table(json.loads(source.read_text())))
    if len(sys.argv) > 2:
        write(source, Path(sys.argv[2]))


if __name__ == "__main__":
    main()

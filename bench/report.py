"""Turns the JSON of a run into a table and a plot.

``python3 -m bench.report FILE`` prints the table; with a folder as second argument it also writes performance.json,
performance.svg and, between its two markers, performance.md there. Each figure is the median of its rounds.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.plan import TITLES

_BEGIN, _END = "<!-- make bench writes from here -->", "<!-- to here -->"
# What pg_ferret divided by FerretDB is meant to be: operation, clients, ops/s at least, the gateway's CPU at most.
_GOALS = (
    ("ping", 16, 2.0, 1.0),
    ("find", 16, 1.7, 0.5),
    ("find", 64, 2.0, 0.5),
    ("insert", 16, 1.3, 0.55),
    ("update", 16, 1.3, 0.5),
    ("insertMany", 16, 1.15, 0.5),
    ("scan", 16, 1.4, 0.4),
    ("group", 16, 1.0, 1.0),
    ("connect", 16, 1.5, 1.0),
)
_GOAL_BESIDE = 1.5
# The aggregation takes one of two cores: who sends as fast as it is answered waits longer for that alone.
_BESIDE = {"find-paced": "4,000 a second", "find": "as many as are answered"}
_GOAL_MEMORY = 0.2
_COLORS = {"pg_ferret": "#2563eb", "FerretDB": "#d97706", "pgbench": "#6b7280"}


@dataclass(frozen=True)
class Cell:
    """The figures of one target at one point, each the median of its rounds. Times in microseconds."""

    rate: float
    p50: float
    p99: float
    p999: float
    gateway: float
    postgres: float
    others: float
    errors: int
    error: str


@dataclass(frozen=True)
class Ratio:
    """One target's figures divided by another's, each the median of the rounds; of ops/s the extremes as well."""

    rate: float
    least: float
    most: float
    p99: float
    gateway: float
    postgres: float


Key = tuple[str, int]
_Samples = dict[Key, dict[str, list[dict[str, Any]]]]


def _samples(run: dict[str, Any]) -> _Samples:
    """Operation and clients -> target -> what each round has given, in the order of the run."""
    found: _Samples = defaultdict(lambda: defaultdict(list))
    for sample in run["samples"]:
        found[sample["op"], sample["clients"]][sample["target"]].append(sample)
    return found


def cells(run: dict[str, Any]) -> dict[Key, dict[str, Cell]]:
    """Operation and clients -> target -> figures, in the order of the run."""
    return {key: {target: _cell(found) for target, found in row.items()} for key, row in _samples(run).items()}


def rounds(run: dict[str, Any]) -> dict[Key, dict[str, list[Cell]]]:
    """The same, round by round."""
    return {
        key: {target: [_cell([one]) for one in found] for target, found in row.items()}
        for key, row in _samples(run).items()
    }


def _cell(samples: list[dict[str, Any]]) -> Cell:
    error = next((sample["error"] for sample in samples if sample["error"]), "")
    errors = sum(sample["errors"] for sample in samples)
    if not (good := [sample for sample in samples if sample["ops"]]):
        return Cell(0, 0, 0, 0, 0, 0, 0, errors, error)

    def middle(figure: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(map(figure, good))

    return Cell(
        rate=middle(lambda sample: sample["ops"] / sample["seconds"]),
        p50=middle(lambda sample: sample["p50"]),
        p99=middle(lambda sample: sample["p99"]),
        p999=middle(lambda sample: sample["p999"]),
        gateway=middle(lambda sample: sample["gateway_cpu"] / sample["ops"] * 1e6),
        postgres=middle(lambda sample: sample["postgres_cpu"] / sample["ops"] * 1e6),
        others=middle(_disturbance),
        errors=errors,
        error=error,
    )


def _disturbance(sample: dict[str, Any]) -> float:
    """How many cores other programs took."""
    return float(sample["other_cpu"] / sample["seconds"])


def table(run: dict[str, Any]) -> str:
    """The Markdown between the markers."""
    versions = "; ".join(f"{name} {version}" for name, version in run["versions"].items())
    lines = [
        f"`{run['command']}` on {run['date']}: medians of {run['rounds']} rounds of {run['seconds']:g} s.",
        f"{run['machine']['cpu']}, {run['machine']['memory']}, {run['machine']['system']}; the load generator runs on"
        " the same machine.",
        f"{versions}.",
        f"Other programs took {_others(run):.2f} cores in those rounds.",
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
    for (op, clients), row in cells(run).items():
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
            others = " | ".join(f"{value:.2f}" for value in (ratio.p99, ratio.gateway, ratio.postgres))
            ratios.append(
                f"| {TITLES[op]} | {clients} | {ratio.rate:.2f} | {ratio.least:.2f} - {ratio.most:.2f} | {others} |"
            )
    return (
        "\n".join(
            lines
            + ratios
            + _beside(run)
            + _memory(run)
            + _goals(run)
            + _growth(run)
            + (["", "Errors:", "", *problems] if problems else [])
        )
        + "\n"
    )


def _others(run: dict[str, Any]) -> float:
    found = [cell.others for row in cells(run).values() for cell in row.values() if cell.rate]
    return sum(found) / len(found) if found else 0.0


def ratios_of(run: dict[str, Any]) -> dict[Key, Ratio]:
    """pg_ferret's figures divided by FerretDB's, where there are both."""
    found = {}
    for key, row in rounds(run).items():
        if pairs := _pairs(row.get("pg_ferret", []), row.get("FerretDB", [])):
            rates = [ours.rate / theirs.rate for ours, theirs in pairs]
            found[key] = Ratio(
                rate=statistics.median(rates),
                least=min(rates),
                most=max(rates),
                p99=statistics.median(ours.p99 / theirs.p99 for ours, theirs in pairs),
                gateway=statistics.median(_quotient(ours.gateway, theirs.gateway) for ours, theirs in pairs),
                postgres=statistics.median(_quotient(ours.postgres, theirs.postgres) for ours, theirs in pairs),
            )
    return found


def _pairs(ours: list[Cell], theirs: list[Cell]) -> list[tuple[Cell, Cell]]:
    """Two rows of rounds side by side, without the rounds in which one of them failed."""
    return [(one, other) for one, other in zip(ours, theirs, strict=False) if one.rate and other.rate]


def _quotient(ours: float, theirs: float) -> float:
    return ours / theirs if theirs else float("nan")


def _slowdowns(run: dict[str, Any], op: str) -> dict[str, float]:
    """How much later each target answers point reads while one of the clients aggregates."""
    found = rounds(run)
    with_it, without = found.get((f"{op}-beside", 64), {}), found.get((op, 64), {})
    slowdowns = {}
    for target, samples in with_it.items():
        if pairs := _pairs(samples, without.get(target, [])):
            slowdowns[target] = statistics.median(beside.p99 / alone.p99 for beside, alone in pairs)
    return slowdowns


def _beside(run: dict[str, Any]) -> list[str]:
    ways = []
    for op, way in _BESIDE.items():
        if slowdowns := _slowdowns(run, op):
            ways.append(f"{way}: " + ", ".join(f"{target} {factor:.2f}" for target, factor in slowdowns.items()))
    if not ways:
        return []
    return ["", f"p99 of 63 clients' point reads beside the aggregation, divided by p99 without. {'; '.join(ways)}."]


def _goals(run: dict[str, Any]) -> list[str]:
    """What was aimed at, and whether it is reached."""
    compared = ratios_of(run)
    lines = ["", "Goals:", "", "| pg_ferret divided by FerretDB | aimed at | measured | |", "|---|--:|--:|---|"]

    def goal(name: str, aim: float, figure: float, least: bool = False) -> None:
        reached = figure >= aim if least else figure <= aim
        sign = "≥" if least else "≤"
        lines.append(f"| {name} | {sign} {aim:g} | {figure:.2f} | {'reached' if reached else '**missed**'} |")

    for op, clients, rate, gateway in _GOALS:
        if ratio := compared.get((op, clients)):
            goal(f"{TITLES[op]}, {clients} clients: ops/s", rate, ratio.rate, least=True)
            goal(f"{TITLES[op]}, {clients} clients: CPU of gateway", gateway, ratio.gateway)
            goal(f"{TITLES[op]}, {clients} clients: p99", 1.0, ratio.p99)
    fresh = {name: figures[0] for name, figures in run["fresh_memory"].items() if run["idle"]}
    idle = {sample["target"]: sample["gateway"] for sample in run["idle"] if not sample["error"]}
    gone = {sample["target"]: sample["gateway_gone"] for sample in run["idle"] if not sample["error"]}
    states = {"just started": fresh, "with idle clients": idle, "with none, when these have gone": gone}
    for name, memory in states.items():
        if memory.get("FerretDB") and memory.get("pg_ferret"):
            goal(f"memory, {name}", _GOAL_MEMORY, memory["pg_ferret"] / memory["FerretDB"])
    for op, way in _BESIDE.items():
        if slowdown := _slowdowns(run, op).get("pg_ferret"):
            name = f"(pg_ferret alone) point reads, {way}: p99 beside an aggregation by that without"
            goal(name, _GOAL_BESIDE, slowdown)
    return lines if len(lines) > 5 else []


def _growth(run: dict[str, Any]) -> list[str]:
    """What pg_ferret's requests cost under conditions that must not matter."""
    found = cells({"samples": run.get("growth", [])})
    if not found:
        return []
    lines = [
        "",
        "pg_ferret alone, 16 clients, one condition after the other (ops/s, and CPU µs of the gateway per operation):",
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
    lines = [
        "",
        "Memory (PSS of the gateway; for pg_ferret the supervisor and all workers):",
        "",
        "| target | just started | with idle clients | kB for each | when they have gone | after all of the above |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for idle in run["idle"]:
        name = idle["target"]
        each = (idle["gateway"] - idle["gateway_before"]) / idle["clients"] / 1000
        count = f"{_megabytes(idle['gateway'])} with {idle['clients']:,}" if not idle["error"] else idle["error"]
        fresh, gone = _megabytes(run["fresh_memory"][name][0]), _megabytes(idle["gateway_gone"])
        lines.append(
            f"| {name} | {fresh} | {count} | {each:.1f} | {gone} | {_megabytes(run['loaded_memory'][name][0])} |"
        )
    return lines


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.0f} MB"


def plot(run: dict[str, Any]) -> str:
    """An SVG: ops/s over clients for find and insert, and the gateway's CPU per operation."""
    found = cells(run)
    parts = [_curve(found, "find", 0), _curve(found, "insert", 1), _bars(found)]
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 620" font-family="sans-serif" font-size="12">'
        '<rect width="900" height="620" fill="white"/>' + "".join(parts) + _legend() + "</svg>\n"
    )


def _text(x: float, y: float, text: str, anchor: str = "middle", **more: str) -> str:
    attributes = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
    escaped = text.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}"{attributes}>{escaped}</text>'


def _legend() -> str:
    return "".join(
        f'<rect x="{300 + 110 * i}" y="8" width="12" height="12" fill="{color}"/>'
        + _text(317 + 110 * i, 18, name, "start")
        for i, (name, color) in enumerate(_COLORS.items())
    )


def _curve(found: dict[Key, dict[str, Cell]], op: str, column: int) -> str:
    counts = [clients for name, clients in found if name == op]
    rows = {clients: found[op, clients] for clients in counts}
    top = max((cell.rate for row in rows.values() for cell in row.values()), default=0) * 1.1 or 1
    left, width, base, height = 60 + 440 * column, 360, 280, 210
    xs = {clients: left + width * (i + 0.5) / len(counts) for i, clients in enumerate(counts)}
    parts = [_text(left + width / 2, 50, f"{TITLES[op]}: operations per second over clients", font_weight="bold")]
    for step in range(5):
        y = base - height * step / 4
        parts.append(f'<path d="M{left} {y:.0f}h{width}" stroke="#e5e7eb"/>')
        parts.append(_text(left - 6, y + 4, f"{top * step / 4 / 1000:.1f} k", "end"))
    parts += [_text(x, base + 18, str(clients)) for clients, x in xs.items()]
    for target, color in _COLORS.items():
        dots = [(xs[clients], base - height * row[target].rate / top) for clients, row in rows.items() if target in row]
        line = " ".join(f"{x:.0f},{y:.0f}" for x, y in dots)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.0f}" cy="{y:.0f}" r="3" fill="{color}"/>' for x, y in dots]
    return "".join(parts)


def _bars(found: dict[Key, dict[str, Cell]]) -> str:
    """pg_ferret's CPU per operation in percent of FerretDB's, one bar each, at 16 clients."""
    shown = [
        (op, row["pg_ferret"].gateway / row["FerretDB"].gateway)
        for (op, clients), row in found.items()
        if clients == 16 and {"pg_ferret", "FerretDB"} <= row.keys() and row["FerretDB"].gateway
    ]
    left, width, base, height = 60, 800, 560, 190
    title = "CPU of pg_ferret per operation, FerretDB = 100 % (16 clients)"
    parts = [_text(left + width / 2, 345, title, font_weight="bold")]
    for percent in (0, 50, 100):
        y, color = base - height * percent / 110, _COLORS["FerretDB"] if percent == 100 else "#e5e7eb"
        parts.append(f'<path d="M{left} {y:.0f}h{width}" stroke="{color}"/>')
        parts.append(_text(left - 6, y + 4, f"{percent} %", "end"))
    for i, (op, ratio) in enumerate(shown):
        x, y = left + width * (i + 0.5) / len(shown), base - height * min(ratio, 1.1) / 1.1
        parts.append(
            f'<rect x="{x - 18:.0f}" y="{y:.0f}" width="36" height="{base - y:.0f}" fill="{_COLORS["pg_ferret"]}"/>'
        )
        parts.append(_text(x, y - 5, f"{ratio:.0%}"))
        parts.append(_text(x, base + 18 + 16 * (i % 2), op))
    return "".join(parts)


_PAGE = f"""# Performance

`make bench` measures pg_ferret, FerretDB and, as the limit, pgbench calling DocumentDB's function directly, all on one
PostgreSQL, one after the other at every point, in several rounds. `make bench QUICK=1` takes about a minute and prints
the table only. All figures: [performance.json](performance.json).

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

"""The plot of a run, as SVG."""

from __future__ import annotations

from typing import Any

from bench.figures import Cell, Key, cells
from bench.plan import TITLES

_COLORS = {"pg_ferret": "#2563eb", "FerretDB": "#d97706", "pgbench": "#6b7280"}


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

"""What the template shows of consent audits: shares by agent, the timeline, the domain view, terms of service."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from minitron_cli.drawing.format import count, number, percent
from minitron_cli.drawing.frame import frame
from minitron_cli.drawing.svg import CHARACTER, WIDE, apart, both, chart, el, join, line, marker, polyline, text
from minitron_cli.report.gather import RunFiles, records, table

STATUSES = {
    "disallowed": "disallowed",
    "allowed": "allowed",
    "no_robots": "no robots.txt (4xx)",
    "unknown": "unknown",
    "bad_url": "malformed URL",
}
EXTENTS = {"full": "full", "some": "some", "none": "none", "no_robots": "no robots.txt", "unknown": "unknown"}
BARS, LINES = 16, 5
"""Agents and organisations that are drawn: those that are disallowed most."""

STYLES = ("student", "cross-entropy", "scratch", "pruned", "teacher")
"""Colours and markers of the lines, in the order of their ends."""


def consent(files: RunFiles) -> list[dict[str, Any]] | None:
    """One entry per audited corpus; None where there was no audit."""
    found = [_audit(source, summary) for source, summary in files.consent.items() if table(summary.get("status"))]
    return found or None


def _audit(source: str, summary: dict[str, Any]) -> dict[str, Any]:
    unit = "documents" if number(summary.get("tokens")) is None else "tokens"
    whole = number(summary.get(unit)) or 0.0
    agents = table(summary.get("agents"))
    order = sorted(agents, key=lambda name: -_cell(agents[name], "disallowed", unit))
    rows = [("any of them", table(summary.get("status")))] + [(name, table(agents[name])) for name in order[:BARS]]
    more = f" {len(order) - BARS} further agents are in summary.json." if len(order) > BARS else ""
    policy = table(summary.get("policy"))
    months = records(table(summary.get("domains")).get("timeline"))
    return {
        "source": source,
        "lead": _lead(summary, unit, whole),
        "legend": _legend(),
        "bars": both(lambda width: status_bars(rows, unit, whole, width)),
        "caption": f"Shares of {unit}; {_counted(summary)}policy as of {policy.get('as_of')}, captured "
        f"{policy.get('first')} to {policy.get('last')}.{more}",
        "timeline": both(lambda width: timeline(months, unit, width)) if len(months) > 1 else None,
        "timeline_caption": f"Share of {unit} on domains whose robots.txt, as it stood at the end of the month, closes "
        "the whole site to at least one agent of the organisation. Domains without a capture by then count as open.",
        "tables": [
            block for block in (_domains(summary, unit), _terms(summary), _sources(summary, unit, whole)) if block
        ],
    }


def _counted(summary: dict[str, Any]) -> str:
    return "tokens estimated from bytes; " if summary.get("tokens_from") == "bytes" else ""


def _cell(row: Any, status: str, unit: str) -> float:
    return number(table(table(row).get(status)).get(unit)) or 0.0


def _lead(summary: dict[str, Any], unit: str, whole: float) -> str:
    """One sentence on the whole corpus, and one on the filter."""
    status = table(summary.get("status"))
    shares = {name: percent(_cell(status, name, unit), whole) for name in STATUSES}
    free = percent(_cell(status, "allowed", unit) + _cell(status, "no_robots", unit), whole)
    said = (
        f"Of {count(whole)} {unit}, {free} may be used by all {len(table(summary.get('agents')))} agents, "
        f"{shares['disallowed']} are disallowed for at least one, and the policy of {shares['unknown']} is unknown."
    )
    kept = table(summary.get("filter"))
    if kept:
        said += f" The filter kept {percent(kept.get(unit), whole)} (unknown: {kept.get('unknown')})."
    return said


def _legend() -> Markup:
    swatch = [
        el("span", el("svg", el("rect", width="100%", height="100%", class_=name), aria_hidden="true") + label)
        for name, label in STATUSES.items()
    ]
    return el("p", join(swatch), class_="legend")


def status_bars(rows: Sequence[tuple[str, dict[str, Any]]], unit: str, whole: float, width: int) -> Markup:
    """One stacked bar per agent: disallowed first, so that these can be compared; its share at the end."""
    pitch, bar, top = 24.0, 15.0, 4.0
    room = 24 if width == WIDE else 17
    names = [name if len(name) <= room else name[: room - 1] + "…" for name, _ in rows]
    left = 10 + CHARACTER * max(map(len, names))
    right = width - 62.0
    parts, said = [], []
    for place, (name, (full, row)) in enumerate(zip(names, rows, strict=True)):
        y = top + place * pitch + (8 if place else 0)  # the row of all agents stands apart
        parts.append(text(left - 8, y + 12, name, anchor="end", class_=None if place else "value"))
        x = left
        for status, label in STATUSES.items():
            share = _cell(row, status, unit) / whole if whole else 0.0
            if share:
                tip = el("title", f"{full}: {percent(share, 1, 2)} {label}")
                wide = max(share * (right - left), 0.4)
                parts.append(el("rect", tip, x=x, y=y, width=wide, height=bar, class_=status))
                x += share * (right - left)
        shown = percent(_cell(row, "disallowed", unit), whole)
        parts.append(text(right + 8, y + 12, shown, class_="value"))
        said.append(f"{full} {shown}")
    return chart(width, top + len(rows) * pitch + 8, f"Disallowed shares of {unit}: {', '.join(said)}.", parts)


def timeline(months: Sequence[dict[str, Any]], unit: str, width: int) -> Markup:
    """Share fully disallowed over months, one line per organisation; names at the ends."""
    series = {
        name: [_share(table(month.get("organisations")).get(name), unit) for month in months]
        for name in table(months[-1].get("organisations"))
    }
    names = sorted(series, key=lambda name: -series[name][-1])[:LINES]
    shown = [f"{name} {series[name][-1]:.1f}" for name in names]
    height = 300
    right = width - 20 - CHARACTER * max(map(len, shown), default=0)
    box = (44.0, 34.0, right, height - 44.0)
    values = [value for name in names for value in series[name]]
    axes = frame(box, [0.0, float(len(months) - 1)], [0.0, *values], ("", f"% of {unit}"), numbered=False)
    parts = [axes.grid]
    every = max(1, -(-len(months) * 60 // int(right - 44)))
    for place in range(0, len(months), every):
        parts.append(text(axes.x(place), box[3] + 18, str(months[place].get("month")), anchor="middle"))
    heights = apart([axes.y(series[name][-1]) for name in names], 16, box[1], box[3])
    for name, style, label, y in zip(names, STYLES, shown, heights, strict=False):
        points = [(axes.x(place), axes.y(value)) for place, value in enumerate(series[name])]
        parts.append(polyline(points, f"stroke {style}"))
        parts += [marker(style, px, py, f"fill {style}") for px, py in points] if len(points) <= 40 else []
        parts.append(line(right + 3, axes.y(series[name][-1]), right + 11, y, f"stroke thin {style}"))
        parts.append(text(right + 14, y + 4, label, class_=f"name {style}"))
    return chart(width, height, f"Fully disallowed in the last month, %: {', '.join(shown)}.", parts)


def _share(row: Any, unit: str) -> float:
    total = sum(_cell(row, extent, unit) for extent in EXTENTS)
    return 100 * _cell(row, "full", unit) / total if total else 0.0


def _domains(summary: dict[str, Any], unit: str) -> dict[str, Any] | None:
    """The domain view by organisation; `full` for head and tail too."""
    found = table(summary.get("domains"))
    scopes = {name: table(found.get(name)) for name in ("all", "head", "tail")}
    totals = {name: number(scope.get(unit)) or 0.0 for name, scope in scopes.items()}
    rows = []
    for name, row in table(scopes["all"].get("organisations")).items():
        cells = [percent(_cell(row, extent, unit), totals["all"]) for extent in EXTENTS]
        cells += [
            percent(_cell(table(scopes[scope].get("organisations")).get(name), "full", unit), totals[scope])
            for scope in ("head", "tail")
        ]
        rows.append([name, *cells])
    if not rows:
        return None
    head = count(found.get("head_domains"))
    return {
        "title": f"Domains by organisation, % of {unit}",
        "open": True,
        "head": ["organisation", *EXTENTS.values(), "full, head", "full, tail"],
        "rows": rows,
        "note": f"full: the robots.txt closes the whole site to at least one agent of the organisation; some: parts of "
        f"it. {count(scopes['all'].get('domains'))} domains; head: the {head} largest by {unit}.",
    }


def _terms(summary: dict[str, Any]) -> dict[str, Any] | None:
    """Robots.txt (rows) against terms of service (columns)."""
    found = table(summary.get("terms"))
    cells, codes = table(found.get("cells")), table(found.get("codes"))
    total = sum(number(value) or 0.0 for row in cells.values() for value in table(row).values())
    if not cells or not total:
        return None
    rows = [
        [EXTENTS.get(name, name), *(percent(table(row).get(code, 0), total) for code in codes)]
        for name, row in cells.items()
    ]
    stricter = [100 * (number(found.get(key)) or 0.0) for key in ("terms_stricter", "robots_stricter")]
    return {
        "title": f"robots.txt against terms of service, % of {found.get('weight')}",
        "open": True,
        "head": ["robots.txt", *codes.values()],
        "rows": rows,
        "note": f"Terms forbid what robots.txt leaves open: {stricter[0]:.1f} %; robots.txt forbids what terms leave "
        f"open: {stricter[1]:.1f} %. {count(found.get('annotated_domains'))} domains are annotated.",
    }


def _sources(summary: dict[str, Any], unit: str, whole: float) -> dict[str, Any] | None:
    """What refuses, and how often signals contradict each other."""
    found = table(summary.get("refused_by"))
    if not found:
        return None
    rows = [[name, count(cell.get("documents")), percent(cell.get(unit), whole)] for name, cell in found.items()]
    return {
        "title": "Refusals by source",
        "open": False,
        "head": ["source", "documents", f"% of {unit}"],
        "rows": rows,
        "note": f"{count(table(summary.get('conflicts')).get('documents'))} documents have signals that contradict "
        "each other; a document may be refused by several sources.",
    }

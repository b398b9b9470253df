"""Small stores and corpora for tests of the consent audit, and a slow audit in plain loops to compare with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from minitron_cli.config.audit import AuditConfig
from minitron_cli.data.consent.stage import run_audit
from minitron_cli.data.consent.store import Capture, StoreWriter
from minitron_cli.data.robots import RobotsTxt

AGENTS = ("GPTBot", "CCBot", "ClaudeBot", "Google-Extended")

BLOCK_AI = "User-agent: GPTBot\nUser-agent: CCBot\nDisallow: /\n\nUser-agent: *\nDisallow: /private/\n"
OPEN = "User-agent: *\nDisallow:\n"


def seconds(date: str) -> int:
    """Unix time of a day's noon."""
    return int(datetime.fromisoformat(date).replace(hour=12, tzinfo=UTC).timestamp())


def make_store(path: Path, captures: Iterable[Capture]) -> Path:
    with StoreWriter(path) as writer:
        for capture in captures:
            writer.add(capture)
    return path


def site(
    authority: str, body: str | bytes = "", *, date: str = "2025-06-15", status: int = 200, **more: Any
) -> Capture:
    return Capture(authority, seconds(date), status, body.encode() if isinstance(body, str) else body, **more)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def audit(source: Path, store: Path, out: Path, **options: Any) -> dict[str, Any]:
    options = {"agents": AGENTS, "workers": 1, **options}
    return run_audit(AuditConfig(source=str(source), robots=store, out=out, **options)).to_json()


def slow_audit(
    rows: Iterable[tuple[str, str, int]], bodies: Mapping[str, tuple[int, bytes]], agents: Iterable[str]
) -> dict[str, Any]:
    """Counts by dictionaries and one `RobotsTxt.verdict` per URL and agent.

    `rows`: (URL, its authority or "" where it is malformed, tokens). `bodies`: authority to the latest answer.
    """
    names = ("allowed", "disallowed", "no_robots", "unknown", "bad_url")
    status = {name: {"documents": 0, "tokens": 0} for name in names}
    table = {agent: {name: {"documents": 0, "tokens": 0} for name in names} for agent in agents}
    parsed = {site: (code, RobotsTxt.parse(body)) for site, (code, body) in bodies.items()}
    for url, authority, tokens in rows:
        states = {}
        for agent in table:
            if not authority:
                state = "bad_url"
            elif authority not in parsed:
                state = "unknown"
            else:
                code, robots = parsed[authority]
                if code == 200 and robots.rejected is None:
                    state = "allowed" if robots.verdict(url, agent).allowed else "disallowed"
                else:
                    state = "no_robots" if 400 <= code < 500 and code != 429 else "unknown"
            states[agent] = state
            table[agent][state]["documents"] += 1
            table[agent][state]["tokens"] += tokens
        whole = "disallowed" if "disallowed" in states.values() else next(iter(states.values()))
        status[whole]["documents"] += 1
        status[whole]["tokens"] += tokens
    return {"status": status, "agents": table}

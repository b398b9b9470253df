"""`minitron data ...`"""

from __future__ import annotations

from typing import Any

import typer

from minitron_cli.cli.command import add_stage
from minitron_cli.config.audit import AuditConfig, RobotsFetchConfig, RobotsImportConfig, TermsConfig
from minitron_cli.config.data import DataConfig

_STATUS = {
    "allowed": "allowed",
    "disallowed": "disallowed",
    "no_robots": "no robots.txt (4xx)",
    "unknown": "unknown",
    "bad_url": "malformed URL",
}
_AGENT_ROWS = 12


def _run(config: DataConfig) -> Any:
    from minitron_cli.data.prepare import run_data

    return run_data(config)


def _show(result: dict[str, Any]) -> str:
    lines = [f"{result['out']}: {result['tokens']:,} tokens of {result['documents']:,} documents"]
    for name, split in result["splits"].items():
        lines.append(f"  {name:<11}{split['sequences']:>9,} sequences  {split['tokens']:>13,} tokens")
    return "\n".join(lines)


def _audit(config: AuditConfig) -> Any:
    from minitron_cli.data.consent.stage import run_audit

    return run_audit(config)


def _show_audit(result: dict[str, Any]) -> str:
    """Status, the agents that are disallowed most, and what the filter kept."""
    counted = {"bytes": " (tokens estimated as bytes / 4)", "none": " (tokens unknown)"}.get(result["tokens_from"], "")
    policy = result["policy"]
    lines = [f"{result['out']}: {result['documents']:,} documents{counted}; policy as of {policy['as_of']}, captured "
             f"{policy['first']} to {policy['last']}"]  # fmt: skip
    lines.append(_line("", "documents", "", "tokens", ""))
    for status, label in _STATUS.items():
        lines.append(_counts(label, result["status"][status], result))
    weight = "documents" if result["tokens"] is None else "tokens"
    agents = sorted(result["agents"].items(), key=lambda item: -item[1]["disallowed"][weight])
    shown = [item for item in agents if item[1]["disallowed"]["documents"]][:_AGENT_ROWS]
    if shown:
        lines.append(_line("disallowed for", "documents", "", "tokens", ""))
        lines += [_counts(f"  {name}", row["disallowed"], result) for name, row in shown]
        if len(agents) > len(shown):
            lines.append(f"  and {len(agents) - len(shown)} more agents (summary.json)")
    if result["conflicts"]["documents"]:
        lines.append(f"{result['conflicts']['documents']:,} documents have signals that contradict each other")
    if result["terms"] is not None:
        terms = result["terms"]
        lines.append(
            f"terms of service stricter than robots.txt: {100 * terms['terms_stricter']:.1f} % of {terms['weight']}; "
            f"robots.txt stricter: {100 * terms['robots_stricter']:.1f} %"
        )
    kept = result["filter"]
    if kept is not None:
        lines.append(_counts(f"kept (unknown: {kept['unknown']})", kept, result))
        lines.append(f"  in {result['out']}/corpus")
    return "\n".join(lines)


def _line(label: str, documents: str, share: str, tokens: str, token_share: str) -> str:
    return f"{label:<30}{documents:>15}{share:>9}{tokens:>20}{token_share:>9}".rstrip()


def _counts(label: str, found: dict[str, Any], total: dict[str, Any]) -> str:
    cells = [label]
    for key in ("documents", "tokens"):
        known = found[key] is not None and total[key]
        cells += [f"{found[key]:,}" if found[key] is not None else "-"]
        cells += [f"{100 * found[key] / total[key]:.1f} %" if known else ""]
    return _line(*cells)


def _terms(config: TermsConfig) -> Any:
    from minitron_cli.data.consent.terms_stage import run_terms

    return run_terms(config)


def _show_terms(result: dict[str, Any]) -> str:
    return f"{result['out']}/annotations.jsonl: {result['pages']:,} pages of {result['domains']:,} domains"


def _fetch(config: RobotsFetchConfig) -> Any:
    from minitron_cli.data.consent.fetch import run_fetch

    return run_fetch(config)


def _show_fetch(result: dict[str, Any]) -> str:
    found = ", ".join(f"{count:,} {name}" for name, count in result["status"].items()) or "nothing to do"
    malformed = f"; {result['malformed']:,} URLs are malformed" if result["malformed"] else ""
    return (
        f"{result['out']}: {result['fetched']:,} requests ({found}); {result['fresh']:,} of {result['sites']:,} sites "
        f"were there already{malformed}"
    )


def _import(config: RobotsImportConfig) -> Any:
    from minitron_cli.data.consent.imports import run_import

    return run_import(config)


def _show_import(result: dict[str, Any]) -> str:
    found = ", ".join(f"{count:,} {name}" for name, count in result["status"].items())
    return f"{result['out']}: {result['captures']:,} captures from {result['files']:,} files ({found})"


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(help="Prepare training text; audit what it may be used for.", no_args_is_help=True)
    add_stage(group, "prepare", DataConfig, _run, _show)
    add_stage(group, "audit", AuditConfig, _audit, _show_audit)
    add_stage(group, "terms", TermsConfig, _terms, _show_terms)
    robots = typer.Typer(help="Fill a store of robots.txt files.", no_args_is_help=True)
    add_stage(robots, "fetch", RobotsFetchConfig, _fetch, _show_fetch)
    add_stage(robots, "import", RobotsImportConfig, _import, _show_import)
    group.add_typer(robots, name="robots")
    app.add_typer(group, name="data")

"""The page: sections put into the template. Everything that comes from files is escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files as package_files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template
from markupsafe import Markup

from minitron_cli import __version__
from minitron_cli.drawing.format import moment
from minitron_cli.report import consent, provenance, scores, sections
from minitron_cli.report.answer import answer
from minitron_cli.report.gather import RunFiles
from minitron_cli.report.several import several
from minitron_cli.report.speed import speed
from minitron_cli.report.tasks import tasks

TITLES = {
    "answer": "Result",
    "tasks": "Tasks",
    "speed": "Speed and memory",
    "consent": "Consent",
    "training": "Training",
    "cuts": "What was cut",
    "search": "Search",
    "importance": "Importance",
    "provenance": "Provenance",
}


def _asset(name: str) -> str:
    return package_files("minitron_cli.report").joinpath(name).read_text("utf-8")


@cache
def _template(name: str) -> Template:
    environment = Environment(
        loader=FunctionLoader(_asset), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name)


def render(files: RunFiles) -> str:
    """The whole page of one run as text."""
    found: dict[str, Any] = {
        "answer": answer(files),
        "tasks": tasks(files),
        "speed": speed(files),
        "consent": consent.consent(files),
        "training": sections.training(files),
        "cuts": sections.cuts(files),
        "search": sections.search(files),
        "importance": scores.importance(files),
        "provenance": provenance.provenance(files),
    }
    return _template("page.html.j2").render(
        **found,
        **_common(str(files.run.get("name") or files.path.name), [files]),
        description=str(files.run.get("description") or files.recipe.get("description") or ""),
        contents=[(key, title) for key, title in TITLES.items() if found[key]],
        titles=TITLES,
    )


def render_several(runs: Sequence[RunFiles]) -> str:
    """The whole page of several runs side by side as text."""
    found = several(runs)
    return _template("several.html.j2").render(
        **_common(" · ".join(found["names"][:4]) + (" · …" if len(runs) > 4 else ""), runs),
        found=found,
        provenance=[(name, provenance.provenance(files)) for name, files in zip(found["names"], runs, strict=True)],
    )


def _common(name: str, runs: Sequence[RunFiles]) -> dict[str, Any]:
    """What the frame of every page needs. The script may run because the policy names its hash; no other may."""
    starts = [str(each["started"]) for files in runs for each in files.manifests.values() if each.get("started")]
    script = _asset("copy.js")
    hashed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {
        "name": name,
        "when": moment(max(starts)) if starts else "",
        "version": __version__,
        "style": Markup(_asset("style.css")),
        "script": Markup(script),
        "script_hash": f"sha256-{hashed}",
    }

"""The page: sections put into the template. Everything that comes from files is escaped."""

from __future__ import annotations

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

TITLES = {
    "answer": "Result",
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
def _template() -> Template:
    environment = Environment(
        loader=FunctionLoader(_asset), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2")


def render(files: RunFiles) -> str:
    """The whole page as text."""
    found: dict[str, Any] = {
        "answer": answer(files),
        "consent": consent.consent(files),
        "training": sections.training(files),
        "cuts": sections.cuts(files),
        "search": sections.search(files),
        "importance": scores.importance(files),
        "provenance": provenance.provenance(files),
    }
    starts = [str(manifest["started"]) for manifest in files.manifests.values() if manifest.get("started")]
    name = str(files.run.get("name") or files.path.name)
    return _template().render(
        **found,
        name=name,
        description=str(files.run.get("description") or files.recipe.get("description") or ""),
        when=moment(max(starts)) if starts else "",
        contents=[(key, title) for key, title in TITLES.items() if found[key]],
        titles=TITLES,
        version=__version__,
        style=Markup(_asset("style.css")),
    )

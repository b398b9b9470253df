"""Imports go downward only; read from the source, so that an import inside a function counts too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import minitron_cli

ROOT = Path(minitron_cli.__file__).parent

LEVELS = (
    ("errors",),
    ("families", "shape", "config"),
    ("manifest", "checkpoint", "runtime", "models", "tokens", "drawing"),
    ("data", "evaluate", "importance"),
    ("prune",),
    ("distill",),
    ("search", "align"),
    ("report",),
    ("bench",),
    ("forecast",),
    ("stages",),
    ("cli",),
)
"""Lowest first; a part may import its own level and those below."""

LEVEL = {part: number for number, parts in enumerate(LEVELS) for part in parts}

WITHIN = {("importance", "evaluate"), ("evaluate", "data"), ("shape", "families")}
"""The only imports between neighbours that are stages, or data beside data. Level 2 is plumbing and knows itself."""

HEAVY = {"torch", "transformers", "numpy", "safetensors", "pydantic", "datasets", "lm_eval", "pyarrow"}


def imported(source: str, module: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import statement in a module's source, at any depth."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")[: -node.level]
                base = ".".join([*package, *([base] if base else [])])
            if base == "minitron_cli":
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, base


def part_of(name: str) -> str | None:
    """`minitron_cli.prune.plan` is of `prune`; None for the package itself and for other packages."""
    words = name.split(".")
    return words[1] if words[0] == "minitron_cli" and len(words) > 1 else None


def forbidden(source: str, module: str) -> list[str]:
    """What a module imports that it must not, one line each."""
    own = part_of(module)
    problems = []
    for line, name in imported(source, module):
        part = part_of(name)
        if own == "families" and name.split(".")[0] in HEAVY:
            problems.append(f"{module}:{line}: families are pure data and import no {name}")
        if part is None or part == own or part not in LEVEL or own not in LEVEL:
            continue
        above = LEVEL[part] > LEVEL[own]
        beside = LEVEL[part] == LEVEL[own] and LEVEL[own] != LEVEL["manifest"] and (own, part) not in WITHIN
        if above or beside:
            problems.append(f"{module}:{line}: {own} must not import {name}")
    return problems


def modules() -> dict[str, str]:
    """Dotted name to source of every module of the package."""
    found = {}
    for file in sorted(ROOT.rglob("*.py")):
        words = ["minitron_cli", *file.relative_to(ROOT).with_suffix("").parts]
        found[".".join(words)] = file.read_text("utf-8")
    return found


def test_imports_go_downward() -> None:
    problems = [problem for module, source in modules().items() for problem in forbidden(source, module)]
    assert not problems, "\n".join(problems)


def test_every_part_has_a_level() -> None:
    """A new folder or file at the top must take a place in the order."""
    parts = {module.split(".")[1] for module in modules()} - {"__init__", "__main__"}
    assert parts <= LEVEL.keys(), f"give {sorted(parts - LEVEL.keys())} a level in {Path(__file__).name}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("minitron_cli.families.llama", "import torch"),
        ("minitron_cli.families.llama", "def f():\n    from numpy import array"),
        ("minitron_cli.errors", "from minitron_cli import shape"),
        ("minitron_cli.config.prune", "from minitron_cli.shape import Shape"),
        ("minitron_cli.manifest", "from minitron_cli.prune.plan import PrunePlan"),
        ("minitron_cli.prune.stage", "if True:\n    def f():\n        import minitron_cli.distill.losses"),
        ("minitron_cli.prune.stage", "from ..search import stage"),
        ("minitron_cli.evaluate.stage", "from minitron_cli.importance import store"),
        ("minitron_cli.data.prepare", "from minitron_cli.evaluate import perplexity"),
        ("minitron_cli.search.stage", "from minitron_cli.stages import Chain"),
        ("minitron_cli.stages", "from minitron_cli.cli.run import fail"),
    ],
)
def test_the_checker_sees(module: str, source: str) -> None:
    """Control: each of these is one forbidden import."""
    assert len(forbidden(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("minitron_cli.importance.collect", "from minitron_cli.evaluate.perplexity import evaluate_split"),
        ("minitron_cli.search.stage", "from minitron_cli.distill import trainer\nfrom minitron_cli.prune import plan"),
        ("minitron_cli.checkpoint.verify", "from minitron_cli.models.load import load_model\nimport torch"),
        ("minitron_cli.runtime.doctor", "from minitron_cli import __version__"),
        ("minitron_cli.tokens.reader", "from .writer import FORMAT"),
    ],
)
def test_the_checker_allows(module: str, source: str) -> None:
    assert forbidden(source, module) == []

"""minitron: turn one trained Hugging Face causal LM into smaller ones.

The Python API mirrors the command line: `run_<stage>(config) -> Result`. Names load on first use, so that
`import minitron_cli` stays light.

>>> from minitron_cli import PruneConfig, run_prune
>>> run_prune(PruneConfig(checkpoint="builtin:tiny-py", hidden=96, out="pruned"))
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "DataConfig": "config.data",
    "ImportanceConfig": "config.importance",
    "SearchConfig": "config.search",
    "PruneConfig": "config.prune",
    "CorrectConfig": "config.correct",
    "DistillConfig": "config.distill",
    "AlignConfig": "config.align",
    "EvalConfig": "config.evaluate",
    "BenchConfig": "config.bench",
    "CompressConfig": "config.run",
    "RunConfig": "config.run",
    "PlanConfig": "config.plan",
    "ReportConfig": "config.report",
    "MinitronError": "errors",
    "UserError": "errors",
    "RunError": "errors",
    "Shape": "shape",
    "run_data": "data.prepare",
    "run_importance": "importance.stage",
    "run_search": "search.stage",
    "run_prune": "prune.stage",
    "run_correct": "distill.correct",
    "run_distill": "distill.stage",
    "run_align": "align.stage",
    "run_eval": "evaluate.stage",
    "run_bench": "bench.stage",
    "run_compress": "stages",
    "run_recipe": "stages",
    "run_plan": "forecast.stage",
    "run_report": "report.stage",
}

__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'minitron_cli' has no attribute {name!r}")
    return getattr(import_module(f"minitron_cli.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""Commands of the chain's stages."""

from __future__ import annotations

from typing import Any

import typer

from minitron_cli.cli.command import add_stage
from minitron_cli.config.distill import DistillConfig
from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.config.prune import PruneConfig


def _importance(config: ImportanceConfig) -> Any:
    from minitron_cli.importance.stage import run_importance

    return run_importance(config)


def _show_importance(result: dict[str, Any]) -> str:
    lines = [f"{result['out']}: scores of {', '.join(result['axes'])} from {result['tokens']:,} tokens"]
    names = {"layers.bi": "block importance", "layers.loss": "loss increase"}
    for kind, values in result["layers"].items():
        lines.append(f"  {names[kind]} by layer: " + "  ".join(f"{value:.3f}" for value in values))
    return "\n".join(lines)


def _prune(config: PruneConfig) -> Any:
    from minitron_cli.prune.stage import run_prune

    return run_prune(config)


def _show_prune(result: dict[str, Any]) -> str:
    before, after = result["params_before"], result["params_after"]
    return f"{result['out']}: {before:,} -> {after:,} parameters ({100 * after / before:.1f} %) in {result['seconds']:.1f} s"


def _plan(config: PruneConfig) -> dict[str, Any]:
    from minitron_cli.prune.stage import plan_prune

    return plan_prune(config).to_json()


def _show_plan(plan: dict[str, Any]) -> str:
    from minitron_cli.prune.plan import PrunePlan, describe

    return describe(PrunePlan.from_json(plan))


def _distill(config: DistillConfig) -> Any:
    from minitron_cli.distill.stage import run_distill

    return run_distill(config)


def _show_distill(result: dict[str, Any]) -> str:
    line = f"{result['out']}: {result['steps']} steps, {result['tokens']:,} tokens, {result['tokens_per_second']:,.0f} tokens/s"
    if result["val_loss_before"] is not None:
        line += f"\n  validation loss {result['val_loss_before']:.4f} -> {result['val_loss_after']:.4f} nats per token"
    return line


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_stage(app, "importance", ImportanceConfig, _importance, _show_importance)
    add_stage(app, "prune", PruneConfig, _prune, _show_prune, dry_run=(_plan, _show_plan))
    add_stage(app, "distill", DistillConfig, _distill, _show_distill)

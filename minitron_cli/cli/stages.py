"""Commands of the chain's stages."""

from __future__ import annotations

from typing import Any

import typer

from minitron_cli.cli.command import add_stage
from minitron_cli.config.align import AlignConfig
from minitron_cli.config.bench import BenchConfig
from minitron_cli.config.convert import ConvertConfig
from minitron_cli.config.correct import CorrectConfig
from minitron_cli.config.distill import DistillConfig
from minitron_cli.config.evaluate import EvalConfig
from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.config.plan import PlanConfig
from minitron_cli.config.prune import PruneConfig
from minitron_cli.config.report import ReportConfig
from minitron_cli.config.run import CompressConfig, RunConfig
from minitron_cli.config.search import SearchConfig
from minitron_cli.runtime.table import Shown


def _importance(config: ImportanceConfig) -> Any:
    from minitron_cli.importance.stage import run_importance

    return run_importance(config)


def _show_importance(result: dict[str, Any]) -> str:
    lines = [f"{result['out']}: scores of {', '.join(result['axes'])} from {result['tokens']:,} tokens"]
    names = {"bi": "block importance", "loss": "loss increase", "kl": "KL", "mse": "distance", "task": "task drop"}
    places = {"layers": "by layer", "blocks": "by first layer of a run", "greedy": "after each layer that leaves"}
    for kind, values in result["layers"].items():
        place, _, measure = kind.partition(".")
        if kind == "greedy.order":
            lines.append("  layers in the order they leave: " + "  ".join(f"{value:.0f}" for value in values))
        elif place in places:
            shown = "  ".join(f"{value:.3f}" for value in values)
            lines.append(f"  {names[measure]} {places[place]}: {shown}")
    return "\n".join(lines)


def _prune(config: PruneConfig) -> Any:
    from minitron_cli.prune.stage import run_prune

    return run_prune(config)


def _show_prune(result: dict[str, Any]) -> str:
    before, after = result["params_before"], result["params_after"]
    share = 100 * after / before
    return f"{result['out']}: {before:,} -> {after:,} parameters ({share:.1f} %) in {result['seconds']:.1f} s"


def _plan(config: PruneConfig) -> dict[str, Any]:
    from minitron_cli.prune.stage import plan_prune

    return plan_prune(config).to_json()


def _show_plan(plan: dict[str, Any]) -> str:
    from minitron_cli.prune.plan import PrunePlan, describe

    return describe(PrunePlan.from_json(plan))


def _distill(config: DistillConfig) -> Any:
    from minitron_cli.distill.stage import run_distill

    return run_distill(config)


def _plan_distill(config: DistillConfig) -> dict[str, Any]:
    from minitron_cli.distill.stage import plan_distill

    return plan_distill(config).to_json()


def _show_distill_plan(plan: dict[str, Any]) -> str:
    from minitron_cli.distill.plan import TrainingPlan, describe

    return describe(TrainingPlan(**plan))


def _correct(config: CorrectConfig) -> Any:
    from minitron_cli.distill.correct import run_correct

    return run_correct(config)


def _plan_correct(config: CorrectConfig) -> dict[str, Any]:
    from minitron_cli.distill.correct import plan_correct

    return plan_correct(config).to_json()


def _show_distill(result: dict[str, Any]) -> str:
    line = f"{result['out']}: {result['steps']} steps, {result['tokens']:,} tokens"
    line += f", {result['tokens_per_second']:,.0f} tokens/s"
    if result["val_loss_before"] is not None:
        line += f"\n  validation loss {result['val_loss_before']:.4f} -> {result['val_loss_after']:.4f} nats per token"
    return line


def _align(config: AlignConfig) -> Any:
    from minitron_cli.align.stage import run_align

    return run_align(config)


def _plan_align(config: AlignConfig) -> dict[str, Any]:
    from minitron_cli.align.stage import plan_align

    return plan_align(config).to_json()


def _show_align_plan(plan: dict[str, Any]) -> str:
    from minitron_cli.align.plan import AlignPlan, describe

    return describe(AlignPlan(**plan))


def _show_align(result: dict[str, Any]) -> str:
    from minitron_cli.align.table import format_align

    return format_align(result)


def _search(config: SearchConfig) -> Any:
    if config.list:
        from minitron_cli.search.listing import run_list

        return run_list(config)
    from minitron_cli.search.stage import run_search

    return run_search(config)


def _show_search(result: dict[str, Any]) -> Shown:
    from minitron_cli.search.table import show_search

    return show_search(result)


def _eval(config: EvalConfig) -> Any:
    from minitron_cli.evaluate.stage import run_eval

    return run_eval(config)


def _show_eval(result: dict[str, Any]) -> Shown:
    from minitron_cli.evaluate.stage import EvalResult
    from minitron_cli.evaluate.table import show_eval

    return show_eval(EvalResult(**result))


def _bench(config: BenchConfig) -> Any:
    from minitron_cli.bench.stage import run_bench

    return run_bench(config)


def _show_bench(result: dict[str, Any]) -> Shown:
    from minitron_cli.bench.table import show_bench

    return show_bench(result)


def _run(config: RunConfig) -> Any:
    from minitron_cli.stages import run_recipe

    return run_recipe(config)


def _plan_run(config: RunConfig) -> dict[str, Any]:
    from minitron_cli.stages import plan_recipe

    return plan_recipe(config)


def _show_run(result: dict[str, Any]) -> Shown:
    from minitron_cli.stages import show_run

    return show_run(result)


def _show_run_plan(plan: dict[str, Any]) -> str:
    import yaml

    recipe = yaml.safe_dump(plan["recipe"], sort_keys=False)
    return f"stages: {' -> '.join(plan['stages'])}\nout: {plan['out']}\n\n{recipe}"


def _forecast(config: PlanConfig) -> Any:
    from minitron_cli.forecast.stage import run_plan

    return run_plan(config)


def _show_forecast(plan: dict[str, Any]) -> str:
    from minitron_cli.forecast.table import format_plan

    return format_plan(plan)


def _compress(config: CompressConfig) -> Any:
    from minitron_cli.stages import run_compress

    return run_compress(config)


def _plan_compress(config: CompressConfig) -> dict[str, Any]:
    from minitron_cli.stages import plan_compress

    return plan_compress(config)


def _report(config: ReportConfig) -> Any:
    from minitron_cli.report.stage import run_report

    return run_report(config)


def _convert(config: ConvertConfig) -> Any:
    from minitron_cli.checkpoint.convert import run_convert

    return run_convert(config)


def _show_convert(result: dict[str, Any]) -> str:
    return f"{result['out']}: {result['tensors']} tensors, {result['bytes'] / 1e6:,.1f} MB as safetensors"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_stage(app, "convert", ConvertConfig, _convert, _show_convert)
    add_stage(app, "importance", ImportanceConfig, _importance, _show_importance, together=True)
    add_stage(app, "search", SearchConfig, _search, _show_search, together=True)
    add_stage(app, "prune", PruneConfig, _prune, _show_prune, dry_run=(_plan, _show_plan))
    correcting, distilling = (_plan_correct, _show_distill_plan), (_plan_distill, _show_distill_plan)
    add_stage(app, "correct", CorrectConfig, _correct, _show_distill, dry_run=correcting, together=True)
    add_stage(app, "distill", DistillConfig, _distill, _show_distill, dry_run=distilling, together=True)
    add_stage(app, "align", AlignConfig, _align, _show_align, dry_run=(_plan_align, _show_align_plan), together=True)
    add_stage(app, "eval", EvalConfig, _eval, _show_eval)
    add_stage(app, "bench", BenchConfig, _bench, _show_bench)
    add_stage(
        app, "compress", CompressConfig, _compress, _show_run, dry_run=(_plan_compress, _show_run_plan), together=True
    )
    add_stage(app, "run", RunConfig, _run, _show_run, dry_run=(_plan_run, _show_run_plan), together=True)
    add_stage(app, "plan", PlanConfig, _forecast, _show_forecast)
    add_stage(app, "report", ReportConfig, _report, lambda result: f"{result['out']}: open it in a browser")

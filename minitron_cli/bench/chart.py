"""Speed of two checkpoints as bars, in a file that stands by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from minitron_cli.drawing.svg import CHARACTER, Scale, el, join, line, text

WIDTH, BAR, GAP, LEFT = 760, 16, 14, 190
STYLE = """
  text { font: 12px system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; fill: #59636e; }
  .title { font-weight: 600; fill: #1b1f24; } .value { fill: #1b1f24; }
  .checkpoint { fill: #0072b2; } .against { fill: #8a929b; } .rule { stroke: #d9dee3; } .ground { fill: #ffffff; }
  @media (prefers-color-scheme: dark) {
    text { fill: #9aa4af; } .title, .value { fill: #e6e9ec; } .checkpoint { fill: #56b4e9; } .against { fill: #737d88; }
    .rule { stroke: #313840; } .ground { fill: #14171b; }
  }
"""


def draw(result: dict[str, Any]) -> str:
    """Two groups of bars, prefill and decode tokens per second, a pair for each case."""
    keys = ["checkpoint", *(["against"] if result["against"] is not None else [])]
    parts, y = [_legend(result, keys)], 56.0
    for metric, title in (
        ("prefill_tokens_per_second", "Reading the prompt, tokens per second"),
        ("decode_tokens_per_second", "Generating, tokens per second"),
    ):
        parts.append(text(16, y, title, class_="title"))
        y += 14
        most = max(case[key][metric] for case in result["cases"] for key in keys)
        scale = Scale(0, most, LEFT, WIDTH - 150)
        for case in result["cases"]:
            label = f"batch {case['batch_size']}, context {case['context']:,}"
            parts.append(text(LEFT - 10, y + len(keys) * BAR / 2 + 4, label, anchor="end"))
            for key in keys:
                parts.append(_bar(case, key, metric, y, scale))
                y += BAR
            y += GAP
        y += 16
    label = f"Tokens per second of {result['checkpoint']}"
    label += f" and {result['against']}" if result["against"] is not None else ""
    ground = el("rect", width=WIDTH, height=y, class_="ground")
    body = el("style", Markup(STYLE)) + ground + join(parts)
    drawing = el("svg", body, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {WIDTH} {y:.0f}", width=WIDTH,
                 height=y, role="img", aria_label=label)  # fmt: skip
    return f"{drawing}\n"


def _bar(case: dict[str, Any], key: str, metric: str, y: float, scale: Scale) -> Markup:
    value = case[key][metric]
    end = scale(value)
    shown = f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
    if key == "checkpoint" and "ratio" in case:
        shown += f"  ({case['ratio'][metric.split('_')[0]]:.2f} x)"
    return el("rect", x=float(LEFT), y=y + 1, width=end - LEFT, height=BAR - 2, class_=key) + text(
        end + 6, y + BAR - 4, shown, class_="value"
    )


def _legend(result: dict[str, Any], keys: list[str]) -> Markup:
    """Names at the top, then where it was measured."""
    parts, x = [], 16.0
    for key in keys:
        name = Path(result[key]).name or result[key]
        parts += [el("rect", x=x, y=13, width=12, height=12, class_=key), text(x + 18, 23, name, class_="value")]
        x += 40 + CHARACTER * len(name)
    parts.append(text(WIDTH - 16, 23, f"{result['device']}, {result['dtype']}", anchor="end"))
    parts.append(line(16, 33, WIDTH - 16, 33, "rule"))
    return join(parts)

"""What alignment gained and how far it went: reward against KL, beside best-of-N sampling of the policy as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from minitron_cli.drawing.format import NONE, count, fixed, number, percent, signed
from minitron_cli.drawing.frame import frame
from minitron_cli.drawing.svg import CHARACTER, WIDE, both, chart, join, marker, polyline, text
from minitron_cli.report.gather import RunFiles, records

METHODS = {"bond": "BOND", "jbond": "J-BOND", "sft": "SFT on best-of-N", "reinforce": "REINFORCE"}
STOPS = {
    "kl budget": "It stopped at its budget of KL.",
    "plateau": "It stopped where the reward no longer rose.",
    "no signal": "It stopped where all responses were worth the same.",
}
EXAMPLES = 6


def alignment(files: RunFiles) -> dict[str, Any] | None:
    """The answer in words, the chart and the tables; None where nothing was aligned."""
    result, curve = files.result("aligned"), files.aligned
    course = [each for each in records(curve.get("measurements")) if _point(each)]
    rivals = [each for each in records(curve.get("best_of")) if _point(each)]
    if not course or not rivals:
        return None
    config = files.config("aligned")
    method = METHODS.get(str(result.get("method")), str(result.get("method")))
    return {
        "lead": _lead(result, method, rivals),
        "chart": both(lambda width: reward_chart(course, rivals, method, width)),
        "caption": "Each point is a measurement on prompts that training left out. KL is to the policy as it was; that "
        "of best-of-N is its bound, log N − (N − 1) / N.",
        "best": [_against(each) for each in rivals],
        "course": [
            [count(each["step"]), _with_error(each, "reward"), _with_error(each, "kl"), percent(each["win_rate"], 1)]
            for each in course
        ],
        "examples": records(curve.get("samples"))[:EXAMPLES],
        "reward": str(config.get("reward") or ""),
    }  # fmt: skip


def _point(value: Mapping[str, Any]) -> bool:
    return number(value.get("kl")) is not None and number(value.get("reward")) is not None


def _lead(result: Mapping[str, Any], method: str, rivals: Sequence[Mapping[str, Any]]) -> str:
    """What one sample is worth now; the largest n that it is at least level with."""
    after, before = (fixed(result.get(key)) for key in ("reward_after", "reward_before"))
    words = (
        f"{method}, {count(result.get('steps'))} steps: one sample has a mean reward of {after}, before {before}, at "
    )
    words += f"{fixed(result.get('kl'), 2)} nats of KL per sequence."
    reached = [each for each in rivals if (number(each.get("difference")) or 0.0) >= 0 and each.get("n") != 1]
    if reached:
        best = max(reached, key=lambda each: int(each["n"]))
        words += f" That is at least what the best of {best['n']} samples had before ({fixed(best['reward'])})."
    return f"{words} {STOPS.get(str(result.get('stopped')), '')}".strip()


def _with_error(value: Mapping[str, Any], key: str) -> str:
    error = number(value.get(f"{key}_error"))
    return fixed(value.get(key)) + (f" ± {fixed(error)}" if error else "")


def _against(value: Mapping[str, Any]) -> list[str]:
    """Best-of-n's reward and KL, and what the aligned policy's one sample has beyond it."""
    beyond = signed(value.get("difference"))
    error = number(value.get("difference_error"))
    shown = beyond + (f" ± {fixed(error)}" if error and beyond != NONE else "")
    return [count(value.get("n")), _with_error(value, "reward"), fixed(value.get("kl"), 2), shown]


def reward_chart(
    course: Sequence[Mapping[str, Any]], rivals: Sequence[Mapping[str, Any]], method: str, width: int
) -> Markup:
    """Mean reward over KL: the policy's way as a line, best-of-n sampling dashed, its points named."""
    height = 340 if width == WIDE else 300
    box = (52.0, 34.0, width - 24 - CHARACTER * len(method), height - 44.0)
    shown = [*course, *rivals]
    units = ("KL to the policy as it was, nats per sequence", "mean reward")
    axes = frame(box, [0.0, *(each["kl"] for each in shown)], [each["reward"] for each in shown], units)

    def place(each: Mapping[str, Any]) -> tuple[float, float]:
        return axes.x(each["kl"]), axes.y(each["reward"])

    parts = [axes.grid, polyline([place(each) for each in rivals], "stroke dashed")]
    for each in rivals:
        x, y = place(each)
        tip = f"best of {each['n']}: {fixed(each['reward'])} at {fixed(each['kl'], 2)} nats"
        parts.append(marker("square", x, y, "fill", tip))
        if each["n"] > 1:  # one sample is where the other line begins, too
            parts.append(text(x + 7, y + 14, f"best of {each['n']}"))
    parts.append(polyline([place(each) for each in course], "stroke student"))
    for each in course:
        tip = f"step {each['step']}: {fixed(each['reward'])} at {fixed(each['kl'], 2)} nats"
        parts.append(marker("circle", *place(each), "fill student", tip))
    x, y = place(course[-1])
    parts.append(text(x + 8, y + 4, method, class_="name student"))
    last = course[-1]
    label = f"Mean reward against KL: {method} ends at {fixed(last['reward'])} with {fixed(last['kl'], 2)} nats; " + (
        ", ".join(f"best of {each['n']} {fixed(each['reward'])} with {fixed(each['kl'], 2)}" for each in rivals)
    )
    return chart(width, height, label + ".", [join(parts)])

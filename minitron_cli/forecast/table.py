"""A forecast for people."""

from __future__ import annotations

from typing import Any

from minitron_cli.runtime.progress import byte_size, duration, quantity


def format_plan(plan: dict[str, Any]) -> str:
    """Stages with their sizes, what one device holds of each training, and the time of all."""
    speed = (
        f"{quantity(plan['speed'] / 1e12)} TFLOP/s" if plan["speed"] >= 1e12 else f"{plan['speed'] / 1e9:,.0f} GFLOP/s"
    )
    how = f"{plan['mfu']:.0%} of {quantity(plan['peak'] / 1e12)} TFLOP/s" if plan["mfu"] else "measured just now"
    many = "devices" if plan["devices"] > 1 else "device"
    lines = [
        f"{plan['recipe']}: {plan['devices']} {many} ({plan['device']}, {byte_size(plan['device_memory'])}), "
        f"{speed} each ({how})",
        f"{'stage':<22}{'parameters':>11}{'tokens':>9}{'FLOP':>10}{'tokens/s':>10}{'time':>9}",
    ]
    for part in plan["stages"]:
        lines.append(
            f"{part['name']:<22}{quantity(part['params']):>11}{quantity(part['tokens']):>9}{part['flops']:>10.1e}"
            f"{quantity(part['tokens_per_second']):>10}{duration(3600 * part['hours']):>9}"
            + (" (one device)" if part["devices"] < plan["devices"] else "")
        )
    for part in plan["stages"]:
        if part["memory"]:
            lines += ["", *_held(part, plan["device_memory"])]
    lines.append("")
    lines.append(
        f"In all about {duration(3600 * plan['hours'])}, {quantity(plan['device_hours'])} device hours; rough."
    )
    return "\n".join(lines)


def _held(part: dict[str, Any], memory: int) -> list[str]:
    needed = sum(part["memory"].values())
    told = ", ".join(f"{name} {byte_size(size)}" for name, size in part["memory"].items() if size)
    over = [
        f"{name} " + ("whole" if parts == 1 else f"in {parts} parts")
        for name, parts in (("student", part["student_parts"]), ("teacher", part["teacher_parts"]))
        if name == "student" or part["teacher_params"]
    ]
    line = f"{part['name']}, each device: {byte_size(needed)} of {byte_size(memory)} ({told}); {', '.join(over)}"
    if part["micro_batch"] is None:
        again = "" if part["checkpointed"] else "checkpoint_activations, "
        return [f"{line}.", f"  That does not fit: use {again}more devices, a shorter seq_len, or offload."]
    count = part["micro_batch"]
    return [f"{line}; {count} {'sequence' if count == 1 else 'sequences'} at a time."]

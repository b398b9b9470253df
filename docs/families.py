"""The table of supported families, from the families themselves; `docs/generate.py` puts it where it belongs."""

from __future__ import annotations

from minitron_cli.families import FAMILIES

AXES = ("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim")


def matrix() -> str:
    """One row per family: its model types, and per axis whether it can be cut."""
    head = ["family", "`model_type`", *(axis.replace("_", " ") for axis in AXES)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    footnotes: list[str] = []
    for family in FAMILIES:
        types = ", ".join(f"`{name}`" for name in family.model_types)
        if family.when:
            types += f" with {' and '.join(f'`{condition}`' for condition in family.when)}"
        cells = ["inspect only", *[""] * (len(AXES) - 1)] if family.draft else []
        for name in () if family.draft else AXES:
            axis = next((axis for axis in family.axes if axis.name == name), None)
            if axis is not None and axis.prunable:
                cells.append("yes")
            else:
                footnotes.append(
                    axis.why_not if axis is not None and axis.why_not else "the stock class has no such size"
                )
                cells.append(f"no [{len(footnotes)}]")
        lines.append(f"| {family.name} | {types} | {' | '.join(cells)} |")
    notes = [f"{number}. {text}" for number, text in enumerate(footnotes, 1)]
    return "\n".join([*lines, "", *notes]) + "\n"


def between_marks(text: str, mark: str, inside: str) -> str:
    """`text` with what stands between `<!-- mark -->` and `<!-- /mark -->` replaced."""
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{inside}{end}{after}"

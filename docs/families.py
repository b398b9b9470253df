"""The table of supported families, from the families themselves; `docs/generate.py` puts it where it belongs."""

from __future__ import annotations

from minitron_cli.families import FAMILIES

AXES = ("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim")


def matrix() -> str:
    """One row per family: its model types, and per axis whether it can be cut; a dash where it has no such size."""
    head = ["family", "`model_type`", *(axis.replace("_", " ") for axis in AXES), "further"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    footnotes: list[str] = []
    for family in FAMILIES:
        types = ", ".join(f"`{name}`" for name in family.model_types)
        if family.when:
            types += f" with {' and '.join(f'`{condition}`' for condition in family.when)}"
        cells = ["inspect only", *[""] * len(AXES)] if family.draft else []
        for name in () if family.draft else AXES:
            axis = next((axis for axis in family.axes if axis.name == name), None)
            if axis is None:
                cells.append("–")
            elif axis.prunable:
                cells.append("yes")
            else:
                reason = axis.why_not or f"the stock class computes it as {axis.default}"
                footnotes += [] if reason in footnotes else [reason]
                cells.append(f"no [{footnotes.index(reason) + 1}]")
        if not family.draft:
            further = (axis.name for axis in family.axes if axis.prunable and axis.name not in AXES)
            cells.append(", ".join(name.replace("_", " ") for name in further))
        lines.append(f"| {family.name} | {types} | {' | '.join(cells)} |")
    notes = [f"{number}. {text}" for number, text in enumerate(footnotes, 1)]
    return "\n".join([*lines, "", *notes]) + "\n"


def between_marks(text: str, mark: str, inside: str) -> str:
    """`text` with what stands between `<!-- mark -->` and `<!-- /mark -->` replaced."""
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{inside}{end}{after}"

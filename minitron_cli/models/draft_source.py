"""Print a draft as Python source, in the style of the shipped family files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from minitron_cli.checkpoint.hub import resolve
from minitron_cli.checkpoint.reader import read_config
from minitron_cli.errors import OutputError
from minitron_cli.families.schema import Axis, Family, Tap, Tensor
from minitron_cli.models.draft import Draft, draft_family

WIDTH = 120
MARK = "# CHECK: "


@dataclass(frozen=True)
class Group:
    """A bracketed list: one line where it fits and nothing is remarked on, else one item per line."""

    opening: str
    items: tuple[tuple[tuple[str, ...], str, Group | str], ...]
    """(remarks, what stands before the item, the item) each."""
    closing: str
    single_comma: bool = False


def source(draft: Draft) -> str:
    """The family file, importable as it stands."""
    family = draft.family
    constant = re.sub(r"\W", "_", family.name).upper()
    prefix = _prefix(family.tensors)
    call = Group("Family(", tuple(_arguments(draft, prefix)), ")")
    body = _render(call, 0, len(f"{constant} = "))
    head = [
        f'"""{family.model_types[0]}: drafted from what the stock class builds; answer every CHECK, then say here '
        'what is special."""',
        "",
        "from __future__ import annotations",
        "",
        f"from minitron_cli.families.schema import {_imports(body)}",
        "",
    ]
    notes = [MARK + note for note in draft.notes]
    if prefix:
        notes.insert(0, f'_LAYER = "{prefix}"')
    lines = [line for note in notes for line in _wrapped(note, 0)]
    return "\n".join([*head, *lines, *([""] if lines else []), f"{constant} = {body}", ""])


def write_draft(reference: str, out: Path | None) -> dict[str, Any]:
    """Draft the family of a checkpoint or config.json, and write it where `out` says.

    Raises:
        UserError: no config, no stock class, or `out` exists.
    """
    if out is not None and out.exists():
        raise OutputError(f"{out} exists; choose another name, a draft never replaces a file.")
    draft = draft_family(read_config(resolve(reference, config_only=True)))
    text = source(draft)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, "utf-8")
    return {
        "out": None if out is None else str(out),
        "family": draft.family.name,
        "tensors": len(draft.family.tensors),
        "checks": text.count("CHECK: "),
        "source": text,
    }


def _imports(body: str) -> str:
    return ", ".join(name for name in _SCHEMA if re.search(rf"\b{name}\(", body))


_SCHEMA = ("Axis", "Divides", "Family", "LayerRule", "Norm", "Rotary", "Tap", "Tensor")


def _prefix(tensors: Mapping[str, Tensor]) -> str:
    """What the names of all layers' tensors begin with, up to the layer's number."""
    found = {name[: name.index("{layer}.") + len("{layer}.")] for name in tensors if "{layer}." in name}
    return found.pop() if len(found) == 1 else ""


def _arguments(draft: Draft, prefix: str) -> Iterable[tuple[tuple[str, ...], str, Group | str]]:
    family = draft.family
    for each in fields(Family):
        value = getattr(family, each.name)
        if each.default is not MISSING and value == each.default:
            continue
        if each.default_factory is not MISSING and value == each.default_factory():
            continue
        if each.name == "tensors":
            items = tuple(
                (tuple(draft.checks.get(name, ())), f"{_name(name, prefix)}: ", _value(tensor, prefix))
                for name, tensor in value.items()
            )
            yield (), "tensors=", Group("{", items, "}")
            continue
        yield (), f"{each.name}=", _value(value, prefix)


def _name(text: str, prefix: str) -> str:
    """A tensor or module name, with the layer's prefix as the constant above the table."""
    if prefix and text.startswith(prefix):
        return f"_LAYER + {_quoted(text[len(prefix) :])}"
    return _quoted(text)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _value(value: Any, prefix: str) -> Group | str:
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, Tap):
        rest = [(item.name, getattr(value, item.name)) for item in fields(Tap)[1:]]
        items = [((), "", _name(value.module, prefix)), *(((), "", _value(each, prefix)) for _, each in rest[:2])]
        items += [((), f"{name}=", _value(each, prefix)) for name, each in rest[2:] if each]
        return Group("Tap(", tuple(items), ")")
    if is_dataclass(value):
        return _dataclass(value, prefix)
    if isinstance(value, tuple):
        items = [((), "", _value(each, prefix)) for each in value]
        return Group("(", tuple(items), ")", single_comma=len(items) == 1)
    if isinstance(value, Mapping):
        items = [((), f"{_value(key, prefix)}: ", _value(each, prefix)) for key, each in value.items()]
        return Group("{", tuple(items), "}")
    return repr(value)


def _dataclass(value: Any, prefix: str) -> Group:
    """A call with the arguments that differ from their defaults; the leading ones stand without their names."""
    items: list[tuple[tuple[str, ...], str, Group | str]] = []
    positional = True
    leading = 3 if isinstance(value, Axis) else 1 if isinstance(value, Tensor) else 2
    for place, each in enumerate(fields(value)):
        here = getattr(value, each.name)
        unset = (each.default is not MISSING and here == each.default) or (
            each.default_factory is not MISSING and here == each.default_factory()
        )
        if unset:
            positional = False
            continue
        named = "" if positional and place < leading else f"{each.name}="
        items.append(((), named, _value(here, prefix)))
    return Group(f"{type(value).__name__}(", tuple(items), ")")


def _render(item: Group | str, indent: int, used: int) -> str:
    """The text of an item whose line already holds `used` characters."""
    if isinstance(item, str):
        return item
    line = _flat(item)
    if line is not None and used + len(line) + 1 <= WIDTH:
        return line
    inner = " " * (indent + 4)
    lines = [item.opening]
    for remarks, before, each in item.items:
        for remark in remarks:
            lines += [inner + part for part in _wrapped(MARK + remark, indent + 4)]
        if isinstance(each, str) and each.startswith('"') and indent + 5 + len(before + each) > WIDTH:
            each = f"\n{inner}".join(_quoted(part) for part in _pieces(json.loads(each), WIDTH - indent - 20))
        lines.append(f"{inner}{before}{_render(each, indent + 4, indent + 4 + len(before))},")
    return "\n".join([*lines, " " * indent + item.closing])


def _flat(item: Group | str) -> str | None:
    """The item on one line; None where a remark forbids it."""
    if isinstance(item, str):
        return item
    parts = []
    for remarks, before, each in item.items:
        text = _flat(each)
        if remarks or text is None:
            return None
        parts.append(before + text)
    return item.opening + ", ".join(parts) + ("," if item.single_comma else "") + item.closing


def _pieces(text: str, width: int) -> list[str]:
    """A long string in pieces for implicit concatenation, broken after spaces."""
    pieces = [""]
    for word in re.findall(r"\S+\s*", text):
        if pieces[-1] and len(pieces[-1]) + len(word) > width:
            pieces.append("")
        pieces[-1] += word
    return pieces


def _wrapped(text: str, indent: int) -> list[str]:
    """A comment in lines that fit; code is left as it is."""
    if not text.startswith("#"):
        return [text]
    lines, words = [], text.split()
    while words:
        line = words.pop(0)
        while words and indent + len(line) + 1 + len(words[0]) <= WIDTH:
            line += " " + words.pop(0)
        lines.append(line)
        if words:
            words.insert(0, "#")
    return lines

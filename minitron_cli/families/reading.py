"""What a config.json dictionary says: a key, a condition, a formula, the tag of a layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from minitron_cli.errors import ShapeError

Config = Mapping[str, Any]


def lookup(config: Config, key: str) -> Any:
    """A config value; dots descend into nested sections and lists; None where absent."""
    value: Any = config
    for part in key.split("."):
        if isinstance(value, (list, tuple)) and part.isdigit():
            value = value[int(part)] if int(part) < len(value) else None
            continue
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def holds(config: Config, condition: str) -> bool:
    """Whether a condition ("key", "!key", "key=value", "key!=value", "key==other_key") holds.

    An absent or null key equals any other key: stock classes then copy the other.
    """
    if "==" in condition:
        key, other = condition.split("==")
        return lookup(config, key) in (None, lookup(config, other))
    if "!=" in condition:
        key, value = condition.split("!=")
        return str(lookup(config, key)) != value
    if "=" in condition:
        key, value = condition.split("=")
        return str(lookup(config, key)) == value
    if condition.startswith("!"):
        return not lookup(config, condition[1:])
    return bool(lookup(config, condition))


def formula(text: str, sizes: Mapping[str, int]) -> int:
    """Evaluate a left-to-right formula of axes and numbers: "hidden // heads", "4 * hidden", "a - b"."""
    parts = text.split()
    values = [int(part) if part.isdigit() else sizes[part] for part in parts[::2]]
    total = values[0]
    for operator, value in zip(parts[1::2], values[1:], strict=True):
        if operator == "//":
            if value == 0:
                raise ShapeError(f"config.json: {text} divides by zero.")
            total //= value
        else:
            total = total * value if operator == "*" else total + value if operator == "+" else total - value
    return total


@dataclass(frozen=True)
class LayerRule:
    """How the config tells layers apart; `tags` maps what it says to a layer tag, or to the rule to ask next.

    list      `key` holds one word per layer                 cut with the layers; `tags` renames words, others pass
    pattern   `key` holds one character per layer            cut with the layers; `tags` maps every character
    indices   `key` lists layer numbers                      renumbered; tags "in" and "out"
    leading   `key` counts leading layers                    recounted; tags "in" and "out"
    period    every `key`-th layer (1-based multiple)        made explicit or refused; tags "in" and "out"
    flag      `key` is a switch for all layers               stays; tags "in" (on) and "out"
    An absent key gives every layer `absent`: a tag, "" for none, or the rule the stock class falls back on.
    `fixed` is the value where the stock class hard-codes it and reads no key.
    """

    key: str
    kind: Literal["list", "pattern", "indices", "leading", "period", "flag"]
    tags: Mapping[Any, str | LayerRule] = field(default_factory=dict)
    absent: str | LayerRule = ""
    fixed: int | None = None

    def tag(self, config: Config, layer: int) -> str:
        """The tag this rule gives to one layer ("" for none)."""
        value = lookup(config, self.key) if self.fixed is None else self.fixed
        answer = self.absent if value is None else self._answer(value, layer)
        return answer if isinstance(answer, str) else answer.tag(config, layer)

    def _answer(self, value: Any, layer: int) -> str | LayerRule:
        match self.kind:
            case "list":
                return self.tags.get(value[layer], value[layer])
            case "pattern":
                return self.tags[value[layer]]
            case "indices":
                inside = layer in value
            case "leading":
                inside = layer < value
            case "period":
                inside = (layer + 1) % value == 0
            case "flag":
                inside = bool(value)
        return self.tags.get("in" if inside else "out", "")

    def walk(self) -> Iterator[LayerRule]:
        """This rule and every rule it may ask: whoever cuts layers must rewrite the keys of all of them."""
        yield self
        for answer in (*self.tags.values(), self.absent):
            if isinstance(answer, LayerRule):
                yield from answer.walk()

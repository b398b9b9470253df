"""What decides between distilled candidates, as data: `loss`, `kl`, `loss+0.5*arc_easy`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from minitron_cli.errors import ConfigError

LOSSES = ("loss", "kl")
"""Names that are no tasks: validation loss, and validation KL to the teacher, both in nats per token."""


@dataclass(frozen=True)
class Mix:
    """A weighted sum of validation losses and task errors; lower is better. `terms`: (name, weight)."""

    terms: tuple[tuple[str, float], ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names the evaluator must know."""
        return tuple(name for name, _ in self.terms if name not in LOSSES)

    @property
    def needs_kl(self) -> bool:
        """Whether the teacher has to be asked about validation text."""
        return any(name == "kl" for name, _ in self.terms)

    def of(self, values: Mapping[str, float]) -> float:
        """The mix of measured values by name."""
        return sum(weight * values[name] for name, weight in self.terms)


def parse_mix(spec: str) -> Mix:
    """Read `term+term+...`, a term being `[weight*]name`.

    Raises:
        ConfigError: a weight is not a positive number, a name is missing or stands twice.
    """
    # The + of 1e+3 belongs to the number.
    terms = tuple(_parse_term(part, spec) for part in re.split(r"(?<!\d[eE])\+", spec))
    names = [name for name, _ in terms]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--rank {spec} has {name} twice; add up the weights.")
    return Mix(terms)


def _parse_term(text: str, spec: str) -> tuple[str, float]:
    weight, times, name = (part.strip() for part in text.rpartition("*"))
    if not re.fullmatch(r"[\w.:-]+", name):
        raise ConfigError(f"--rank {spec}: write loss, kl, a task, or a weighted sum such as loss+0.5*arc_easy.")
    try:
        factor = float(weight) if times else 1.0
    except ValueError:
        factor = math.nan
    if not 0 < factor < math.inf:
        raise ConfigError(f"--rank {spec}: the weight '{weight}' is not a positive number.")
    return name, factor

"""What a student is trained on, as data: `kl`, `jsd:0.5`, `0.9*kl+0.1*ce`."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from minitron_cli.errors import ConfigError


@dataclass(frozen=True)
class Kind:
    """One loss a term can name: what it is, and what its parameter (if it has one) must be."""

    meaning: str
    parameter: str = ""
    example: str = ""
    accepts: Callable[[float], bool] = lambda value: False
    needs_teacher: bool = True


KINDS = {
    "kl": Kind("forward KL to the teacher"),
    "rkl": Kind("reverse KL"),
    "jsd": Kind("Jensen-Shannon divergence", "a beta between 0 and 1", "jsd:0.5", lambda beta: 0 < beta < 1),
    "skl": Kind("skewed KL", "an alpha from 0 to below 1", "skl:0.1", lambda alpha: 0 <= alpha < 1),
    "tv": Kind("total variation"),
    "mse": Kind("mean squared error of logits"),
    "cosine": Kind("cosine distance of logits"),
    "topk": Kind("KL on the teacher's k likeliest words and the rest as one", "a whole number k of words", "topk:64",
                 lambda k: k >= 1 and k == int(k)),
    "ce": Kind("cross-entropy to the next token (conventional retraining)", needs_teacher=False),
}  # fmt: skip


@dataclass(frozen=True)
class Term:
    """`weight * name:parameter`; `parameter` is beta, alpha or k, and 0 for kinds without one."""

    name: str
    parameter: float = 0.0
    weight: float = 1.0

    def __str__(self) -> str:
        return f"{self.name}:{self.parameter:.12g}" if KINDS[self.name].parameter else self.name


@dataclass(frozen=True)
class Objective:
    """A sum of terms with fixed weights."""

    terms: tuple[Term, ...]

    def __str__(self) -> str:
        """What `parse_objective` reads."""
        return "+".join(str(term) if term.weight == 1 else f"{term.weight!r}*{term}" for term in self.terms)

    @property
    def top_k(self) -> tuple[int, ...]:
        """The numbers of words that terms ask for."""
        return tuple(int(term.parameter) for term in self.terms if term.name == "topk")

    def on_top_k(self, k: int) -> Objective:
        """The same with a teacher of which the k likeliest words are known: `kl` becomes `topk:k`.

        Raises:
            ConfigError: a term needs all words.
        """
        for term in self.terms:
            if KINDS[term.name].needs_teacher and term.name not in ("kl", "topk"):
                raise ConfigError(
                    f"--loss {term} needs the teacher's probability of every word, which a cache does not hold; "
                    "use kl, topk:K or ce, or a live teacher."
                )
        terms = [replace(term, name="topk", parameter=float(k)) if term.name == "kl" else term for term in self.terms]
        if len({str(term) for term in terms}) < len(terms):
            raise ConfigError(f"--loss {self}: with a cached teacher kl is topk:{k}, which is there already.")
        return Objective(tuple(terms))

    @property
    def needs_teacher(self) -> bool:
        """Any term compares with a teacher."""
        return any(KINDS[term.name].needs_teacher for term in self.terms)

    @property
    def takes_top_k(self) -> bool:
        """The teacher's top-k log-probabilities suffice in place of its logits."""
        return all(term.name == "topk" or not KINDS[term.name].needs_teacher for term in self.terms)


def parse_objective(spec: str) -> Objective:
    """Read `term+term+...`, a term being `[weight*]name[:parameter]`.

    Raises:
        ConfigError: an unknown loss, a parameter or weight out of range, or one term twice.
    """
    # The + of 1e+3 belongs to the number.
    terms = tuple(_parse_term(part.strip(), spec) for part in re.split(r"(?<!\d[eE])\+", spec))
    names = [str(term) for term in terms]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"Loss '{spec}' has {name} twice; add up the weights.")
    return Objective(terms)


def _parse_term(text: str, spec: str) -> Term:
    weight, times, rest = text.rpartition("*")
    name, colon, parameter = rest.strip().partition(":")
    kind = KINDS.get(name)
    if kind is None:
        near = difflib.get_close_matches(name, KINDS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known losses: {', '.join(KINDS)}."
        raise ConfigError(f"Unknown loss '{name}' in '{spec}'; {hint}")
    factor = _number(weight) if times else 1.0
    if not factor > 0:
        raise ConfigError(f"The weight '{weight}' in loss '{spec}' is not a positive number.")
    if not kind.parameter:
        if colon:
            raise ConfigError(f"Loss {name} takes no parameter; write {name} instead of {rest.strip()}.")
        return Term(name, weight=factor)
    value = _number(parameter)
    if not kind.accepts(value):
        raise ConfigError(f"Loss {name} needs {kind.parameter}, for example {kind.example} (got '{rest.strip()}').")
    return Term(name, value, factor)


def _number(text: str) -> float:
    """A finite number, or NaN, which every range refuses."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan

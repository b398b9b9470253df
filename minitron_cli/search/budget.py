"""Read what users write for sizes, and make budgets of them: closed-form limits on what a shape costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from minitron_cli.config.search import SearchConfig
from minitron_cli.errors import ConfigError
from minitron_cli.search.cost import Cost, Costs
from minitron_cli.shape import Shape

_UNITS = {"k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
_BYTES = {
    **{f"{letter}{end}": 10**power for letter, power in (("k", 3), ("K", 3), ("M", 6), ("G", 9), ("T", 12))
       for end in ("", "B")},
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "B": 1,
}  # fmt: skip
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
KV_ELEMENT_BYTES = 2
"""Caches are counted in 16-bit elements, whatever type the weights have."""


def read_params(text: str, total: int) -> int:
    """`4B`, `350M`, `1_000_000`, `7.8e9` or `50%` of `total`, in parameters (or operations).

    Raises:
        ConfigError: not a positive size.
    """
    return round(_read(text, _UNITS, total, "4B, 350M or 50%"))


def read_bytes(text: str, total: int) -> int:
    """`8GB`, `8GiB`, `500M`, `8e9` or `50%` of `total`, in bytes.

    Raises:
        ConfigError: not a positive size.
    """
    return round(_read(text, _BYTES, total, "8GB, 7.5GiB or 50%"))


def read_seconds(text: str) -> float:
    """`20ms` or `0.02s`.

    Raises:
        ConfigError: not a positive time with a unit.
    """
    if not text.strip().endswith("s"):
        raise ConfigError(f"{text!r} is not a time; write 20ms or 0.5s.")
    return float(_read(text, _SECONDS, None, "20ms or 0.5s"))


def _read(text: str, units: Mapping[str, float], total: int | None, examples: str) -> float:
    clean = text.strip().replace("_", "").replace(",", "")
    unit = next((unit for unit in sorted(units, key=len, reverse=True) if clean.endswith(unit)), "")
    percent = total is not None and clean.endswith("%")
    try:
        number = float(clean[:-1] if percent else clean.removesuffix(unit).rstrip())
    except ValueError:
        raise ConfigError(f"{text!r} is not a size; write {examples}.") from None
    value = number / 100 * (total or 0) if percent else number * units.get(unit, 1)
    if not 0 < value < float("inf"):
        raise ConfigError(f"{text!r} is not a positive size; write {examples}.")
    return value


def window(params: str | None, tolerance: str, params_range: str | None, total: int) -> tuple[int, int]:
    """The parameter window, bounds inclusive.

    Raises:
        ConfigError: a part cannot be read, or the window is empty.
    """
    if params_range is not None:
        low_text, colon, high_text = params_range.partition(":")
        if not colon:
            raise ConfigError(f"--params-range {params_range}: write LO:HI, such as 7.8B:8.5B or 45%:50%.")
        low, high = read_params(low_text, total), read_params(high_text, total)
    else:
        assert params is not None
        target, spread = read_params(params, total), _read_share(tolerance)
        low, high = round(target * (1 - spread)), round(target * (1 + spread))
    if low > high:
        raise ConfigError(f"The parameter window {low:,} to {high:,} is empty; swap the bounds.")
    return low, high


def _read_share(text: str) -> float:
    clean = text.strip()
    try:
        share = float(clean.removesuffix("%")) / (100 if clean.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise ConfigError(f"--tolerance {text}: write a share below 100%, such as 5% or 0.05.")
    return share


@dataclass(frozen=True)
class Budget:
    """A limit on one cost, inclusive: `low` to `high`, in units of `factor` times what `cost` counts.

    `count` is the slow reference that `cost` must equal; `wording` follows a number ("total parameters").
    """

    option: str
    wording: str
    low: float
    high: float
    cost: Cost
    count: Callable[[Shape], int]
    factor: float = 1.0
    in_bytes: bool = False

    def may_meet(self, lower: Mapping[str, int], upper: Mapping[str, int]) -> bool:
        """Whether sizes between two bounds can meet it; for a point, given twice: whether it does."""
        return self.value(lower) <= self.high and (self.low <= 0 or self.value(upper) >= self.low)

    def value(self, sizes: Mapping[str, int]) -> float:
        """The cost in the budget's units."""
        return self.cost.at(sizes) * self.factor

    def asked(self) -> str:
        """What was asked for, in words."""
        if self.low > 0:
            return f"{self.shown(self.low)} to {self.shown(self.high)} {self.wording}"
        return f"at most {self.shown(self.high)} {self.wording}"

    def shown(self, value: float) -> str:
        """A number of this budget, for people: exact, so that no two different ones look alike."""
        return f"{round(value):,}" + (" bytes" if self.in_bytes else "")


def make_budgets(config: SearchConfig, shape: Shape, costs: Costs) -> list[Budget]:
    """All closed-form budgets of a command; `50%` means half of the original's cost.

    Raises:
        ConfigError: one cannot be read.
    """
    budgets = []
    if config.params is not None or config.params_range is not None:
        budgets.append(_params_budget(config, shape, costs))
    if config.weight_bytes is not None:
        bits = config.weight_bits or shape.dtype_bytes() * 8
        factor = bits / 8
        high = read_bytes(config.weight_bytes, round(shape.params * factor))
        wording, option = f"of weights at {bits:g} bits each", f"--weight-bytes {config.weight_bytes}"
        budgets.append(Budget(option, wording, 0, high, costs.params, lambda s: s.params, factor, in_bytes=True))
    if config.kv_bytes is not None:
        budgets.append(_kv_budget(config, shape, costs))
    if config.flops is not None:
        context = config.context or 0
        high = read_params(config.flops, shape.flops_per_token(context))
        wording = f"operations per token that sees {context:,} tokens of context"
        cost = costs.flops_per_token(context)
        option = f"--flops {config.flops}"
        budgets.append(Budget(option, wording, 0, high, cost, lambda s: s.flops_per_token(context)))
    return budgets


def _params_budget(config: SearchConfig, shape: Shape, costs: Costs) -> Budget:
    counts: dict[str, tuple[Cost, Callable[[Shape], int]]] = {
        "total": (costs.params, lambda s: s.params),
        "non-embedding": (costs.params_non_embedding, lambda s: s.params_non_embedding),
        "active": (costs.params_active, lambda s: s.params_active),
    }
    cost, count = counts[config.count]
    low, high = window(config.params, config.tolerance, config.params_range, count(shape))
    option = f"--params-range {config.params_range}" if config.params_range else f"--params {config.params}"
    return Budget(option, f"{config.count} parameters", low, high, cost, count)


def _kv_budget(config: SearchConfig, shape: Shape, costs: Costs) -> Budget:
    assert config.kv_bytes is not None and config.context is not None
    context = config.context
    high = read_bytes(config.kv_bytes, shape.kv_bytes(context, KV_ELEMENT_BYTES))
    wording = f"of 16-bit KV cache{' and state' if shape.state_bytes() else ''} for {context:,} tokens"
    cost, factor = costs.kv_elements(context), float(KV_ELEMENT_BYTES)
    option = f"--kv-bytes {config.kv_bytes}"
    return Budget(option, wording, 0, high, cost, lambda s: s.kv_bytes(context, 1), factor, in_bytes=True)


def meet_all(budgets: Sequence[Budget], lower: Mapping[str, int], upper: Mapping[str, int]) -> bool:
    """Whether sizes between two bounds can meet every budget."""
    return all(budget.may_meet(lower, upper) for budget in budgets)

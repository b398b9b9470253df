"""What a tensor is for: norm, query, residual or head side, read off the modules and the order in which they run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from minitron_cli.errors import CheckpointError
from minitron_cli.families.schema import Norm, Tap, Tensor
from minitron_cli.models.draft_axes import Axes, pattern_of
from minitron_cli.models.draft_fit import Term, product_text
from minitron_cli.models.draft_probe import Config, build, saved_tensors
from minitron_cli.models.draft_trace import Call, examine_norm, is_norm, trace

Role = Literal["", "norm", "query", "query_norm", "router", "buffer"]


@dataclass
class Roles:
    """Facts about the modules of one model; paths and names are patterns over layers."""

    calls: list[Call]
    memory: dict[str, str]
    """Tensor pattern on disk to its name in memory."""
    norms: dict[str, Norm]
    """Module pattern to what it computes."""
    buffers: set[str]
    heads: set[str] = field(default_factory=set)
    """Matrices that write to heads: all of an attention module but the last."""
    outputs: set[str] = field(default_factory=set)
    """Last matrices of attention modules."""
    downs: list[str] = field(default_factory=list)
    """Last matrices of the other groups inside layers."""
    mlps: list[str] = field(default_factory=list)
    """What such a group's input enters: its module, or its first matrix where the layer itself holds the group."""
    transposed: set[str] = field(default_factory=set)
    head: str = ""
    block: str = ""
    scaled: bool = True
    """Whether the softmax scale follows head_dim, as far as the attention modules tell."""

    @property
    def norm(self) -> Norm:
        """The kind most norms of the model have."""
        kinds = list(self.norms.values())
        return max(kinds, key=kinds.count) if kinds else Norm()

    def module(self, pattern: str) -> str:
        """The module that holds a tensor."""
        return self.memory.get(pattern, pattern).rpartition(".")[0]

    def query_normed(self) -> bool:
        """Whether some norm runs over queries: then it carries the softmax scale."""
        return any(_leaf(path).startswith("q") for path in self.norms)

    def of(self, pattern: str, dims: tuple[str, ...], remarks: list[str]) -> tuple[Role, Norm | None]:
        """Role and own norm of a tensor."""
        if pattern in self.buffers:
            return "buffer", None
        module = self.module(pattern)
        if module in self.norms:
            if not self.memory.get(pattern, pattern).endswith("weight"):
                return "", None
            own = None if self.norms[module] == self.norm else self.norms[module]
            return ("query_norm" if _leaf(module).startswith("q") and self.scaled else "norm"), own
        if dims in (("experts", "hidden"), ("experts",)) and _leaf(module) in ("gate", "router", "layer"):
            return "router", None
        if module not in self.heads or self.query_normed() or not self.scaled:
            return "", None
        if "+" in dims[1 if module in self.transposed and len(dims) > 1 else 0]:
            remarks.append("are the first rows of this fused tensor the queries?")
            return "query", None
        return ("query" if _leaf(module).startswith("q") else ""), None


def _leaf(path: str) -> str:
    return path.rpartition(".")[2].lower()


def find_roles(config: Config) -> Roles:
    """Trace the stock model of a config."""
    model = build(config)
    calls = trace(config)
    in_memory = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    memory = {
        pattern_of(name)[0]: pattern_of(in_memory[id(tensor)])[0]
        for name, tensor in saved_tensors(model).items()
        if id(tensor) in in_memory
    }
    widths = {call.path: call.width_in for call in calls}
    norms = {
        pattern_of(path)[0]: examine_norm(module, widths.get(path, 8))
        for path, module in model.named_modules()
        if is_norm(module)
    }
    back = {name: pattern for pattern, name in memory.items()}
    buffers = {back.get(pattern_of(name)[0], pattern_of(name)[0]) for name, _ in model.named_buffers()}
    roles = Roles(calls, memory, norms, buffers & memory.keys(), scaled=_scale_follows_head_dim(config))
    output = model.get_output_embeddings()
    roles.head = next((path for path, module in model.named_modules() if module is output and output is not None), "")
    _group(roles)
    return roles


def _scale_follows_head_dim(config: Config) -> bool:
    """Double head_dim and look at the `scaling` that attention modules keep; True where nothing tells."""
    if type(config.get("head_dim")) is not int:
        return True
    try:
        before, after = build(config), build({**config, "head_dim": 2 * config["head_dim"]})
    except CheckpointError:
        return True
    scales = [[each.scaling for each in model.modules() if hasattr(each, "scaling")] for model in (before, after)]
    return not scales[0] or scales[0] != scales[1]


def _group(roles: Roles) -> None:
    groups: dict[tuple[str, bool], list[str]] = {}
    for call in roles.calls:
        path, indices = pattern_of(call.path)
        if call.kind != "matrix" or not indices:
            continue
        roles.block = roles.block or path[: path.index("{layer}") + len("{layer}")]
        groups.setdefault((pattern_of(call.inside)[0], call.attention), []).append(path)
        if call.transposed:
            roles.transposed.add(path)
    for (inside, attention), paths in groups.items():
        last = paths[-1]
        if attention:
            roles.outputs.add(last)
            roles.heads |= set(paths) - {last}
        elif len(set(paths)) > 1:
            roles.downs.append(last)
            roles.mlps.append(paths[0] if inside == roles.block else inside)


def epsilons(model: Any) -> set[float]:
    """The epsilons of all norms of a model."""
    found = set()
    for module in model.modules():
        if is_norm(module):
            eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
            if isinstance(eps, float):
                found.add(eps)
    return found


def dimension(
    found: list[tuple[Term, ...]], pattern: str, number: int, axes: Axes, roles: Roles, remarks: list[str]
) -> str:
    """The expression of one dimension, from the sums that fit; `remarks` gets what sizes cannot show."""
    module = roles.module(pattern)
    output_side = 1 if module in roles.transposed and not roles.memory.get(pattern, "").endswith("bias") else 0
    writes_heads = module in roles.heads and number == output_side
    reads_heads = module in roles.outputs and number != output_side and roles.memory.get(pattern, "").endswith("weight")
    terms = found[0]
    if len(found) > 1:
        others = " or ".join(_plain(each) for each in found[1:3])
        remarks.append(f"dimension {number} may also be {others}")
    if (writes_heads or reads_heads) and axes.derives_head_dim and terms[0].factors == ("hidden",):
        remarks.append(f"hidden equals heads*head_dim here: is dimension {number} the heads' side?")
        terms = tuple(Term(("heads", "head_dim") if t.factors == ("hidden",) else t.factors, t.count) for t in terms)
    texts = [_nested(term.factors, axes) or str(term.count) for term in terms for _ in range(_copies(term))]
    if writes_heads and (len(texts) == 3 or _leaf(module).startswith(("v", "value"))):
        texts[-1] = texts[-1].replace("head_dim", "v_head_dim")
    if reads_heads and len(texts) == 1:
        texts[0] = texts[0].replace("head_dim", "v_head_dim")
    if len(texts) > 1 and len(set(terms)) == 1 and terms[0].factors and not writes_heads:
        remarks.append(f"{len(texts)} blocks of {texts[0]}, or interleaved: {texts[0]}*{len(texts)}?")
        return f"{len(texts)}*{texts[0]}"
    if len(texts) == 3 or any(term.factors for term in terms[1:]):
        remarks.append("concatenated as written, or interleaved per head?")
    return " + ".join(texts)


def _copies(term: Term) -> int:
    return term.count if term.factors else 1


def _plain(terms: tuple[Term, ...]) -> str:
    return " + ".join("*".join([*(() if t.count == 1 and t.factors else (str(t.count),)), *t.factors]) for t in terms)


def _nested(factors: tuple[str, ...], axes: Axes) -> str:
    """A product in nesting order; query heads are the group's members inside each KV head."""
    if "kv_heads" in axes.keys:
        factors = tuple(name for each in factors for name in (("kv_heads", "group") if each == "heads" else (each,)))
    return product_text(factors)


def find_taps(roles: Roles, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tap, ...]]:
    """Where to read activations, by the order of the forward pass."""
    by_module = {roles.module(pattern): tensor for pattern, tensor in tensors.items() if len(tensor.dims) == 2}

    def entering(path: str) -> str:
        dims = by_module[path].dims
        return dims[0] if path in roles.transposed else dims[1]

    def leaving(path: str) -> str:
        dims = by_module[path].dims
        return dims[1] if path in roles.transposed else dims[0]

    norms = []
    for call, after in zip(roles.calls, roles.calls[1:], strict=False):
        path, indices = pattern_of(call.path)
        if call.kind == "norm" and indices and after.kind == "matrix" and not call.attention and path not in norms:
            norms.append(path)
    taps: dict[str, tuple[Tap, ...]] = {}
    if norms:
        taps["hidden"] = tuple(Tap(path, "output", "hidden") for path in norms)
    outputs = sorted(path for path in roles.outputs if path in by_module)
    downs = [path for path in roles.downs if path in by_module]
    if outputs:
        taps["attention"] = tuple(Tap(path, "input", entering(path)) for path in outputs)
    if downs:
        taps["ffn"] = tuple(Tap(path, "input", entering(path)) for path in downs)
    if roles.mlps:
        taps["mlp"] = tuple(Tap(path, "input", "hidden") for path in roles.mlps)
    heads = sorted(path for path in roles.heads if path in by_module)
    if len(heads) == 1 and leaving(heads[0]).count("+") == 2:
        taps["qkv"] = (Tap(heads[0], "output", leaving(heads[0])),)
    elif [_leaf(path)[0] for path in heads] == ["k", "q", "v"]:
        key, query, value = heads
        for kind, path in (("query", query), ("key", key), ("value", value)):
            taps[kind] = (Tap(path, "output", leaving(path)),)
    if roles.block:
        taps["block"] = (Tap(roles.block, "output", "hidden"),)
    if roles.head:
        taps["head"] = (Tap(roles.head, "input", "hidden"),)
    return taps


__all__ = ["Roles", "dimension", "epsilons", "find_roles", "find_taps"]

"""Intermediate states: L = L_logits + alpha * L_is, where L_is compares what layers of student and teacher hold.

L_is is the sum over kinds of state of the mean over mapped layers (Minitron, arXiv 2407.14679, section 3); alpha is a
constant, or L_logits / L_is of the whole optimizer step, taken as a number. Then the total says nothing (it is
2 * L_logits), so the components are what is reported: `cosine` and `mse` as distances, attention relations in nats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_cli.config.distill import DistillConfig
from minitron_cli.config.intermediate import layer_pairs
from minitron_cli.distill.fused import HeadLoss
from minitron_cli.distill.state_losses import MEASURES, relation_kl
from minitron_cli.families.expression import parse, size
from minitron_cli.models.chunks import CHUNK_TOKENS, chunk_tokens, parts
from minitron_cli.models.split import device_of, units_of
from minitron_cli.models.states import HEADS, Listener, Place, States, tap_at
from minitron_cli.runtime.group import Group
from minitron_cli.shape import Shape

FLOOR = 1e-6
"""The least L_is (per token) that L_logits is divided by: rounding leaves about 1e-7 between equal states."""


@dataclass(frozen=True)
class Match:
    """One state of the teacher that one of the student is drawn to; `heads` of relations, 0 where there are none."""

    kind: str
    teacher: Place
    student: Place
    heads: int = 0


@dataclass(frozen=True)
class Matching:
    """All states to compare, of two models of known shapes; needs neither model."""

    config: DistillConfig
    teacher: Shape
    student: Shape
    matches: tuple[Match, ...]

    @classmethod
    def of(cls, config: DistillConfig, teacher: Shape, student: Shape) -> Matching:
        """What `--states` and `--layers-map` say of these models.

        Raises:
            ConfigError: a layer does not exist.
            FamilyError: a family does not say where a state is.
        """
        pairs = layer_pairs(config.layers_map, teacher["layers"], student["layers"])
        matches: list[Match] = []
        for kind in dict.fromkeys(config.states):
            streams = HEADS if kind == "attention" else (kind,)
            for theirs, mine in ((0, 0),) if kind == "embeddings" else pairs:
                for stream in streams:
                    heads = _relation_heads(stream, teacher, student) if kind == "attention" else 0
                    matches.append(Match(kind, Place(stream, theirs), Place(stream, mine), heads))
        for match in matches:
            tap_at(teacher, match.teacher)
            tap_at(student, match.student)
        return cls(config, teacher, student, tuple(matches))

    def teacher_listener(self, model: torch.nn.Module) -> Listener:
        """Reads the teacher's side, each state once."""
        return Listener.at(model, self.teacher, dict.fromkeys(match.teacher for match in self.matches))

    def describe(self) -> str:
        """One line for the user: what is compared, and by which projection."""
        kinds: dict[str, list[str]] = {}
        for match in self.matches:
            pairs = kinds.setdefault(match.kind, [])
            pair = f"{match.teacher.layer}:{match.student.layer}"
            if match.kind != "embeddings" and pair not in pairs:
                pairs.append(pair)
        told = ", ".join(" ".join([kind.replace("_", " "), *pairs]) for kind, pairs in kinds.items())
        widths = self.student["hidden"], self.teacher["hidden"]
        lifted = f", through a learned projection from {widths[0]} to {widths[1]}" if self.projects else ""
        return f"States compared (teacher:student layers): {told}{lifted}."

    @property
    def projects(self) -> bool:
        """Whether states of different width are compared."""
        same = self.student["hidden"] == self.teacher["hidden"]
        return not same and any(not match.heads for match in self.matches)

    def memory(self, sequences: int, seq_len: int, device: torch.device) -> int:
        """Bytes held beside a step without states: states of both models and their gradients, buffers of relations, and
        the second set of gradients that `Weighing` needs.
        """
        tokens, fp32 = sequences * seq_len, 4
        channels = sum(
            2 * _channels(self.student, match.student) + _channels(self.teacher, match.teacher)
            for match in self.matches
        )
        heads = max(match.heads for match in self.matches)
        relations = 6 * seq_len**2 * chunk_tokens(heads, seq_len**2, device) if heads else 0
        beside = self.config.alpha is None and sequences < self.config.batch_size
        return fp32 * (tokens * channels + relations + (self.student.params if beside else 0))

    def loss(self, model: torch.nn.Module) -> StateLoss:
        """L_is of a student, with a projection of its own."""
        return StateLoss(self, model)


class StateLoss:
    """L_is of one student.

    Where the widths differ, one projection (teacher's hidden, student's hidden), shared by all pairs and without bias,
    lifts the student's states. It starts as a matrix with orthonormal columns drawn from the seed, which keeps every
    angle and length, is trained along without weight decay, and is no part of the model that is written. Attention
    relations have the same shape whatever the width, and need none.
    """

    def __init__(self, matching: Matching, model: torch.nn.Module) -> None:
        self.matches, config = matching.matches, matching.config
        self.measures = ("cosine", "mse") if config.state_loss == "both" else (config.state_loss,)
        self.alpha = config.alpha
        self.listener = Listener.at(model, matching.student, dict.fromkeys(match.student for match in self.matches))
        # A backward pass that begins inside a layer does not come by the hook that gathers its weights.
        self.units = units_of(model, [placed.module for placed in self.listener.taps.values()])
        self.projection: torch.nn.Parameter | None = None
        if matching.projects:
            start = orthonormal(matching.teacher["hidden"], matching.student["hidden"], seed=config.seed)
            self.projection = torch.nn.Parameter(start.to(device_of(model), next(model.parameters()).dtype))

    @torch.no_grad()
    def __call__(self, mine: States, theirs: States, lengths: Sequence[int], scale: float) -> StateSums:
        """Losses of a micro-batch; the projection's gradient (without alpha) is already in its `.grad`.

        Args:
            mine, theirs: states at target positions, (targets, channels).
            lengths: targets of each sequence, for relations within it.
            scale: factor on every gradient (1 / tokens of the optimizer step), not on the sums.
        """
        gradients = {place: torch.zeros_like(state) for place, state in mine.items()}
        sums: dict[str, Tensor] = {}
        for match in self.matches:
            share = 1 / sum(other.kind == match.kind for other in self.matches)
            student, teacher = mine[match.student], theirs[match.teacher]
            lower = self._lowered if self.projection is not None and not match.heads else _as_it_is
            with torch.autocast(student.device.type, enabled=False):
                for name, tokens, value, gradient in self._parts(match, student, teacher, lengths):
                    found = share * value.double().sum()
                    sums[name] = sums[name] + found if name in sums else found
                    gradients[match.student][tokens] += lower(student[tokens], gradient * (share * scale))
        terms = {name: float(value) for name, value in sums.items()}
        return StateSums(terms, sum(terms.values()), gradients)

    def _parts(self, match: Match, student: Tensor, teacher: Tensor, lengths: Sequence[int]) -> Iterable[Part]:
        """Every measure of a match, some tokens at a time."""
        if match.heads:
            for tokens in _sequences(lengths):
                yield match.kind, tokens, *relation_kl(_wide(student[tokens]), _wide(teacher[tokens]), match.heads)
            return
        for tokens in parts(len(student), CHUNK_TOKENS):
            lifted = _wide(student[tokens])
            if self.projection is not None:
                lifted = lifted @ self.projection.T
            for measure in self.measures:
                name = match.kind if len(self.measures) == 1 else f"{match.kind} {measure}"
                yield name, tokens, *MEASURES[measure](lifted, _wide(teacher[tokens]))

    def _lowered(self, student: Tensor, gradient: Tensor) -> Tensor:
        """The gradient at the student's states, of one at lifted states; the projection's joins its `.grad`."""
        assert self.projection is not None
        if self.projection.grad is None:
            self.projection.grad = torch.zeros_like(self.projection)
        self.projection.grad += gradient.T @ _wide(student)
        return gradient @ self.projection


Part = tuple[str, slice, Tensor, Tensor]
"""A component's name, which tokens, their values, and the gradient at the (lifted) states of the student."""


@dataclass(frozen=True)
class StateSums:
    """Sums over tokens: each component by name and their `total`; and the gradient at each state of the student."""

    terms: dict[str, float]
    total: float
    gradients: dict[Place, Tensor]


class Weighing:
    """Sends both losses' gradients into the student, L_is times alpha, over the micro-batches of one optimizer step.

    A dynamic alpha is known after the last micro-batch only. With one micro-batch, or a constant, one backward pass
    serves both losses. Otherwise the gradients of L_is gather beside the others and join them, weighted, at the end: 4
    bytes per parameter, and a second backward pass from the highest mapped layer down. (A first sweep that only finds
    alpha would keep the teacher's answers to the whole batch, memory that grows with it, or ask the teacher twice.)
    """

    def __init__(
        self,
        losses: StateLoss,
        parameters: Iterable[torch.nn.Parameter],
        micro_batches: int,
        group: Group | None = None,
    ) -> None:
        self.losses, self.parameters, self.group = losses, list(parameters), group or Group()
        self._known = losses.alpha
        self._single = micro_batches == 1
        self._beside: list[Tensor | None] = [None] * len(self.parameters)
        self._logits, self._states = 0.0, 0.0
        self._tokens = 0

    def backward(
        self, hidden: Tensor, loss: HeadLoss, mine: States, theirs: States, lengths: Sequence[int], scale: float
    ) -> dict[str, float]:
        """Backward of one micro-batch, from its final hidden states and its intermediate ones.

        Arguments as of `StateLoss`; returns its components.
        """
        found = self.losses(mine, theirs, lengths, scale)
        self._logits += loss.total
        self._states += found.total
        self._tokens += len(hidden)
        states, gradients = list(mine.values()), [found.gradients[place] for place in mine]
        if self._known is not None or self._single:
            alpha = self._weigh()
            torch.autograd.backward([hidden, *states], [loss.gradient, *(each.mul_(alpha) for each in gradients)])
            return found.terms
        torch.autograd.backward([hidden], [loss.gradient], retain_graph=True)
        self._swap()
        for unit in self.losses.units:
            unit.unshard()
        torch.autograd.backward(states, gradients)
        self._swap()
        return found.terms

    def _weigh(self) -> float:
        """Alpha: the constant, or the ratio of the losses of the whole step, over all processes."""
        if self._known is None:
            logits, states, tokens = self.group.sum_of(self._logits, self._states, self._tokens)
            self._known = max(logits, 0.0) / max(states, FLOOR * tokens, math.ulp(0.0))
        return self._known

    @torch.no_grad()
    def finish(self) -> float:
        """Complete the gradients, after the last micro-batch; returns alpha."""
        alpha = self._weigh()
        for parameter, beside in zip(self.parameters, self._beside, strict=True):
            if beside is not None:
                beside *= alpha
                parameter.grad = beside if parameter.grad is None else parameter.grad.add_(beside)
        self._beside = [None] * len(self.parameters)
        projection = self.losses.projection
        if projection is not None and projection.grad is not None:
            projection.grad *= alpha
        return alpha

    def _swap(self) -> None:
        """Exchange the gradients with those kept beside."""
        for number, parameter in enumerate(self.parameters):
            parameter.grad, self._beside[number] = self._beside[number], parameter.grad


def orthonormal(rows: int, columns: int, *, seed: int) -> Tensor:
    """A random (rows, columns) fp32 matrix whose columns, or rows where they are fewer, are orthonormal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.init.orthogonal_(torch.empty(rows, columns), generator=generator)


def _as_it_is(student: Tensor, gradient: Tensor) -> Tensor:
    return gradient


def _relation_heads(stream: str, teacher: Shape, student: Shape) -> int:
    """As many as whole heads of both models allow."""
    axis = "heads" if stream == "query" else "kv_heads"
    return math.gcd(teacher[axis], student[axis])


def _channels(shape: Shape, place: Place) -> int:
    return size(parse(tap_at(shape, place)[1].dims), shape.sizes)


def _sequences(lengths: Sequence[int]) -> Iterable[slice]:
    start = 0
    for length in lengths:
        if length:
            yield slice(start, start + length)
        start += length


def _wide(states: Tensor) -> Tensor:
    return states if states.dtype == torch.float64 else states.float()

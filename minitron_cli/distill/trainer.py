"""One student and its optimizer; knows a step, not where batches or teachers come from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minitron_cli.config.distill import DistillConfig
from minitron_cli.distill.fused import Lesson as Lesson
from minitron_cli.distill.fused import head_loss
from minitron_cli.distill.intermediate import StateLoss, Weighing
from minitron_cli.distill.learner import Learner
from minitron_cli.distill.learner import NotFinite as NotFinite
from minitron_cli.distill.losses import TopK
from minitron_cli.models.head import Head, backbone_of, backbone_output
from minitron_cli.models.states import Listener, States
from minitron_cli.runtime.group import Group
from minitron_cli.tokens import Sequences


@dataclass(frozen=True)
class Batch:
    """Some sequences: `ids` (batch, seq); `targets` (batch, seq - 1) bool, where the next token counts; `rows` of the
    split they are from (empty for a stream).
    """

    ids: torch.Tensor
    targets: torch.Tensor
    rows: tuple[int, ...] = ()

    @classmethod
    def read(cls, sequences: Sequences, device: torch.device) -> Batch:
        """Move sequences of a source to the device."""
        targets = torch.from_numpy(sequences.targets[:, 1:]).to(device)
        return cls(torch.from_numpy(sequences.ids).to(device), targets, sequences.rows)

    def at_targets(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states that predict a target: (batch, seq, hidden) to (targets, hidden)."""
        return hidden[:, :-1][self.targets]

    @property
    def lengths(self) -> list[int]:
        """Targets of each sequence."""
        return [int(count) for count in self.targets.sum(1)]

    @property
    def next_tokens(self) -> torch.Tensor:
        """The target ids, (targets,)."""
        return self.ids[:, 1:][self.targets]


class Teacher:
    """A frozen model that passes each batch once, for any number of students; `listener` reads states on the way."""

    def __init__(self, model: Any, listener: Listener | None = None) -> None:
        self.model = model.requires_grad_(False)
        self.listener = listener or Listener()

    def lesson(self, batch: Batch) -> Lesson:
        """Run the backbone; logits are made from the lesson chunk by chunk, when a loss needs them."""
        with torch.no_grad():
            output, states = self.listener.run(lambda: backbone_output(self.model, batch.ids), len(batch.ids))
            states = {place: batch.at_targets(state) for place, state in states.items()}
            return Lesson(batch.at_targets(output.last_hidden_state), Head(self.model, output), states)

    def close(self) -> None:
        """Nothing is held open."""


@dataclass(frozen=True)
class Update:
    """What one optimizer step reports: nats per target token, the terms unweighted by name; the gradient's norm before
    clipping. With intermediate states, `loss` leaves them out, and `terms` has their components, and `alpha`.
    """

    loss: float
    terms: dict[str, float]
    gradient_norm: float
    learning_rate: float


class Trainer(Learner):
    """A student that learns from hidden states: its objective, and intermediate states where they are matched."""

    def __init__(
        self,
        model: Any,
        config: DistillConfig,
        steps: int,
        dtype: torch.dtype,
        states: StateLoss | None = None,
        group: Group | None = None,
    ) -> None:
        """Make the model ready to train, on intermediate states too where their loss is given.

        Raises:
            ConfigError: its stock class cannot recompute activations.
        """
        others = {"states.projection": states.projection if states else None}
        super().__init__(model, config, steps, dtype, others, group)
        self.config, self.objective = config, config.objective
        self.states, self.listener = states, states.listener if states else Listener()
        # Beside the module, not in it: the head calls the same backbone with a forward of its own.
        self._compiled: Any = torch.compile(backbone_of(model)) if config.compile else None

    def forward(self, ids: torch.Tensor) -> Any:
        """The student's output without its head, of (batch, seq) ids."""
        if self._compiled is not None:
            return self._compiled(input_ids=ids, use_cache=False)
        return backbone_output(self.model, ids)

    def _states_of(self, batch: Batch) -> tuple[Any, States]:
        """What `forward` gives of a batch, and the states listened to, at targets."""
        output, states = self.listener.run(lambda: self.forward(batch.ids), len(batch.ids))
        return output, {place: batch.at_targets(state) for place, state in states.items()}

    def update(self, batches: Sequence[Batch], lessons: Iterable[Lesson | TopK], step: int) -> Update:
        """One optimizer step over micro-batches; every token of the step has the same weight, whatever their number.

        With several processes each gives its own micro-batches, all the same number of them.

        Args:
            lessons: the teacher's answer to each micro-batch, asked for one by one; empty where the loss needs none.

        Raises:
            NotFinite: the loss or the gradient is not finite.
        """
        (tokens,) = self.group.sum_of(sum(int(batch.targets.sum()) for batch in batches))
        count = max(1, int(tokens))
        answers = iter(lessons)
        sums: dict[str, float] = {}
        self.begin(step)
        total = 0.0
        weighing = None
        if self.states is not None:
            weighing = Weighing(self.states, self.parameters.values(), len(batches), self.group)
        for batch in batches:
            lesson = next(answers, None)
            with self.computing():
                output, states = self._states_of(batch)
                hidden = batch.at_targets(output.last_hidden_state)
                loss = head_loss(
                    hidden,
                    Head(self.model, output),
                    self.objective,
                    teacher=lesson if self.objective.needs_teacher else None,
                    next_tokens=batch.next_tokens,
                    temperature=self.config.temperature,
                    scale=1 / count,
                )
                terms = loss.terms
                if weighing is None:
                    hidden.backward(loss.gradient)  # type: ignore[no-untyped-call]
                else:
                    assert isinstance(lesson, Lesson), "states come from a live teacher"
                    terms = terms | weighing.backward(hidden, loss, states, lesson.states, batch.lengths, 1 / count)
                total += loss.total
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0.0) + value
        total, *everywhere = self.group.sum_of(total, *sums.values())
        terms = {name: value / count for name, value in zip(sums, everywhere, strict=True)}
        if weighing is not None:
            terms["alpha"] = weighing.finish()
        norm, rate = self.finish(total / count, step)
        return Update(total / count, terms, norm, rate)

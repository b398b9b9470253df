"""The funnel: zero-shot losses of all candidates, then training in rungs that half of them leave each time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from minitron_cli.config.ranking import Mix
from minitron_cli.errors import RunError
from minitron_cli.prune.plan import PrunePlan
from minitron_cli.runtime.progress import Progress, say
from minitron_cli.search.halving import better_half
from minitron_cli.search.joint import JointTraining
from minitron_cli.search.journal import Journal
from minitron_cli.search.measure import ZeroShot

Field = dict[str | None, list[str]]
"""Names of candidates by size, best first."""


@dataclass(frozen=True)
class Rung:
    """Candidates that were compared after `step` steps."""

    step: int
    field: Field


class Funnel:
    """Decides who goes on; what it decides from is in the journal."""

    def __init__(self, mix: Mix, journal: Journal) -> None:
        self.mix, self.journal = mix, journal

    def measure(self, plans: Mapping[str, PrunePlan], zero_shot: ZeroShot) -> None:
        """Zero-shot losses of all candidates; processes take turns."""
        losses, group = self.journal.zero_shot, self.journal.group
        waiting = [name for name in plans if name not in losses]
        with Progress("zero-shot", len(plans), "candidates", start=len(losses)) as progress:
            for first in range(0, len(waiting), group.size):
                names = waiting[first : first + group.size]
                mine = math.nan
                if group.rank < len(names):
                    try:
                        mine = zero_shot.loss(plans[names[group.rank]])
                    except RunError as error:  # one candidate's numbers say nothing about the others
                        say(f"{names[group.rank]} is left out: {error}")
                found = [float(each) for each in group.gathered(torch.tensor(mine, dtype=torch.float64))]
                for name, loss in zip(names, found, strict=False):
                    losses[name] = None if math.isnan(loss) else loss
                self.journal.save()
                progress.advance(len(names), note=f"{names[-1]} loss {self.journal.start(names[-1]):.3f}")

    def require_finite(self, names: Sequence[str]) -> None:
        """Insist that there is something to choose from.

        Raises:
            RunError: no candidate has a finite loss.
        """
        if all(self.journal.start(name) == math.inf for name in names):
            raise RunError(f"None of {len(names)} candidates has a finite loss; try --dtype float32.")

    def entrants(self, names: Sequence[str], count: int) -> list[str]:
        """The candidates of lowest zero-shot loss."""
        return sorted(names, key=lambda name: (self.journal.start(name), name))[:count]

    def compete(self, entrants: Field, training: JointTraining, ends: Sequence[int]) -> list[Rung]:
        """Train the entrants; after each rung but the last the better half of every size goes on.

        Raises:
            RunError: no candidate of a size has finite numbers.
        """
        rungs: list[Rung] = []
        field = entrants
        for end in ends:
            alive = [name for names in field.values() for name in names]
            training.train(alive, end)
            rungs.append(Rung(end, {size: self.order(names, end) for size, names in field.items()}))
            field = {size: self._best(size, names, end) for size, names in rungs[-1].field.items()}
            staying = {name for names in field.values() for name in names}
            if end != ends[-1]:
                training.dismiss([name for name in alive if name not in staying])
        return rungs

    def score(self, name: str, step: int) -> float | None:
        """What decides after so many steps, lower is better; None for a candidate that failed before."""
        curve = self.journal.curves.get(name)
        point = curve.at(step) if curve is not None else None
        return None if point is None else self.mix.of(point)

    def order(self, names: Sequence[str], step: int) -> list[str]:
        """Best first; ties go to the lower zero-shot loss."""

        def key(name: str) -> tuple[bool, float, float, str]:
            score = self.score(name, step)
            return score is None, score or 0.0, self.journal.start(name), name

        return sorted(names, key=key)

    def _best(self, size: str | None, names: Sequence[str], end: int) -> list[str]:
        left = [name for name in names[: better_half(len(names))] if self.score(name, end) is not None]
        if not left:
            wanted = f" of {size}" if size else ""
            raise RunError(f"The numbers of all candidates{wanted} stopped being finite; try a lower --lr.")
        return left

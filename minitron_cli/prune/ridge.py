"""Ridge regression of a linear's correction from second moments, with damping chosen on held-out rows."""

from __future__ import annotations

import torch

DAMPING = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidates, as shares of the mean energy of an input."""


class Moments:
    """Sums over rows x (inputs,) and what is missing at the outputs r (outputs,): x x^T and x r^T, in fp64.

    Products are taken in fp32 a chunk at a time, so that fp64 only adds.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        self.gram = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.cross = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)

    def add(self, rows: torch.Tensor, missing: torch.Tensor) -> None:
        """Take in (rows, inputs) and (rows, outputs), fp32."""
        self.gram += (rows.t() @ rows).to(self.gram.device)
        self.cross += (rows.t() @ missing).to(self.gram.device)

    def solve(self, damping: float) -> torch.Tensor:
        """The correction D (inputs, outputs) that minimises |x D - r|^2 + damping * mean energy * |D|^2.

        Zero where the inputs are zero, or so alike that even the damped system is singular.
        """
        energy = self.gram.diagonal().mean()
        damped = self.gram + torch.eye(len(self.gram), dtype=self.gram.dtype, device=self.gram.device) * (
            damping * energy
        )
        factor, failed = torch.linalg.cholesky_ex(damped)
        return torch.zeros_like(self.cross) if failed else torch.cholesky_solve(self.cross, factor)

    def change(self, correction: torch.Tensor) -> float:
        """By how much a correction changes the sum of squares |x D - r|^2."""
        return float((correction * (self.gram @ correction)).sum() - 2 * (correction * self.cross).sum())

    def joined(self, other: Moments) -> Moments:
        """The sums over the rows of both."""
        both = Moments(0, 0, self.gram.device)
        both.gram, both.cross = self.gram + other.gram, self.cross + other.cross
        return both


def correction(fitted: Moments, held_out: Moments) -> tuple[torch.Tensor, float | None]:
    """The correction (inputs, outputs) from all rows, damped as fits held-out rows best, and that damping.

    Zero, and None, where no damping makes held-out rows fit better than no correction does.
    """
    changes = {damping: held_out.change(fitted.solve(damping)) for damping in DAMPING}
    best = min(changes, key=lambda damping: changes[damping])
    if not changes[best] < 0:
        return torch.zeros_like(fitted.cross), None
    return fitted.joined(held_out).solve(best), best

"""The residual stream where norms read it: how energy spreads over channels, and along which directions it lies.

States are first divided by their root mean square, as the norm will: raw sums would be ruled by the few tokens whose
states are a thousand times larger than all others.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.errors import FamilyError
from minitron_cli.families.schema import Tap, Tensor
from minitron_cli.importance.layout import BASIS, DIRECTIONS, ENERGY, Array
from minitron_cli.importance.statistics import SampleStatistic
from minitron_cli.models.taps import PlacedTap
from minitron_cli.runtime.device import wide_device
from minitron_cli.runtime.group import Group
from minitron_cli.shape import Shape

KIND = "norm"
"""Kind of the taps on what norms read; a tap's module is that of one layer."""


def stream_norms(shape: Shape) -> Iterator[tuple[str, Tensor, int | None]]:
    """Every norm over hidden channels that has a weight: (name of the weight, declaration, layer)."""
    for name, tensor, layer in shape.family.expected(shape.config):
        if tensor.role == "norm" and tensor.dims == ("hidden",):
            yield name, tensor, layer


def unrotatable(shape: Shape) -> str:
    """Why a rotation of the residual stream would make another function; nothing where it would not."""
    if shape.family.norm.kind == "layer":
        return "its layer norms take out the mean over channels, which a rotation does not keep"
    if shape.family.post_norms:
        return "norms after its sublayers scale single channels of the residual stream"
    return "" if shape.family.readers else "its family file does not say what reads the residual stream"


def collected(config: ImportanceConfig, shape: Shape) -> frozenset[str]:
    """What is gathered beside activations: what was asked for, by default all that a cut of this model can use.

    Raises:
        FamilyError: directions were asked for, and the family cannot be rotated.
    """
    why = unrotatable(shape)
    if config.collect == ("auto",):
        return frozenset({"weighted"} if why else {"weighted", "directions"})
    if why and "directions" in config.collect:
        raise FamilyError(f"{shape.family.name} cannot be rotated: {why}; leave out --collect directions.")
    return frozenset(config.collect) - {"none"}


def norm_taps(model: torch.nn.Module, shape: Shape) -> list[PlacedTap]:
    """Where these norms read."""
    return [
        PlacedTap.at(model, KIND, Tap(shape.family.module(name.removesuffix(".weight")), "input", "hidden"), layer)
        for name, _, layer in stream_norms(shape)
    ]


class ResidualStream:
    """Running statistics of what enters each norm; fp64 sums.

    energy   of each norm: mean of x^2 / mean(x^2) over the tokens, (hidden,); of layer norms x is centred
    moment   with `directions`, summed over all norms and tokens: x x^T / mean(x^2), (hidden, hidden), uncentred
    """

    def __init__(self, shape: Shape, taps: list[PlacedTap], device: torch.device, *, directions: bool) -> None:
        hidden = shape["hidden"]
        self.energy = {placed.tap.module: SampleStatistic(hidden, "mean") for placed in taps}
        self._family = shape.family
        self._centred = {
            shape.family.module(name.removesuffix(".weight")): (tensor.norm or shape.family.norm).kind == "layer"
            for name, tensor, _ in stream_norms(shape)
        }
        place = wide_device(device)
        self.moment = torch.zeros(hidden, hidden, dtype=torch.float64, device=place) if directions else None

    def heard(self, placed: PlacedTap, states: torch.Tensor) -> None:
        """Take in what a norm reads, (batch, seq, hidden)."""
        values = states.float()
        if self._centred[placed.tap.module]:
            values = values - values.mean(-1, keepdim=True)
        values = values * values.square().mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
        self.energy[placed.tap.module].add(values.square().mean(dim=1))
        if self.moment is not None:
            rows = values.flatten(0, -2)
            self.moment += (rows.t() @ rows).to(self.moment.device)

    def merge_over(self, group: Group) -> None:
        """Add the moments of all processes."""
        if self.moment is not None:
            self.moment = group.total(self.moment.cpu())

    def tensors(self) -> dict[str, Array]:
        """What is stored: energies by norm, and the directions of the stream, that of most energy first."""
        found = {
            f"{ENERGY}{self._family.on_disk(module)}.weight": statistic.value().numpy()
            for module, statistic in self.energy.items()
        }
        return found if self.moment is None else {**found, **directions(self.moment.cpu())}


def directions(moment: torch.Tensor) -> dict[str, Array]:
    """Eigenvectors of a second moment as columns, by falling energy, and these energies as shares of their sum.

    The sign of each is that which makes its largest entry positive.
    """
    energies, basis = torch.linalg.eigh((moment + moment.t()) / 2)
    energies, basis = energies.flip(0).clamp_min(0), basis.flip(1)
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    basis = basis * largest.sign()
    return {
        DIRECTIONS: (energies / energies.sum()).numpy(),
        BASIS: np.ascontiguousarray(basis.float().numpy()),
    }

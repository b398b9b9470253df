"""Whether a plan repairs, what that takes, and the run itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_cli.checkpoint.multimodal import WrappedPart
from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.config.prune import PruneConfig
from minitron_cli.errors import ConfigError, FamilyError
from minitron_cli.prune.plan import PrunePlan, planned_config
from minitron_cli.runtime.progress import say
from minitron_cli.shape import Shape
from minitron_cli.tokens import TokenDataset

if TYPE_CHECKING:
    import torch


def with_repair(plan: PrunePlan, config: PruneConfig, checkpoint: Checkpoint) -> PrunePlan:
    """The plan with what the options say of a repair; where they say nothing, a saved plan keeps its own.

    Nothing is repaired where nothing is cut; what cannot be repaired is an error only where a repair was insisted on.

    Raises:
        ConfigError: a repair is asked for without data.
    """
    cut = plan.sizes != plan.sizes_before
    if config.repair == "off" or not cut:
        return replace(plan, repair=None)
    if config.data is None:
        if config.repair == "on" and plan.repair is None:
            raise ConfigError("--repair on needs --data: text to fit the projections on.")
        return plan
    if config.repair == "auto" and plan.repair is None:
        try:
            require_ends(checkpoint)
        except FamilyError as error:
            say(f"Without a repair: {error}")
            return plan
    told = plan.repair or {"samples": config.repair_samples, "batch_size": config.batch_size, "seed": config.seed}
    return replace(plan, repair={**told, "data": str(config.data.absolute())})


def require_ends(checkpoint: Checkpoint) -> None:
    """Insist that attention and MLP of every layer end in projections that can be fitted.

    Raises:
        FamilyError: they do not, or cannot be run.
    """
    from minitron_cli.prune.repair import projections

    if isinstance(checkpoint, WrappedPart):
        raise FamilyError(
            "a repair runs the text model, which a multimodal checkpoint wraps; add --text-only, or --repair off."
        )
    projections(checkpoint.shape)


@dataclass(frozen=True)
class Repairs:
    """A repair that can run: everything it needs was looked at.

    states_bytes    of disk for states between layers; 0 where memory holds them
    """

    checkpoint: Checkpoint
    plan: PrunePlan
    dataset: TokenDataset
    device: torch.device
    dtype: torch.dtype
    states_bytes: int

    def run(self, directory: Path) -> None:
        """Repair the pruned checkpoint in a directory."""
        from minitron_cli.models.streaming import StreamedModel
        from minitron_cli.prune.repair import Repair
        from minitron_cli.tokens import batch_rows

        told, split = self._told, self.dataset.split("train")
        original = StreamedModel(self.checkpoint, device=self.device, dtype=self.dtype)
        pruned = StreamedModel(Checkpoint(directory), device=self.device, dtype=self.dtype)
        # Never a sequence twice: the held-out ones must not be among the fitted.
        rows = batch_rows(told["seed"], 0, min(told["samples"], len(split)), len(split))
        place = None if self.states_bytes else self.device
        Repair(original, pruned, self.plan, split, rows, told["batch_size"], directory, place).run()

    @property
    def _told(self) -> dict[str, Any]:
        assert self.plan.repair is not None
        return self.plan.repair


def require_repairable(checkpoint: Checkpoint, plan: PrunePlan, config: PruneConfig) -> Repairs:
    """Look at all that a planned repair needs.

    Raises:
        FamilyError: the family does not end its sublayers in plain linears.
        InputError: the data are not there, or were prepared with another tokenizer.
        ResourceError: one layer of both models and the moments do not fit.
    """
    from minitron_cli.models.match import require_same_tokenizer
    from minitron_cli.prune.repair import memory_of
    from minitron_cli.runtime.device import pick_device, pick_dtype

    told = plan.repair
    assert told is not None
    require_ends(checkpoint)
    dataset = TokenDataset(Path(told["data"]))
    require_same_tokenizer(dataset, {"the checkpoint": config.checkpoint})
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    pruned = Shape.of(planned_config(checkpoint.shape, plan))
    spilled = memory_of(checkpoint, pruned, told["samples"], told["batch_size"], dataset.seq_len, device, dtype)
    return Repairs(checkpoint, plan, dataset, device, dtype, spilled)

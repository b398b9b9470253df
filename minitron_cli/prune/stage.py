"""The prune stage."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from minitron_cli.checkpoint.card import CheckpointOutput
from minitron_cli.checkpoint.companions import check_companions
from minitron_cli.checkpoint.hub import resolve
from minitron_cli.checkpoint.multimodal import WrappedPart, is_wrapped, open_checkpoint, open_shape, refuse_shared
from minitron_cli.checkpoint.reader import INDEX, WEIGHTS, Checkpoint
from minitron_cli.checkpoint.verify import check_structure
from minitron_cli.checkpoint.writer import WORKERS, WeightFiles
from minitron_cli.config.prune import PruneConfig
from minitron_cli.errors import CheckpointError, ConfigError, InputError, OutputError, ShapeError
from minitron_cli.importance.store import load_basis, load_scores
from minitron_cli.manifest import fingerprint, require_disk
from minitron_cli.prune.execute import check_plan, create_pruned, written_tensors
from minitron_cli.prune.plan import PrunePlan, make_plan, planned_config, size_plan
from minitron_cli.prune.repairing import require_repairable, with_repair
from minitron_cli.prune.residual import require_readers, rotates
from minitron_cli.prune.searched import searched_plan
from minitron_cli.prune.sizes import complete_target
from minitron_cli.runtime.memory import peak_rss_bytes
from minitron_cli.runtime.progress import Progress, say
from minitron_cli.shape import Shape


@dataclass(frozen=True)
class PruneResult:
    """What `prune` did; keys of `--json`."""

    out: str
    params_before: int
    params_after: int
    shape: dict[str, int]
    seconds: float
    peak_rss_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def plan_prune(config: PruneConfig) -> PrunePlan:
    """The plan of a prune command, validated to the end: sizes, family rules and the stock class.

    Raises:
        UserError: any problem with the input.
    """
    path = resolve(config.checkpoint)
    if _only_config(path) and config.plan is None and config.search is None:
        return _size_plan(config, path)
    checkpoint = open_checkpoint(path, text_only=config.text_only)
    plan = _plan(config, checkpoint)
    if plan.repair is not None:
        require_repairable(checkpoint, plan, config)
    _require_stock(planned_config(checkpoint.shape, plan))
    return plan


def _plan(config: PruneConfig, checkpoint: Checkpoint) -> PrunePlan:
    """The plan for a checkpoint, not yet shown to the stock class."""
    _ = checkpoint.declared
    for notice, count in checkpoint.dropped().items():
        say(f"{count} tensors are left out: {notice}")
    if config.plan is None and config.search is None:
        plan = with_repair(_ranked_plan(config, checkpoint), config, checkpoint)
        _tell_chosen(checkpoint.shape, plan)
        return plan
    plan = with_repair(_saved_plan(config), config, checkpoint)
    check_plan(plan, checkpoint.shape)
    _tell_chosen(checkpoint.shape, plan)
    _check_shared(checkpoint, plan.sizes, rotate=plan.rotate)
    if plan.rotate:
        # Told with the plan where they were then; a directory that has moved since is named again.
        directory = config.importance or Path(plan.statistics)
        load_basis(directory, checkpoint.shape["hidden"], 1)
        plan = replace(plan, statistics=str(directory.absolute()))
    return plan


def _require_stock(config: Mapping[str, Any]) -> None:
    """Insist that the stock class accepts a config; its import takes seconds."""
    from minitron_cli.models.load import stock_config

    stock_config(dict(config))


def _only_config(path: Path) -> bool:
    """Whether a directory holds a config.json and no weights of any kind: enough to plan sizes, not units."""
    weights = (WEIGHTS, INDEX, "*.bin", "*.pt")
    return (path / "config.json").is_file() and not any(any(path.glob(pattern)) for pattern in weights)


def _size_plan(config: PruneConfig, path: Path) -> PrunePlan:
    shape = open_shape(path, text_only=config.text_only)
    plan = size_plan(
        shape, _target(config), drop_layers=config.drop_layers, rotate=config.rotate == "on", untie=config.untie
    )
    if is_wrapped(path) and not config.text_only:
        refuse_shared(shape, plan.sizes)
    _tell_chosen(shape, plan)
    _require_stock(planned_config(shape, plan))
    return plan


def _tell_chosen(shape: Shape, plan: PrunePlan) -> None:
    """Say it where tokens will pass fewer experts, which changes what every layer computes for all of them."""
    before, after = shape.experts_per_token, Shape.of(planned_config(shape, plan)).experts_per_token
    if after < before:
        say(f"Tokens will pass {after} experts instead of {before}: the router can choose no more of those that stay.")


def _target(config: PruneConfig) -> dict[str, int]:
    """The sizes asked for.

    Raises:
        ConfigError: there are none.
    """
    target = config.target()
    if not target and not config.drop_layers and not config.text_only:
        raise ConfigError("Nothing to cut: give sizes such as --hidden 3072 --ffn 9216, or --plan, or --search.")
    return target


def _saved_plan(config: PruneConfig) -> PrunePlan:
    path = config.plan
    if config.search is not None:
        path = searched_plan(config.search, config.params)
    assert path is not None
    try:
        return PrunePlan.from_json(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a plan ({error}).") from None


def _ranked_plan(config: PruneConfig, checkpoint: Checkpoint) -> PrunePlan:
    target = _target(config)
    # Sizes first: a wrong one is told before any weight is read.
    sizes = complete_target(checkpoint.shape, target)
    _check_shared(checkpoint, sizes, rotate=config.rotate == "on")
    if config.rotate == "on":
        require_readers(checkpoint.shape)
        if config.importance is None:
            raise ConfigError("--rotate needs --importance: directions of the residual stream are found there.")
    if config.width_score in ("contribution", "fluctuation") and config.importance is None:
        raise ConfigError("--width-score needs --importance: what units do is measured there.")
    if config.expert_score != "reap" and config.importance is None:
        raise ConfigError("--expert-score needs --importance: what experts do is measured there.")
    if config.importance is not None:
        removed = checkpoint.shape["layers"] - target.get("layers", checkpoint.shape["layers"])
        source = fingerprint(checkpoint.path)
        scores, ranked_by = load_scores(
            config.importance, checkpoint.shape, source, config.layer_score, {removed}, config.width_score,
            config.expert_score,
        )  # fmt: skip
    else:
        from minitron_cli.importance.weights import normed_tensors, weight_norm_scores

        say("No --importance given: units are ranked by weight norms.")
        total = sum(each.entry.nbytes for each in normed_tensors(checkpoint))
        with Progress("weight norms", total, "bytes") as progress:
            scores, ranked_by = weight_norm_scores(checkpoint, on_bytes=progress.advance), "weight norms"
    # Other parts of a multimodal checkpoint write into the stream, too.
    how = "off" if isinstance(checkpoint, WrappedPart) else config.rotate
    turned = rotates(checkpoint.shape, scores, how, sizes["hidden"])
    return make_plan(
        checkpoint.shape, scores, target, ranked_by=ranked_by, drop_layers=config.drop_layers, rescale=config.rescale,
        rotate=config.importance if turned else None, untie=config.untie,
    )  # fmt: skip


def _check_shared(checkpoint: Checkpoint, sizes: dict[str, int], *, rotate: bool) -> None:
    if isinstance(checkpoint, WrappedPart):
        refuse_shared(checkpoint.shape, sizes)
        if rotate:
            raise ShapeError(
                "The other parts of a multimodal checkpoint write into the residual stream, which --rotate turns; add "
                "--text-only, which writes the text model alone."
            )


def run_prune(config: PruneConfig) -> PruneResult:
    """Plan, cut, write, and check that the stock class accepts the result.

    Raises:
        UserError: the input is wrong; nothing was written.
    """
    began = time.monotonic()
    path = resolve(config.checkpoint)
    if config.out.absolute() == path.absolute():
        raise OutputError("--out is the checkpoint itself; choose another directory.")
    inputs = _inputs(config, path)
    output = CheckpointOutput(config.out, "prune", config, inputs, force=config.force)
    if output.result is not None:
        say(f"{config.out} is up to date.")
        return PruneResult(**output.result)
    checkpoint = open_checkpoint(path, text_only=config.text_only)
    plan = _plan(config, checkpoint)
    repairs = require_repairable(checkpoint, plan, config) if plan.repair is not None else None
    tensors = list(written_tensors(checkpoint, plan))
    total = sum(planned.nbytes for planned, _ in tensors)
    states = repairs.states_bytes if repairs is not None else 0
    require_disk(config.out, total + states + (64 << 20), "The pruned checkpoint")
    with output:
        files = create_pruned(checkpoint, plan, tensors, output.partial, shard_bytes=config.shard_bytes)
        _fill(files, total, planned_config(checkpoint.shape, plan), plan, output.partial)
        if repairs is not None:
            repairs.run(output.partial)
        check_companions(path, output.partial)
        if fingerprint(path) != inputs["checkpoint"]:
            raise CheckpointError(f"{path} changed while it was read; let it come to rest and run again.")
        result = PruneResult(
            str(config.out), plan.params_before, plan.params_after, open_checkpoint(output.partial).shape.shown(),
            round(time.monotonic() - began, 3), peak_rss_bytes(),
        )  # fmt: skip
        output.commit(result.to_json())
    return result


def _inputs(config: PruneConfig, path: Path) -> dict[str, str]:
    """Fingerprints of all that is read.

    Raises:
        InputError: something is not there.
    """
    inputs = {"checkpoint": fingerprint(path)}
    names = ["importance", "plan", "search", *(["data"] if config.repair != "off" else [])]
    for name in names:
        source = getattr(config, name)
        if source is not None:
            if not Path(source).exists():
                raise InputError(f"--{name} {source} does not exist.")
            inputs[name] = fingerprint(source)
    return inputs


def _fill(files: WeightFiles, total: int, config: Mapping[str, Any], plan: PrunePlan, directory: Path) -> None:
    """Copy the values while the stock class, which takes seconds to import, judges config and headers.

    Raises:
        CheckpointError: the stock class refuses them, which stops the copy; a value is not finite; a file ended early.
    """

    def judge() -> None:
        _require_stock(config)
        check_structure(directory, expected_params=plan.params_after)

    with ThreadPoolExecutor(1) as pool, Progress("prune", total, "bytes") as progress:
        verdict = pool.submit(judge)

        def on_bytes(count: int) -> None:
            if verdict.done():
                verdict.result()
            progress.advance(count)

        # A rotated tensor is a product that keeps all processors busy, and may be held whole.
        files.fill(on_bytes, finite=True, workers=1 if plan.rotate else WORKERS)
        verdict.result()

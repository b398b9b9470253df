"""The text part of a multimodal checkpoint, seen as an ordinary checkpoint, and how it is put back into the whole.

Wrappers store the text part's tensors under prefixes of their own (`language_model.model.layers...`,
`model.language_model.layers...`, `model.text_model.layers...`, the head inside or outside), which are found by looking
for the names the family declares.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from minitron_cli.checkpoint.blocks import Source, Whole
from minitron_cli.checkpoint.reader import Checkpoint, Entry, read_config
from minitron_cli.checkpoint.writer import Planned
from minitron_cli.errors import CheckpointError, ConfigError, FamilyError, ShapeError
from minitron_cli.families import family_for, text_section
from minitron_cli.families.schema import Family, lookup
from minitron_cli.shape import Shape

SECTIONS = "rope_parameters.mrope_section"
"""Where the config says which channels turn by a place in an image."""

SHARED_AXES = ("hidden", "vocab")
"""Sizes that other parts rely on: a projector writes into the embedding space, a processor emits image tokens."""

INHERITED = (
    "dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "quantization_config",
    "transformers_version",
)  # fmt: skip
"""Keys that wrappers may write once, for all parts."""


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the text part alone, as the stock causal class reads it.

    Raises:
        CheckpointError: transformers does not know the wrapper, or has no causal class for its text part.
    """
    from minitron_cli.models.load import causal_class, stock_config

    section = text_section(config)
    assert section is not None
    stock = stock_config(dict(config))
    result = {key: config[key] for key in INHERITED if config.get(key) is not None and section.get(key) is None}
    result = {**section, **result, "architectures": [causal_class(stock.text_config).__name__]}
    # Published files leave out sizes that equal the class's defaults.
    for axis in family_for(section).axes:
        default = getattr(stock.text_config, axis.key, None) if axis.key else None
        if default is not None and lookup(section, axis.key) is None:
            result[axis.key] = default
    # The wrapper's class owns the head, so its key decides, whatever the section says.
    result["tie_word_embeddings"] = bool(stock.tie_word_embeddings)
    return result


class TextPart(Checkpoint):
    """The text part of a multimodal checkpoint, to stand alone.

    whole       config.json as it is on disk
    names       between declared names and those on disk
    outside     entries of all other tensors
    """

    def _read_config(self) -> dict[str, Any]:
        self.whole = read_config(self.path)
        return text_config(self.whole)

    def _by_declared_name(self, entries: list[Entry]) -> dict[str, Entry]:
        self.names = Names(self.shape.family, self.config, [entry.name for entry in entries])
        # Stock classes do not tie a head that has values of its own, whatever the config says.
        if self.names.has_head:
            self.config = {**self.config, "tie_word_embeddings": False}
            self.shape = Shape.of(self.config)
        family, layers = self.shape.family, self.shape["layers"]
        named = [
            (entry.name if family.dropped_notice(entry.name, layers) else self.names.declared(entry.name), entry)
            for entry in entries
        ]
        self.outside = [entry for name, entry in named if name is None]
        return {name: entry for name, entry in named if name is not None}

    @property
    def params_outside(self) -> int:
        """Parameters of the other parts; whole numbers are buffers."""
        return sum(prod(entry.shape) for entry in self.outside if entry.dtype.startswith(("F", "BF")))


class WrappedPart(TextPart):
    """The text part of a multimodal checkpoint, to be put back into the whole."""

    def put_back(self, tensors: Iterable[tuple[Planned, Source]]) -> Iterator[tuple[Planned, Source]]:
        """The text part's tensors under their names on disk, then all others as they are."""
        for planned, source in tensors:
            yield Planned(self.names.on_disk(planned.name), planned.dtype, planned.shape), source
        for entry in self.outside:
            yield Planned(entry.name, entry.dtype, entry.shape), Whole(entry)

    def put_back_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The whole config.json with a new text part; what was only filled in for the view is taken out again."""
        before = self.whole["text_config"]
        changed = {key for key in config if config[key] != self.config.get(key)}
        section = {key: config[key] if key in changed else before[key] for key in before if key in config}
        return {**self.whole, "text_config": {**section, **{key: config[key] for key in config if key in changed}}}


class Names:
    """Between a family's tensor names and those on disk, found from one tensor that has a vocabulary dimension.

    `heads` are the declared tensors that lie beside the decoder, not in it; wrappers move them about.
    """

    def __init__(self, family: Family, config: Mapping[str, Any], on_disk: list[str]) -> None:
        """Find the prefixes.

        Raises:
            FamilyError: no tensor on disk has a declared name behind any prefix.
        """
        expected = {name: tensor for name, tensor, _ in family.expected({**config, "tie_word_embeddings": False})}
        pattern = next(name for name in family.tensors if "{layer}" in name)
        self._base = pattern.split("{layer}")[0].rsplit(".", 2)[0] + "."
        body = [name.removeprefix(self._base) for name in expected if name.startswith(self._base)]
        self._words = {tail.split(".")[0] for tail in body}
        self.heads = [name for name in expected if not name.startswith(self._base)]
        tail = next(name for name, tensor in expected.items() if "vocab" in tensor.dims).removeprefix(self._base)
        prefixes = [name.removesuffix(tail) for name in on_disk if f".{name}".endswith(f".{tail}")]
        if not prefixes:
            raise FamilyError(
                f"No tensor is named ...{tail}: the {family.name} text part that config.json names is gone."
            )
        present = set(on_disk)
        self._body = max(prefixes, key=lambda prefix: sum(prefix + each in present for each in body))
        parts = self._body.split(".")[:-1]
        outer = ["".join(f"{part}." for part in parts[:count]) for count in range(len(parts), -1, -1)]
        self._head = next((each for each in outer if any(each + head in present for head in self.heads)), "")
        self.has_head = any(self._head + head in present for head in family.tied)

    def declared(self, name: str) -> str | None:
        """The family's name of a tensor on disk; None outside the text part.

        What lies in a module of the text part belongs to it, declared or not: nothing there may be passed over.
        """
        rest = name.removeprefix(self._body)
        if name.startswith(self._body) and rest.split(".")[0] in self._words:
            return self._base + rest
        head = name.removeprefix(self._head)
        return head if name.startswith(self._head) and head in self.heads else None

    def on_disk(self, name: str) -> str:
        """The name on disk of a tensor of the family."""
        return self._body + name.removeprefix(self._base) if name.startswith(self._base) else self._head + name


def open_checkpoint(path: Path, *, text_only: bool = False) -> Checkpoint:
    """A checkpoint to cut: a text model, or the text part of a multimodal one.

    Raises:
        ConfigError: the text part of a text model is asked for.
        UserError: as `Checkpoint`.
    """
    if not is_wrapped(path, text_only=text_only):
        return Checkpoint(path)
    return TextPart(path) if text_only else WrappedPart(path)


def open_shape(path: Path, *, text_only: bool = False) -> Shape:
    """The same from config.json alone."""
    config = read_config(path)
    return Shape.of(text_config(config) if is_wrapped(path, text_only=text_only) else config)


def is_wrapped(path: Path, *, text_only: bool = False) -> bool:
    """Whether a checkpoint wraps a text model that a family explains.

    Raises:
        ConfigError: it does not, and its text part is asked for.
    """
    config = read_config(path)
    wrapped = text_section(config) is not None
    if text_only and not wrapped:
        family_for(config)
        raise ConfigError(f"{path} is a text model already; leave out --text-only.")
    return wrapped


def refuse_wrapped(path: Path) -> None:
    """For stages that run a text model.

    Raises:
        FamilyError: the checkpoint wraps one; it says how to extract it.
    """
    if is_wrapped(path):
        family_for(read_config(path))


def fixed_in_place(shape: Shape) -> dict[str, str]:
    """Axes that stay while the text part is cut in place, and why."""
    fixed = {axis: f"the other parts of a multimodal checkpoint rely on {axis}" for axis in SHARED_AXES}
    if shape.family.rotary is not None and lookup(shape.config, SECTIONS):
        fixed[shape.family.rotary.axis] = "places in images turn sections of its channels"
    return fixed


def refuse_shared(shape: Shape, sizes: Mapping[str, int]) -> None:
    """In place, sizes that other parts rely on stay.

    Raises:
        ShapeError: one would change.
    """
    for axis, why in fixed_in_place(shape).items():
        if sizes[axis] != shape[axis]:
            raise ShapeError(
                f"{axis} {shape[axis]} -> {sizes[axis]}: {why}; cut it with --text-only, which writes the text model "
                "alone."
            )


def check_wrapped(path: Path, *, expected_params: int | None = None) -> int:
    """Compare the text part on disk with the one inside the stock multimodal class on the meta device.

    Returns the text part's parameter count.

    Raises:
        CheckpointError: the counts differ.
        FamilyError: a tensor is missing, undeclared or of another shape.
    """
    import torch
    from transformers import AutoModelForMultimodalLM

    from minitron_cli.models.load import stock_config

    part = WrappedPart(path)
    heads = sum(prod(part.entries[name].shape) for name in part.declared if name in part.names.heads)
    with torch.device("meta"):
        model = AutoModelForMultimodalLM.from_config(stock_config(part.whole))
    # Without the head, which the class may hold tied while the files decide otherwise.
    decoder = sum(parameter.numel() for parameter in model.get_decoder().parameters())
    params = part.shape.params
    if decoder != params - heads or expected_params not in (None, params):
        raise CheckpointError(
            f"{path}: the text part of the stock class has {decoder + heads:,} parameters, config.json gives {params:,}"
            + (f", the plan said {expected_params:,}" if expected_params is not None else "")
            + "; please report this as a bug."
        )
    return params

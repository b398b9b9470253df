"""Load a checkpoint with the stock transformers class, and insist that every weight was found."""

from __future__ import annotations

import logging
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from minitron_cli.checkpoint.multimodal import is_wrapped
from minitron_cli.errors import CheckpointError

logging.getLogger("transformers").setLevel(logging.ERROR)
disable_progress_bar()

LOADING = Lock()
"""While it loads, transformers exchanges methods of its classes; two threads at once could leave them exchanged."""


def load_model(path: Path | str, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model in eval mode, every parameter in its own fresh memory.

    Weights are copied out of the memory-mapped file: an equal start then means equal addresses' alignment, which
    matrix kernels depend on for bit-identical sums.

    Raises:
        CheckpointError: the stock class refuses the config, or weights are missing, unexpected or of another size.
    """
    try:
        with LOADING:
            model, info = auto_class(path).from_pretrained(
                str(path), dtype=dtype, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: transformers cannot load it: {first_sentence(error)}") from error
    for kind in ("missing_keys", "mismatched_keys"):
        if info.get(kind):
            name = sorted(map(str, info[kind]))[0]
            raise CheckpointError(f"{path}: {len(info[kind])} {kind.replace('_', ' ')} ({name}, ...); it is not whole.")
    own_memory(model)
    return model.to(device).eval()


def auto_class(path: Path | str) -> Any:
    """The stock loader of a local checkpoint: of text models, or of multimodal models around one."""
    return AutoModelForMultimodalLM if is_wrapped(Path(path)) else AutoModelForCausalLM


def model_from_tensors(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], *, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """The stock model of a config with these weights, by their names on disk; nothing is written.

    Raises:
        CheckpointError: the stock class refuses the config or misses a weight.
    """
    stock = stock_config(config)
    with LOADING:
        model, info = causal_class(stock).from_pretrained(
            None, config=stock, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
    if info["missing_keys"]:
        raise CheckpointError(f"The stock class misses {sorted(info['missing_keys'])[0]}; please report this as a bug.")
    own_memory(model)
    return model.to(device).eval()


def own_memory(model: torch.nn.Module) -> None:
    """Copy every parameter and buffer into memory of its own, keeping ties."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def new_model(config: dict[str, Any], *, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the stock class with random weights, reproducible by seed.

    Raises:
        CheckpointError: the stock class refuses the config.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(stock_config(config), dtype=dtype)


def causal_class(stock: Any) -> Any:
    """The causal LM class of a stock config object.

    Raises:
        CheckpointError: transformers has none.
    """
    try:
        return AutoModelForCausalLM._model_mapping[type(stock)]
    except KeyError:
        raise CheckpointError(f"transformers has no causal LM class for model_type {stock.model_type!r}.") from None


def stock_config(config: dict[str, Any]) -> Any:
    """The stock config object of a config.json dictionary.

    Raises:
        CheckpointError: the stock class refuses it, with its own words.
    """
    from transformers import AutoConfig

    values = _with_floats(dict(config))
    model_type = values.pop("model_type")
    try:
        return AutoConfig.for_model(model_type, **values)
    except Exception as error:  # strict dataclass validation raises several kinds
        raise CheckpointError(f"transformers refuses this {model_type} config: {first_sentence(error)}") from error


def _with_floats(value: Any) -> Any:
    """What stock classes write as {"__float__": "Infinity"}, which JSON has no word for, as numbers."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: _with_floats(each) for key, each in value.items()}
    return [_with_floats(each) for each in value] if isinstance(value, list) else value


def context_length(config: dict[str, Any]) -> int | None:
    """The most tokens of a sequence that the stock class is made for, or None where its config names no limit.

    Raises:
        CheckpointError: the stock class refuses the config.
    """
    found = getattr(stock_config(config).get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def first_sentence(error: BaseException) -> str:
    """The most telling line of a library's error, without its traceback."""
    cause = error.__cause__ or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__

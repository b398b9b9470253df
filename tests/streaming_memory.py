"""Run by test_streaming.py: score models whose weights exceed the address space this process may use.

python streaming_memory.py DIRECTORY FAMILY...
"""

from __future__ import annotations

import gc
import json
import resource
import shutil
import struct
import sys
import threading
from pathlib import Path

import numpy as np
import torch
from tiny import TINY
from transformers import AutoConfig

from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.importance.activations import Activations
from minitron_cli.importance.gather import Gathered
from minitron_cli.importance.stream import StreamedSweep
from minitron_cli.models.streaming import StreamedModel, open_model, weight_bytes
from minitron_cli.runtime.progress import set_quiet
from minitron_cli.shape import Shape
from minitron_cli.tokens import Split

FFN = 98_304
CPU = torch.device("cpu")


def make_wide(path: Path, family: str) -> Checkpoint:
    """A checkpoint of zeros with very wide MLPs: a sparse file, so that nothing is written."""
    values = dict(TINY[family])
    known = Shape.of(AutoConfig.for_model(values.pop("model_type"), **values).to_dict())
    if "ffn" in known.sizes:
        values[known.family.axis("ffn").key] = FFN
    if "experts" in known.sizes and "experts" not in known.absent:
        values[known.family.axis("expert_ffn").key] = FFN // known["experts"] // 8 * 8
    if len(known.layers_with("ffn")) == 1 and "layers_block_type" in values:
        values["layers_block_type"] = [*values["layers_block_type"], *["mlp"] * 3]
    config = AutoConfig.for_model(known.config["model_type"], **values).to_dict()
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    shape = Shape.of(config)
    header, offset = {}, 0
    for name, tensor, _ in shape.family.expected(config):
        size = shape.family.tensor_shape(tensor, shape.sizes)
        count = 4 * int(np.prod(size))
        header[name] = {"dtype": "F32", "shape": list(size), "data_offsets": [offset, offset + count]}
        offset += count
    text = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + offset)
    return Checkpoint(path)


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def sweep(checkpoint: Checkpoint, directory: Path) -> None:
    split = Split("train", np.full((2, 8), 5, np.uint16), None, 1.0)
    config = ImportanceConfig(checkpoint="c", data=directory, out=directory, batch_size=2)
    model = StreamedModel(checkpoint, device=CPU, dtype=torch.float32)
    activations = Activations((2, 8, model.shape["hidden"]), torch.float32, directory / "a", place=CPU)
    gathered = Gathered(model, config)
    StreamedSweep(model, gathered, activations, config, split, [0, 1], directory / "state").run()
    assert {"ffn", "expert_ffn"} & gathered.scores().keys()


def limited(checkpoint: Checkpoint) -> int:
    """Allow the frame, two layers and some room for activations and allocators; less than the model."""
    sizes = weight_bytes(checkpoint, 4)
    room = sizes[None] + 2 * max(size for layer, size in sizes.items() if layer is not None) + (48 << 20)
    assert room < sum(sizes.values())
    gc.collect()
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + room, resource.RLIM_INFINITY))
    return room


def main(root: Path, families: list[str]) -> None:
    set_quiet(True)
    torch.set_num_threads(1)
    threading.stack_size(1 << 20)  # the loader's short-lived threads reserve address space too
    for number, family in enumerate(["llama", *families]):
        path = root / str(number)
        checkpoint = make_wide(path, family)
        if number == 0:  # warm libraries up, then see that the limit bites
            sweep(checkpoint, path)
            (path / "state").unlink()
            limited(checkpoint)
            try:
                open_model(checkpoint, CPU, torch.float32, streamed=False)
            except (MemoryError, RuntimeError, OSError):
                print("control", flush=True)
        else:
            room = limited(checkpoint)
            sweep(checkpoint, path)
            print(family, f"{room / checkpoint.nbytes:.2f} of the model", flush=True)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        shutil.rmtree(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

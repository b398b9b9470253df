"""Cutting by blocks equals cutting whole tensors, bit by bit, holds little, and stops in one sentence."""

from __future__ import annotations

import errno
import json
import math
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import cases
from safetensors.torch import load_file, save_file
from tiny import TINY

from minitron_cli.checkpoint import blocks, writer
from minitron_cli.checkpoint.blocks import Choice, Cut, Whole, Workspace, all_finite, read_region, regions, spans
from minitron_cli.checkpoint.convert import Loaded
from minitron_cli.checkpoint.dtypes import TORCH_DTYPES
from minitron_cli.checkpoint.reader import Checkpoint, Entry, read_header
from minitron_cli.checkpoint.surgery import Kept, of_term, positions
from minitron_cli.checkpoint.writer import Planned, WeightFiles, weight_files
from minitron_cli.config.prune import PruneConfig
from minitron_cli.errors import CheckpointError, InputError, RunError
from minitron_cli.families.expression import axes, parse
from minitron_cli.families.schema import BYTES
from minitron_cli.prune import stage
from minitron_cli.prune.execute import check_plan, cut_tensors
from minitron_cli.prune.plan import PrunePlan
from minitron_cli.prune.stage import plan_prune, run_prune
from minitron_cli.shape import Shape, expert_of

TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def plainly_cut(checkpoint: Checkpoint, plan: PrunePlan) -> dict[str, torch.Tensor]:
    """The slow reference: whole tensors of the library's own reader, cut by index_select, queries folded."""
    shape, stored = checkpoint.shape, {}
    for file in checkpoint._files():
        stored |= load_file(file)
    by_entry = {id(entry): stored[entry.name] for entry in checkpoint.entries.values()}
    within = {axis.name: axis.within for axis in shape.family.axes if axis.within}
    number = {old: new for new, old in enumerate(plan.layers)}
    result = {}
    for name, (declared, layer) in checkpoint.declared.items():
        if layer is not None and layer not in number:
            continue
        tensor = by_entry[id(checkpoint.entries[name])]
        experts = plan.kept(layer).get("experts", np.arange(shape.sizes.get("experts", 0))).tolist()
        expert, part = expert_of(name), shape.family.taken_apart(declared)
        if expert is not None and expert not in experts:
            continue
        if part is not None:
            result[renumbered(name, layer, number)] = torch.stack(
                [chosen_of(tensor[each], part.dims, shape, plan.kept(layer), {"experts": each}) for each in experts]
            )
            continue
        outer = {} if expert is None else {"experts": expert}
        tensor = chosen_of(tensor, declared.dims, shape, plan.kept(layer), outer)
        scale = torch.ones(())
        for dim, text in enumerate(declared.dims):
            chosen = positions(parse(text), shape.sizes, plan.kept(layer), within, outer)
            if declared.role in ("query", "query_norm") and "head_dim" in axes(parse(text)):
                factor = math.sqrt(plan.sizes["head_dim"] / shape["head_dim"])
                along = torch.from_numpy(np.where(of_term(parse(text), shape.sizes)[chosen], factor, 1.0)).float()
                scale = scale * along.view([-1 if each == dim else 1 for each in range(tensor.ndim)])
        if scale.ndim and plan.sizes.get("head_dim") != shape.sizes.get("head_dim"):
            norm = declared.norm or shape.family.norm
            offset = norm.offset if declared.role == "query_norm" else 0.0
            tensor = ((tensor.float() + offset) * scale - offset).to(tensor.dtype)
        new_name = renumbered(name, layer, number)
        if expert is not None:
            new_name = new_name.replace(f"experts.{expert}.", f"experts.{experts.index(expert)}.")
        result[new_name] = tensor
    return result


def chosen_of(
    tensor: torch.Tensor, dims: tuple[str, ...], shape: Shape, kept: Kept, outer: dict[str, int]
) -> torch.Tensor:
    """Kept positions along every dimension."""
    within = {axis.name: axis.within for axis in shape.family.axes if axis.within}
    for dim, text in enumerate(dims):
        chosen = positions(parse(text), shape.sizes, kept, within, outer)
        tensor = tensor.index_select(dim, torch.from_numpy(chosen))
    return tensor


def renumbered(name: str, layer: int | None, number: dict[int, int]) -> str:
    """The name that a tensor of a layer has once others are gone."""
    return name if layer is None else name.replace(f".{layer}.", f".{number[layer]}.", 1)


def same_bytes(found: torch.Tensor, expected: torch.Tensor) -> bool:
    plain = [each.contiguous().flatten().view(torch.uint8) for each in (found, expected)]
    return found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(*plain)


def everything(source: Path, out: Path) -> PruneConfig:
    """All axes at once, a layer among them."""
    return PruneConfig(checkpoint=str(source), out=out, **cases(Checkpoint(source).shape)["everything"])


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(name, "BF16") for name in TINY] + [(name, kind) for name in ("llama", "phi3", "gpt2") for kind in ("F16", "F32")],
)
def test_every_family_by_blocks_equals_whole_tensors(family: str, dtype: str, tmp_path: Path) -> None:
    """From one element a block to all at once, in memory and in the file."""
    source = make_model(tmp_path / "source", family, dtype=TYPES[dtype])
    config = everything(source, tmp_path / "out")
    checkpoint, plan = Checkpoint(source), plan_prune(config)
    check_plan(plan, checkpoint.shape)
    expected = plainly_cut(checkpoint, plan)
    run_prune(config)
    written = load_file(tmp_path / "out" / "model.safetensors")
    prefix = "" if written.keys() == expected.keys() else checkpoint.shape.family.prefix
    assert written.keys() == {name.removeprefix(prefix) for name in expected} or written.keys() == expected.keys()
    for limit in (1, 100, blocks.BLOCK_BYTES):
        workspace = Workspace()
        for planned, cut in cut_tensors(checkpoint, plan):
            assert same_bytes(written[planned.name], expected[planned.name]), planned.name
            if math.prod(planned.shape) > 300 * limit:
                continue  # smallest blocks: the small tensors
            values = np.zeros(planned.nbytes, np.uint8)
            for place, produce in cut.blocks(limit):
                part = produce(workspace).reshape(-1).view(np.uint8)
                values[place : place + len(part)] = part
            assert values.tobytes() == expected[planned.name].contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("block", "gap", "shard"), [(1 << 10, 1, 20_000), (1 << 14, 1 << 9, 9_000_000), (200, 1, 7_000)]
)
def test_block_gap_and_shard_sizes_do_not_change_a_byte(
    block: int, gap: int, shard: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards in, shards out, threads in between."""
    source = make_model(tmp_path / "source", dtype=torch.bfloat16)
    run_prune(everything(source, tmp_path / "one"))
    expected = load_file(tmp_path / "one" / "model.safetensors")
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block)
    monkeypatch.setattr(blocks, "GAP_BYTES", gap)
    layers = Checkpoint(source).shape["layers"]
    run_prune(PruneConfig(checkpoint=str(source), out=tmp_path / "shards", layers=layers, shard_bytes=shard))
    plan = tmp_path / "one" / "plan.json"
    run_prune(PruneConfig(checkpoint=str(tmp_path / "shards"), out=tmp_path / "out", plan=plan, shard_bytes=shard))
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 3) == (shard < 100_000)
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == expected.keys()
    assert all(same_bytes(found[name], expected[name]) for name in expected)


@st.composite
def selected(draw: st.DrawFn) -> tuple[str, tuple[int, ...], list[np.ndarray[Any, Any]], int, int]:
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=0, max_size=4)))
    kept = [
        np.array(sorted(draw(st.sets(st.integers(0, length - 1), min_size=draw(st.integers(0, 1))))), np.int64)
        for length in shape
    ]
    return draw(st.sampled_from(list(BYTES))), shape, kept, draw(st.integers(1, 3000)), draw(st.integers(1, 64))


@given(selected())
@settings(max_examples=300, deadline=None)
def test_regions_hold_what_plain_indexing_holds(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[str, tuple[int, ...], list[np.ndarray[Any, Any]], int, int]
) -> None:
    """Any rank, any selection, any block size, every bit pattern; and no block reads more than its limit."""
    dtype, shape, kept, limit, gap = case
    itemsize, count = BYTES[dtype], math.prod(shape)
    stored = np.random.default_rng(count).integers(0, 256, count * itemsize, np.uint8)
    file = tmp_path_factory.getbasetemp() / "stored"
    file.write_bytes(b"header" + stored.tobytes())
    entry = Entry("x", file, dtype, shape, (6, 6 + len(stored)))
    values = stored.view(f"u{itemsize}").reshape(shape)
    expected = values[np.ix_(*kept)] if shape else values
    workspace, found = Workspace(), np.zeros(expected.nbytes, np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "GAP_BYTES", gap)
        for place, produce in Cut(entry, lambda: Choice(kept)).blocks(limit):
            part = produce(workspace)
            assert not found[place : place + part.nbytes].any() or not part.nbytes
            found[place : place + part.nbytes] = part.reshape(-1).view(np.uint8)
    assert found.tobytes() == np.ascontiguousarray(expected).tobytes()
    sizes = [math.prod(region.shape) * itemsize for region in regions(entry, kept, limit)]
    assert all(size <= max(limit, itemsize) for size in sizes)


def test_dropped_rows_are_skipped_where_it_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"x": torch.arange(1000.0).view(100, 10)}, tmp_path / "x.safetensors")
    [entry] = read_header(tmp_path / "x.safetensors")
    rows = np.array([0, 1, 2, 5, 50, 51, 99])
    monkeypatch.setattr(blocks, "GAP_BYTES", 10 * 40)
    counted: list[int] = []
    plain = blocks.read_into

    def counting(entry: Entry, start: int, into: Any) -> None:
        counted.append(into.nbytes)
        plain(entry, start, into)

    monkeypatch.setattr(blocks, "read_into", counting)
    [region] = regions(entry, [rows, np.arange(10)], 1 << 20)
    found = read_region(entry, region, Workspace())
    assert counted == [6 * 40, 2 * 40, 40]
    assert np.array_equal(found.view(np.float32), np.arange(1000, dtype=np.float32).reshape(100, 10)[rows])
    assert spans(np.array([0, 3]), 3) == [(0, 4)] and spans(np.array([0, 4]), 3) == [(0, 1), (4, 5)]


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_finite_is_what_torch_says_of_every_pattern(dtype: str) -> None:
    itemsize = BYTES[dtype]
    patterns = np.arange(1 << min(8 * itemsize, 16), dtype=f"u{itemsize}")
    if itemsize > 2:  # sign and exponent, with and without a fraction
        patterns = np.concatenate([patterns << (8 * itemsize - 16), (patterns << (8 * itemsize - 16)) + 1])
    tensor = torch.from_numpy(patterns.view(f"i{itemsize}" if itemsize > 1 else "u1")).view(TORCH_DTYPES[dtype])
    expected = torch.isfinite(tensor.float() if itemsize == 1 else tensor)
    assert [all_finite(each, dtype) for each in patterns[:, None]] == expected.tolist()
    assert all_finite(patterns[expected.numpy()], dtype) and not all_finite(patterns, dtype)


def test_whole_numbers_are_finite() -> None:
    for dtype in ("I64", "I32", "I16", "I8", "U8", "BOOL"):
        assert all_finite(np.full(3, -1, f"i{BYTES[dtype]}").view(f"u{BYTES[dtype]}"), dtype)


def test_memory_is_a_few_blocks_however_large_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block, rows = 1 << 20, 24 << 10
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block)
    source = {"x": torch.randn(rows, 512)}
    save_file(source, tmp_path / "x.safetensors")
    [entry] = read_header(tmp_path / "x.safetensors")
    kept = [np.arange(0, rows, 2), np.arange(0, 512, 3)]
    planned = Planned("x", "F32", (len(kept[0]), len(kept[1])))
    tracemalloc.start()
    WeightFiles({tmp_path / "y.safetensors": [(planned, Cut(entry, lambda: Choice(kept)))]}).fill(finite=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert entry.nbytes > 40 * block and peak < (3 * writer.WORKERS + 1) * block
    assert torch.equal(load_file(tmp_path / "y.safetensors")["x"], source["x"][::2, ::3])


def test_progress_adds_up_and_headers_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 512)
    source = Checkpoint(make_model(tmp_path / "source"))
    (tmp_path / "out").mkdir()
    tensors = [(Planned(e.name, e.dtype, e.shape), Whole(e)) for e in source.entries.values()]
    files = weight_files(tmp_path / "out", tensors, shard_bytes=30_000)
    headers = [entry for file in sorted((tmp_path / "out").glob("*.safetensors")) for entry in read_header(file)]
    assert [entry.name for entry in headers] == [planned.name for planned, _ in tensors]
    counts: list[int] = []
    files.fill(counts.append)
    assert sum(counts) == source.nbytes and len(counts) > 100
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == source.nbytes and len(index["weight_map"]) == len(tensors)


@pytest.mark.parametrize("shape", [(), (5,), (6, 4), (0, 3), (3, 4, 5)])
def test_loaded_tensors_of_any_layout(shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitron_cli.checkpoint.convert.BLOCK_BYTES", 40)
    tensor = torch.randn(shape[::-1]).permute(tuple(reversed(range(len(shape)))))
    WeightFiles({tmp_path / "x.safetensors": [(Planned("x", "F32", shape), Loaded(tensor))]}).fill()
    assert same_bytes(load_file(tmp_path / "x.safetensors")["x"], tensor.contiguous())


def after_creating(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Let something happen between the headers and the copy."""
    plain = stage.create_pruned

    def create(*args: Any, **kwargs: Any) -> WeightFiles:
        files = plain(*args, **kwargs)
        act()
        return files

    monkeypatch.setattr(stage, "create_pruned", create)


def assert_nothing_left(out: Path) -> None:
    assert not out.exists() and not out.with_name(out.name + ".partial").exists()


def test_a_file_cut_short_meanwhile_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = make_model(tmp_path / "source"), tmp_path / "out"
    after_creating(monkeypatch, lambda: os.truncate(source / "model.safetensors", 20_000))
    with pytest.raises(CheckpointError, match=r"model\.safetensors ended while .* was read"):
        run_prune(PruneConfig(checkpoint=str(source), out=out, ffn=40))
    assert_nothing_left(out)


@pytest.mark.parametrize("change", ["weights", "tokenizer"])
def test_a_source_that_changes_meanwhile_is_refused(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = make_model(tmp_path / "source"), tmp_path / "out"

    def rewrite() -> None:
        if change == "weights":
            tensors = {name: tensor + 1 for name, tensor in load_file(source / "model.safetensors").items()}
            save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        else:
            (source / "generation_config.json").write_text('{"do_sample": true}')

    after_creating(monkeypatch, rewrite)
    with pytest.raises(CheckpointError, match=r"changed while|did not arrive"):
        run_prune(PruneConfig(checkpoint=str(source), out=out, ffn=40))
    assert_nothing_left(out)


def test_a_disk_that_fills_up_midway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = make_model(tmp_path / "source"), tmp_path / "out"
    plain, left = os.pwrite, iter(range(5))

    def write(handle: int, data: Any, place: int) -> int:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(handle, data, place)

    monkeypatch.setattr(os, "pwrite", write)
    with pytest.raises(RunError, match="disk filled up"):
        run_prune(PruneConfig(checkpoint=str(source), out=out, ffn=40))
    monkeypatch.undo()
    assert_nothing_left(out)
    assert run_prune(PruneConfig(checkpoint=str(source), out=out, ffn=40)).shape["ffn"] == 40


def test_short_reads_and_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may do less than it was asked for."""
    source = make_model(tmp_path / "source")
    run_prune(PruneConfig(checkpoint=str(source), out=tmp_path / "plain", hidden=36))
    read, write = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda handle, into, place: read(handle, [into[0][:77]], place))
    monkeypatch.setattr(os, "pwrite", lambda handle, data, place: write(handle, data[:77], place))
    run_prune(PruneConfig(checkpoint=str(source), out=tmp_path / "short", hidden=36))
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "short"))
    assert one == other


def test_a_refusal_of_the_stock_class_stops_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = make_model(tmp_path / "source"), tmp_path / "out"

    def refuse(config: Any) -> None:
        raise CheckpointError("transformers refuses this config")

    monkeypatch.setattr(stage, "_require_stock", refuse)
    with pytest.raises(CheckpointError, match="transformers refuses"):
        run_prune(PruneConfig(checkpoint=str(source), out=out, ffn=40))
    assert_nothing_left(out)


def test_what_progress_raises_stops_every_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 64)
    source, made = Checkpoint(make_model(tmp_path / "source")), []
    tensors = [(Planned(e.name, e.dtype, e.shape), Whole(e)) for e in source.entries.values()]
    plain = writer._copy
    monkeypatch.setattr(writer, "_copy", lambda *args: (made.append(1), plain(*args))[1])

    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weight_files(tmp_path, tensors).fill(interrupt)
    assert len(made) <= 2 * writer.WORKERS


EDITS: dict[str, Callable[[list[int]], object]] = {
    "descending": lambda units: units[::-1],
    "twice": lambda units: [units[0], *units[:-1]],
    "beyond": lambda units: [*units[:-1], 1000],
    "negative": lambda units: [-1, *units[1:]],
    "too few": lambda units: units[1:],
    "no list": lambda units: "ab",
    "fractions": lambda units: [float(unit) for unit in units],
}


@pytest.mark.parametrize("axis", ["hidden", "ffn", "layers"])
@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_plan_that_cannot_be_cut_is_refused(edit: str, axis: str, llama: Path, tmp_path: Path) -> None:
    plan = plan_prune(PruneConfig(checkpoint=str(llama), out=tmp_path / "out", hidden=36, ffn=40, layers=2)).to_json()
    check_plan(PrunePlan.from_json(plan), Checkpoint(llama).shape)
    units = plan["layers"] if axis == "layers" else plan["keep"][axis]
    per_layer = isinstance(units[0], list)
    edited = [units[0], EDITS[edit](units[1])] if per_layer else EDITS[edit](units)
    change = {"layers": edited} if axis == "layers" else {"keep": {**plan["keep"], axis: edited}}
    saved = tmp_path / "plan.json"
    saved.write_text(json.dumps({**plan, **change}))
    with pytest.raises(InputError, match=f"units of {axis}, ascending"):
        run_prune(PruneConfig(checkpoint=str(llama), out=tmp_path / "out", plan=saved))
    assert_nothing_left(tmp_path / "out")

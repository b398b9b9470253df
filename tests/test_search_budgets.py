"""Budgets and enumeration: the paper's candidate lists, fast counts against slow ones, and what is refused."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_families_meta import CASES
from test_public_shapes import LLAMA_3_1_8B, NEMOTRON_4_15B, config_only
from tiny import TINY

from minitron_cli.checkpoint.surgery import new_config
from minitron_cli.config.search import SearchConfig
from minitron_cli.errors import ConfigError, FamilyError, InputError, ShapeError, UserError
from minitron_cli.families import FAMILIES
from minitron_cli.prune.sizes import complete_target
from minitron_cli.search.budget import Budget, make_budgets, read_bytes, read_seconds
from minitron_cli.search.cost import Costs
from minitron_cli.search.enumerate import Candidate, enumerate_candidates, usable_grid
from minitron_cli.search.grid import automatic_grid, plain_grid, read_cuts, read_grid
from minitron_cli.search.latency import Stopwatch
from minitron_cli.search.listing import feasible, run_list
from minitron_cli.search.space import Space
from minitron_cli.search.table import format_search
from minitron_cli.shape import Shape

GEMMA_2_9B: dict[str, Any] = dict(
    model_type="gemma2", num_hidden_layers=42, hidden_size=3584, num_attention_heads=16, num_key_value_heads=8,
    head_dim=256, intermediate_size=14336, vocab_size=256000, sliding_window=4096,
)  # fmt: skip
GPT_OSS_20B: dict[str, Any] = dict(
    model_type="gpt_oss", num_hidden_layers=24, hidden_size=2880, intermediate_size=2880, num_local_experts=32,
    num_experts_per_tok=4, num_attention_heads=64, num_key_value_heads=8, head_dim=64, vocab_size=201088,
    sliding_window=128,
)  # fmt: skip

# Layers, query heads, ffn, hidden: tables 16 and 17 of the Minitron paper, recomputed.
MINITRON_8B = {
    (32, 32, 12800, 5120), (32, 32, 13824, 4608), (32, 48, 11520, 4608), (32, 48, 16384, 4096), (31, 32, 12800, 5120),
    (31, 32, 16128, 4608), (31, 48, 13824, 4608), (31, 48, 16384, 4096), (30, 32, 12800, 5120), (30, 32, 16128, 4608),
    (30, 48, 13824, 4608), (30, 48, 16384, 4096), (29, 32, 12800, 5120), (29, 32, 16128, 4608), (29, 48, 13824, 4608),
}  # fmt: skip
MINITRON_8B_STRICT = MINITRON_8B - {(32, 32, 12800, 5120), (31, 32, 16128, 4608)} | {
    (32, 48, 14336, 4096), (32, 32, 16384, 4096), (31, 48, 11520, 4608), (31, 32, 13824, 4608), (29, 48, 16384, 4096),
}  # fmt: skip
MINITRON_4B = {
    (32, 48, 10240, 2560), (32, 48, 8960, 2560), (32, 32, 10240, 2560), (32, 32, 7680, 3072), (32, 24, 9216, 3072),
    (32, 24, 7680, 3072), (31, 48, 10240, 2560), (31, 48, 8960, 2560), (31, 32, 7680, 3072), (31, 24, 9216, 3072),
    (31, 24, 7680, 3072), (30, 48, 10240, 2560), (30, 32, 7680, 3072), (30, 24, 9216, 3072), (29, 48, 10240, 2560),
    (29, 32, 9216, 3072), (29, 32, 7680, 3072), (29, 24, 9216, 3072),
}  # fmt: skip
COMMON = ("layers=29..32", "ffn=2.5x,3x,3.5x,4x")
GRID_8B = (*COMMON, "heads=32,48", "hidden=4096,4608,5120,5632,6144")
GRID_4B = (*COMMON, "heads=24,32,48", "hidden=2560,3072,3584,4096,4608")


def settings(**changes: Any) -> SearchConfig:
    return SearchConfig(checkpoint="x", list=True, **changes)


def found(config: dict[str, Any], **changes: Any) -> list[Candidate]:
    (candidates,) = feasible(settings(**changes), Shape.of(config)).values()
    return candidates


@pytest.mark.parametrize(
    ("grid", "window", "expected"),
    [
        (GRID_8B, {"params_range": "7.8e9:8.5e9"}, MINITRON_8B),
        (GRID_8B, {"params": "8B", "tolerance": "5%"}, MINITRON_8B_STRICT),
        (GRID_4B, {"params": "4.0e9", "tolerance": "5%"}, MINITRON_4B),
    ],
    ids=["8B", "8B strict", "4B"],
)
def test_the_papers_candidates(grid: tuple[str, ...], window: dict[str, str], expected: set[tuple[int, ...]]) -> None:
    candidates = found(NEMOTRON_4_15B, grid=grid, **window)
    shapes = [tuple(c.shape[axis] for axis in ("layers", "heads", "ffn", "hidden")) for c in candidates]
    assert set(shapes) == expected and len(shapes) == len(expected)
    assert all((c.shape["kv_heads"], c.shape["head_dim"]) == (8, 128) for c in candidates)


def cuts_of(shape: Shape, generator: random.Random) -> dict[str, int]:
    """Random sizes of a few axes; of a family that is not pruned yet, too."""
    axes = [axis.name for axis in shape.family.axes if axis.prunable and axis.name not in shape.absent]
    return {axis: generator.randint(1, max(shape[axis], 1)) for axis in generator.sample(axes, min(3, len(axes)))}


def slow_and_fast(shape: Shape, costs: Costs, sizes: dict[str, int]) -> tuple[list[int], list[int]]:
    cut = Shape.of(new_config(shape.config, shape.family, sizes, list(range(sizes["layers"]))))
    slow = [cut.params, cut.params_non_embedding, cut.params_active]
    slow += [cut.kv_bytes(20, 1), cut.flops_per_token(), cut.flops_per_token(20)]
    fast = [costs.params, costs.params_non_embedding, costs.params_active]
    fast += [costs.kv_elements(20), costs.flops_per_token(0), costs.flops_per_token(20)]
    return slow, [cost.at(costs.extended(sizes)) for cost in fast]


@pytest.mark.parametrize("name", CASES)
def test_fast_costs_equal_slow_ones(name: str) -> None:
    """Of the original and of random cuts, in every family."""
    shape = Shape.of({"model_type": name.split("-")[0], **CASES[name]})
    costs, generator = Costs(shape), random.Random(name)
    slow, fast = slow_and_fast(shape, costs, dict(shape.sizes))
    assert fast == slow
    valid = 0
    for _ in range(300 if not shape.family.draft else 0):
        try:
            sizes = complete_target(shape, cuts_of(shape, generator))
        except ShapeError:
            continue
        slow, fast = slow_and_fast(shape, costs, sizes)
        assert fast == slow, sizes
        valid += 1
    assert valid > 3 or shape.family.draft


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "nemotron_h-latent", "qwen3_next"])
def test_fast_costs_of_experts(name: str) -> None:
    """Fewer experts than a token passes, too: then it passes all that are left."""
    shape = Shape.of({"model_type": name.split("-")[0], "num_experts_per_tok": 2, **CASES[name]})
    costs = Costs(shape)
    for experts, layers in itertools.product((1, 2, shape["experts"]), (1, 2, shape["layers"])):
        sizes = {**shape.sizes, "experts": experts, "layers": layers}
        slow, fast = slow_and_fast(shape, costs, sizes)
        assert fast == slow
    assert shape.params_active < shape.params


def test_every_derived_axis_is_understood() -> None:
    """`cost._substituted` knows names, products and quotients of two axes."""
    for family in FAMILIES:
        for axis in family.axes:
            if not axis.key and isinstance(axis.default, str):
                operators = set(axis.default.split()[1::2])
                assert operators <= {"*"} or (operators == {"//"} and len(axis.default.split()) == 3), family.name


@pytest.mark.parametrize("name", TINY)
def test_boxes_lose_no_point(name: str) -> None:
    """Every window of parameters gives what a loop over all points gives, and bounds hold in every family."""
    shape = Shape.of(TINY[name])
    generator = random.Random(name)
    axes = [axis.name for axis in shape.family.axes if axis.prunable and axis.name not in shape.absent]
    picked = generator.sample(axes, min(3, len(axes)))
    values = {
        axis: sorted({shape[axis], *(generator.randint(1, shape[axis]) for _ in range(4))}, reverse=True)
        for axis in picked
    }
    space = Space(shape, plain_grid(values))
    slow = {}
    for point in itertools.product(*values.values()):
        target = dict(zip(values, point, strict=True))
        try:
            sizes = complete_target(shape, target)
        except ShapeError:
            continue
        cut = Shape.of(new_config(shape.config, shape.family, sizes, list(range(sizes["layers"]))))
        slow[point] = cut.params
    assert slow
    for _ in range(5):
        low, high = sorted((generator.choice(list(slow.values())), generator.choice(list(slow.values()))))
        budget = total_budget(space, low, high)
        names = [candidate.shape.params for candidate in enumerate_candidates(space, [budget])]
        assert names == sorted((params for params in slow.values() if low <= params <= high), reverse=True)


def total_budget(space: Space, low: int, high: int) -> Budget:
    return Budget("--params-range", "total parameters", low, high, space.costs.params, lambda shape: shape.params)


def test_bounds_are_inclusive() -> None:
    width = 4_512_746_496  # Llama-3.1-Minitron-4B-Width
    grid = ("hidden=2560,3072,4096", "ffn=7168,9216,14336", "layers=16,32")
    assert [dict(c.target) for c in found(LLAMA_3_1_8B, params_range=f"{width}:{width}", grid=grid)] == [
        {"hidden": 3072, "ffn": 9216}
    ]


def test_a_million_points_are_not_all_visited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: with a narrow window, two bounds per hundred points."""
    calls = [0]
    real = Costs.bounds

    def counting(*arguments: Any) -> Any:
        calls[0] += 1
        return real(*arguments)

    monkeypatch.setattr(Costs, "bounds", counting)
    shape = Shape.of(NEMOTRON_4_15B)
    grid = read_grid(["layers=17..32", "heads=8..48/8", "ffn=256..24576/256", "hidden=2048..6144/32"], shape, {})
    space = Space(shape, grid)
    assert len(space) > 1_000_000
    assert len(enumerate_candidates(space, [total_budget(space, 7_999_000_000, 8_001_000_000)])) == 147
    assert calls[0] < 0.05 * len(space)


def test_budgets_together_and_alone() -> None:
    grid = ("hidden=2048..4096/512", "ffn=6144..14336/2048", "layers=24..32", "kv-heads=4,8")
    everything = found(LLAMA_3_1_8B, weight_bytes="100%", grid=grid)
    assert len(everything) == 5 * 5 * 9 * 2
    small = found(LLAMA_3_1_8B, weight_bytes="8GB", grid=grid)
    assert {c.name for c in small} == {c.name for c in everything if 2 * c.shape.params <= 8e9}
    assert {c.name for c in found(LLAMA_3_1_8B, weight_bytes="2GB", weight_bits=4, grid=grid)} == {
        c.name for c in small
    }
    cached = found(LLAMA_3_1_8B, kv_bytes="50%", context=8192, grid=grid)
    assert {c.name for c in cached} == {c.name for c in everything if c.shape["kv_heads"] == 4}
    quick = found(LLAMA_3_1_8B, flops="8e9", context=4096, grid=grid)
    assert {c.name for c in quick} == {c.name for c in everything if c.shape.flops_per_token(4096) <= 8e9}
    together = found(
        LLAMA_3_1_8B, weight_bytes="8GB", kv_bytes="50%", context=4096, flops="8e9", params="4B", tolerance="20%",
        grid=grid,
    )  # fmt: skip
    by_hand = {c.name for c in small} & {c.name for c in cached} & {c.name for c in quick}
    assert {c.name for c in together} == {
        c.name for c in everything if c.name in by_hand and 3.2e9 <= c.shape.params <= 4.8e9
    }
    assert together and len(together) < len(small)
    counted = found(LLAMA_3_1_8B, params="3B", count="non-embedding", grid=grid)
    assert all(2.85e9 <= c.shape.params_non_embedding <= 3.15e9 for c in counted)


def test_costs_in_closed_form() -> None:
    """By hand, from the published sizes."""
    llama = Shape.of(LLAMA_3_1_8B)
    assert llama.params_active == llama.params
    assert llama.kv_bytes(1000) == 2 * 32 * 2 * 8 * 128 * 1000
    assert llama.flops_per_token() == 2 * (llama.params_non_embedding + 4096 * 128256)
    assert llama.flops_per_token(1000) - llama.flops_per_token() == 2 * 32 * 2 * 32 * 128 * 1000
    gemma = Shape.of(GEMMA_2_9B)
    assert gemma.kv_bytes(8192) == 2 * 2 * 8 * 256 * (21 * 4096 + 21 * 8192)
    assert gemma.kv_bytes(100) == gemma.kv_bytes_per_token() * 100
    assert gemma.flops_per_token(8192) - gemma.flops_per_token() == 2 * 2 * 16 * 256 * (21 * 4096 + 21 * 8192)
    # The model card: 20.9B, of which 3.6B active without the input embedding.
    oss = Shape.of(GPT_OSS_20B)
    assert oss.params == 20_914_757_184 and oss.params_active == 4_187_440_704
    assert oss.flops_per_token() == 2 * (4_187_440_704 - 2880 * 201088)
    table = Shape.of(dict(model_type="gpt2", n_layer=12, n_embd=768, n_head=12, vocab_size=50257))
    assert table.flops_per_token() == 2 * (table.params - 1024 * 768)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GB", 8e9), ("7.5GiB", 7.5 * 2**30), ("500M", 5e8), ("1_000", 1000), ("25%", 250), ("12 kB", 12e3), ("9B", 9)],
)
def test_read_bytes(text: str, expected: float) -> None:
    assert read_bytes(text, 1000) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "8XB", "inf", "nan", "5%%"])
def test_bad_bytes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write 8GB"):
        read_bytes(text, 1000)


def test_read_seconds() -> None:
    assert (read_seconds("20ms"), read_seconds("0.5s"), read_seconds("3us")) == (0.02, 0.5, 3e-6)
    for text in ("20", "s", "0ms", "5%"):
        with pytest.raises(ConfigError, match="write 20ms"):
            read_seconds(text)


def test_read_grid() -> None:
    shape = Shape.of(LLAMA_3_1_8B)
    grid = read_grid(["layers=29..32", "hidden=2048,4096", "kv-heads=2..8/2", "ffn=2.5x,3x"], shape, {})
    entries = {axis: [float(entry) for entry in values.entries] for axis, values in grid.items()}
    assert entries == {"layers": [29, 30, 31, 32], "hidden": [2048, 4096], "kv_heads": [2, 4, 6, 8], "ffn": [2.5, 3]}
    assert grid["ffn"].factors and not grid["hidden"].factors
    assert [int(entry) for entry in read_grid(["heads=auto"], shape, {})["heads"].entries] == [16, 24, 32]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("depth=3", "one of layers, hidden, ffn"),
        ("hidden", "write axis=values"),
        ("hidden=", "not a size"),
        ("hidden=64..32", "empty"),
        ("hidden=0..64", "starts at 0"),
        ("hidden=64..128/0", "empty"),
        ("hidden=2x", "multiples of hidden"),
        ("ffn=2x,9216", "neither beside sizes"),
        ("ffn=0x", "not a size"),
        ("hidden=8192", "larger than the original 4096"),
        ("layers=1..99999999999", "larger than the original 32"),
        ("vocab=1000", "the tokenizer decides it"),
        ("group=2", "derived"),
        ("ffn[3]=9216", "one intermediate_size from config.json"),
        ("ffn=@per-layer", "the same in every layer"),
        ("nothing[3]=9216", "the same in every layer"),
    ],
)
def test_bad_grids_are_refused(entry: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_grid([entry], Shape.of(LLAMA_3_1_8B), {})
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_an_axis_is_given_once() -> None:
    for entries in (["ffn=9216", "ffn=8192"], ["auto", "hidden=4096"]):
        with pytest.raises(ConfigError, match="twice"):
            read_grid(entries, Shape.of(LLAMA_3_1_8B), {})


def test_values_that_no_rule_allows(capsys: pytest.CaptureFixture[str]) -> None:
    """Named: an error; from a range: left out, and said; in some combinations only: a skipped point."""
    shape = Shape.of(LLAMA_3_1_8B)
    with pytest.raises(ShapeError, match=r"hidden=3000 can be in no shape of the grid.*multiple of heads 32"):
        usable_grid(shape, read_grid(["hidden=3000,3072"], shape, {}))
    with pytest.raises(ShapeError, match=r"ffn=3.33x can be in no shape of the grid"):
        usable_grid(shape, read_grid(["ffn=3.33x", "hidden=3072,4096"], shape, {}))
    with pytest.raises(ShapeError, match=r"ffn=4x can be in no shape of the grid.*larger than the original"):
        usable_grid(shape, read_grid(["ffn=4x"], shape, {}))
    with pytest.raises(ShapeError, match="none of its values"):
        usable_grid(shape, read_grid(["heads=9..15"], shape, {}))
    grid = usable_grid(shape, read_grid(["heads=1..32"], shape, {}))
    assert [int(entry) for entry in grid["heads"].entries] == [8, 16, 32]
    assert "29 of 32 values are left out" in capsys.readouterr().err
    # 3000 is a multiple of 24 and 8 heads, not of 32: some points are skipped, no value is refused.
    names = [c.name for c in found(LLAMA_3_1_8B, weight_bytes="100%", grid=("hidden=3000,3072", "heads=8,24,32"))]
    assert sorted(name.split("-")[1] + name.split("-")[3] for name in names) == [
        "3000h24/8x128", "3000h8/8x128", "3072h24/8x128", "3072h32/8x128", "3072h8/8x128"
    ]  # fmt: skip


def test_automatic_grids() -> None:
    shape = Shape.of(LLAMA_3_1_8B)
    grid = {axis: [int(entry) for entry in values.entries] for axis, values in automatic_grid(shape).items()}
    assert list(grid) == ["layers", "hidden", "ffn"]
    assert grid["layers"] == list(range(24, 33)) and grid["hidden"] == list(range(2048, 4097, 256))
    assert min(grid["ffn"]) == 3584 and all(value % 512 == 0 for value in grid["ffn"])
    cuts = read_cuts(["20%", "heads=0.5"])
    cut = {axis: [int(entry) for entry in values.entries] for axis, values in automatic_grid(shape, cuts).items()}
    assert min(cut["layers"]) == 26 and min(cut["hidden"]) == 3328 and cut["heads"] == [16, 24, 32]
    for text in ("100%", "x", "=5%", "-1", "layers="):
        with pytest.raises(ConfigError, match="--max-cut"):
            read_cuts([text])
    with pytest.raises(ConfigError, match="can cut layers"):
        automatic_grid(shape, {"vocab": 0.5})
    with pytest.raises(ConfigError, match="no --grid is automatic"):
        found(LLAMA_3_1_8B, params="50%", max_cut=("30%",), grid=("ffn=9216",))
    assert found(LLAMA_3_1_8B, params="80%", max_cut=("30%",))


def test_a_budget_nobody_can_meet() -> None:
    """The sentence names the budget that excludes, and the nearest shapes on both sides."""
    grid = ("hidden=2048..4096/256", "ffn=4096..14336/1024", "layers=24..32")
    sizes = [c.shape.params for c in found(LLAMA_3_1_8B, weight_bytes="100%", grid=grid)]
    assert len(sizes) == 9 * 11 * 9
    gap, below, above = max((high - low, low, high) for high, low in itertools.pairwise(sorted(sizes, reverse=True)))
    with pytest.raises(InputError, match=f"{below:,} .*below.* and {above:,} .*above"):
        found(LLAMA_3_1_8B, params_range=f"{below + 1}:{above - 1}", grid=grid)
    with pytest.raises(InputError, match=f"^--params 1M: .*nearest has {min(sizes):,} [^,]*, above.; relax"):
        found(LLAMA_3_1_8B, params="1M", grid=grid)
    with pytest.raises(InputError, match=f"nearest has {max(sizes):,} [^,]*, below.; relax"):
        found(LLAMA_3_1_8B, params_range="20B:30B", grid=grid)
    with pytest.raises(InputError, match=r"the one shape of the grid has 8,030,261,248 .*--grid auto"):
        found(LLAMA_3_1_8B, params="4B")
    with pytest.raises(InputError, match="--kv-bytes 10% excludes every shape that meets --params 50%: none has at"):
        found(LLAMA_3_1_8B, params="50%", kv_bytes="10%", context=100, grid=grid)
    assert gap > 2


def test_the_nearest_shape_meets_the_other_budgets() -> None:
    grid = ("hidden=2048..4096/256", "layers=8..32", "kv-heads=2,4,8")
    fitting = found(LLAMA_3_1_8B, params="50%", grid=grid)
    smallest = min(candidate.shape.kv_bytes(100) for candidate in fitting)
    with pytest.raises(InputError, match=f"the nearest has {smallest:,} bytes"):
        found(LLAMA_3_1_8B, params="50%", kv_bytes=str(smallest - 1), context=100, grid=grid)


def test_too_many_to_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitron_cli.search.enumerate.MOST", 10)
    with pytest.raises(InputError, match="More than 10 of the grid's 33 shapes"):
        found(LLAMA_3_1_8B, weight_bytes="100%", grid=("layers=22..32", "kv-heads=2,4,8"))


def test_a_family_that_is_not_pruned_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    draft = tuple(replace(family, draft=True) for family in FAMILIES)
    monkeypatch.setattr("minitron_cli.families.FAMILIES", draft)
    with pytest.raises(FamilyError, match="inspected but not pruned"):
        found(GPT_OSS_20B, params="50%", count="active")


def test_active_budget_counts_active_parameters() -> None:
    shape = Shape.of(GPT_OSS_20B)
    (budget,) = make_budgets(settings(params="50%", count="active"), shape, Costs(shape))
    assert (budget.low + budget.high) / 2 == pytest.approx(shape.params_active / 2, rel=1e-6)


def test_names_tell_candidates_apart() -> None:
    shape = Shape.of(LLAMA_3_1_8B)
    names = {Candidate({"latent": size}, shape).name for size in (1, 2)}
    assert len(names) == 2


def test_list_imports_no_torch_and_prints_json(tmp_path: Path) -> None:
    checkpoint = config_only(tmp_path / "model", LLAMA_3_1_8B)
    code = (
        "import sys\nfrom minitron_cli.__main__ import main\ntry:\n    main()\nfinally:\n"
        "    heavy = {'torch', 'transformers'} & set(sys.modules)\n    assert not heavy, heavy\n"
    )
    options = ["--list", "--params", "4.5B", "--grid", "hidden=3072", "--grid", "ffn=3x", "--json", "--context", "100"]
    done = subprocess.run(
        [sys.executable, "-c", code, "search", checkpoint, *options], capture_output=True, text=True, check=True
    )
    (row,) = json.loads(done.stdout)["candidates"]
    assert row["params"] == 4_512_746_496 and row["params_active"] == row["params"]
    assert row["weight_bytes"] == 2 * row["params"] and row["kv_bytes"] == 32 * 2 * 8 * 128 * 2 * 100
    assert row["shape"]["hidden"] == 3072 and row["shape"]["ffn"] == 9216
    assert all(row[key] is None for key in ("loss_zero_shot", "loss_retrained", "rank", "seconds_per_token"))


def test_table(tmp_path: Path) -> None:
    checkpoint = config_only(tmp_path / "model", LLAMA_3_1_8B)
    config = SearchConfig(checkpoint=checkpoint, list=True, params="4.5B", grid=("hidden=3072", "ffn=8704,9216"))
    heading, titles, *rows = format_search(run_list(config).to_json()).splitlines()
    assert heading == "2 shapes meet the budgets; 2 listed."
    assert "rank" not in titles and "KV GB" not in titles and "zero-shot" not in titles
    assert "4,512,746,496" in rows[0] and len({len(line) for line in (titles, *rows)}) == 1


@pytest.mark.parametrize("name", TINY)
def test_every_family_can_be_timed(name: str) -> None:
    """Decode and prefill of the stock class, bounded steps, a positive time."""
    shape = Shape.of(TINY[name])
    for measure in ("decode", "prefill") if name in ("llama", "gpt2", "gemma3_text") else ("decode",):
        watch = Stopwatch(settings(latency="10s", measure=measure, measure_seconds=1e-6, device="cpu", dtype="float32"))
        watch.keep_fast([Candidate({}, shape)])
        assert 0 < watch.seconds[shape.label()] < 10


def test_fast_candidates_are_kept_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stopwatch that counts layers: what is over the limit goes, and saved timings are not taken again."""
    candidates = found(LLAMA_3_1_8B, weight_bytes="100%", grid=("layers=28..32",))
    timed: list[int] = []

    def layers(watch: Stopwatch, shape: Shape, context: int) -> float:
        timed.append(shape["layers"])
        return shape["layers"] / 1000

    monkeypatch.setattr(Stopwatch, "_seconds_per_token", layers)
    monkeypatch.setattr("minitron_cli.search.latency.require_memory", lambda *arguments: None)
    watch = Stopwatch(settings(latency="31ms", throughput=33.0, device="cpu"))
    assert [c.shape["layers"] for c in watch.keep_fast(candidates)] == [30, 29, 28]
    assert timed == [32, 31, 30, 29, 28]
    again = Stopwatch(settings(latency="31ms", device="cpu"), watch.seconds)
    assert [c.shape["layers"] for c in again.keep_fast(candidates)] == [31, 30, 29, 28] and len(timed) == 5
    with pytest.raises(InputError, match="the fastest takes 28 ms"):
        Stopwatch(settings(latency="1ms", device="cpu"), watch.seconds).keep_fast(candidates)
    monkeypatch.setattr("minitron_cli.search.latency.MOST_TIMED", 4)
    with pytest.raises(InputError, match="at most 4 are measured"):
        Stopwatch(settings(latency="31ms", device="cpu")).keep_fast(candidates)


def test_measured_context_must_fit_learned_positions() -> None:
    watch = Stopwatch(settings(latency="1s", context=64, device="cpu"))
    with pytest.raises(ConfigError, match="64 positions"):
        watch.keep_fast([Candidate({}, Shape.of(TINY["gpt2"]))])

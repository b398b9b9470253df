"""How fast a huge grid answers: candidates, bounds computed, and seconds, against a loop over a sample of the points.

python -m benchmarks.enumerate_speed [--sample 300]
"""

from __future__ import annotations

import argparse
import random
import time

from benchmarks.common import heading
from minitron_cli.checkpoint.surgery import new_config
from minitron_cli.errors import InputError
from minitron_cli.search.budget import Budget
from minitron_cli.search.enumerate import enumerate_candidates
from minitron_cli.search.grid import read_grid
from minitron_cli.search.space import Space
from minitron_cli.shape import Shape

NEMOTRON_4_15B = {
    "model_type": "nemotron", "num_hidden_layers": 32, "hidden_size": 6144, "num_attention_heads": 48,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 24576, "vocab_size": 256000,
    "tie_word_embeddings": False,
}  # fmt: skip
GRID = ("layers=17..32", "heads=8..48/8", "ffn=256..24576/256", "hidden=2048..6144/32")
WINDOWS = (("8B +-0.01 %", 7_999_000_000, 8_001_000_000), ("8B +-0.1 %", 7_992_000_000, 8_008_000_000),
           ("0.5B: nobody", 499_000_000, 501_000_000))  # fmt: skip


def loop_seconds(space: Space, sample: int) -> float:
    """Seconds per point of counting tensor by tensor, which every reported candidate goes through once."""
    generator = random.Random(0)
    targets = [
        {axis: int(generator.choice(values.entries)) for axis, values in space.grid.items()} for _ in range(sample)
    ]
    began = time.perf_counter()
    for target in targets:
        sizes = space.sizes_at(target)
        if sizes is not None:
            _ = Shape.of(new_config(space.shape.config, space.shape.family, sizes, list(range(sizes["layers"])))).params
    return (time.perf_counter() - began) / sample


def main() -> None:
    """Print one line per window."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sample", type=int, default=300)
    options = parser.parse_args()
    shape = Shape.of(NEMOTRON_4_15B)
    space = Space(shape, read_grid(GRID, shape, {}))
    heading(f"Enumeration: {len(space):,} points on a {shape['layers']}-layer model")
    print(f"{'window':<16}{'candidates':>12}{'seconds':>10}")
    for name, low, high in WINDOWS:
        budget = Budget("--params-range", "total parameters", low, high, space.costs.params, lambda each: each.params)
        began = time.perf_counter()
        try:
            count = len(enumerate_candidates(space, [budget]))
        except InputError:
            count = 0
        print(f"{name:<16}{count:>12,}{time.perf_counter() - began:>10.2f}")
    per_point = loop_seconds(space, options.sample)
    print(
        f"\na loop over all points: {per_point * len(space):,.0f} s "
        f"({per_point * 1e3:.2f} ms each, {options.sample} timed)"
    )


if __name__ == "__main__":
    main()

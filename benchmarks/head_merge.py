"""The paper's merge of query heads (arXiv 2407.14679, section 2.5): each weak head that stays takes in one that leaves.

Of L heads of a KV group, by falling importance, K stay; head i becomes q_i + sign * (q_i - q_j), j = 2K - i + 1, for
i from 2K - L + 1 to K. (The paper prints 2K - L as the lower end, whose partner L + 1 does not exist.) The printed sign
is +1; -1 replaces the query by that of the head that left, as layer collapse does with layers. Measured by
`benchmarks.zero_shot`; not an option of `prune`, as it earns none.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

from minitron_cli.checkpoint.reader import Checkpoint

NAME = "model.layers.{}.self_attn.q_proj.weight"


def partners(scores: npt.NDArray[np.float64], kept: int) -> dict[int, int]:
    """Heads that stay and take another in, and which; `scores` are those of one group's heads.

    Raises:
        ValueError: more heads leave than stay, so that some would have no partner.
    """
    if len(scores) > 2 * kept:
        raise ValueError(f"{len(scores)} heads cannot be merged into {kept}")
    order = np.argsort(-scores, kind="stable").tolist()
    return {order[i - 1]: order[2 * kept - i] for i in range(2 * kept - len(scores) + 1, kept + 1)}


def merge_heads(original: Path, pruned: Path, scores: npt.NDArray[np.float64], sign: float) -> None:
    """Rewrite the query projections of a model that lost heads, and nothing else.

    Args:
        scores: of query heads, (layers, KV heads, heads of a group), by which the pruned ones were chosen.
    """
    before, weights = load_file(original / "model.safetensors"), load_file(pruned / "model.safetensors")
    old, new = Checkpoint(original).shape, Checkpoint(pruned).shape
    channels, group, kept = old["head_dim"], old["group"], new["group"]
    for layer in range(old["layers"]):
        queries = before[NAME.format(layer)].view(old["kv_heads"], group, channels, -1)
        result = weights[NAME.format(layer)].view(old["kv_heads"], kept, channels, -1)
        for number in range(old["kv_heads"]):
            of_group = scores[layer, number]
            stay = sorted(np.argsort(-of_group, kind="stable")[:kept].tolist())
            assert torch.equal(result[number], queries[number, stay]), "chosen by other scores"
            for own, other in partners(of_group, kept).items():
                taken = queries[number, own] - queries[number, other]
                result[number, stay.index(own)] = queries[number, own] + sign * taken
    save_file(weights, pruned / "model.safetensors", {"format": "pt"})

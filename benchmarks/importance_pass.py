"""The calibration sweep (all width scores and block importance) against a plain forward over the same sequences.

python -m benchmarks.importance_pass
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from minitron_cli.runtime.threads import yield_while_waiting

yield_while_waiting()

import torch  # noqa: E402

from benchmarks.common import heading, interleaved  # noqa: E402
from minitron_cli.checkpoint.hub import resolve  # noqa: E402
from minitron_cli.checkpoint.reader import Checkpoint  # noqa: E402
from minitron_cli.config.data import DataConfig  # noqa: E402
from minitron_cli.config.importance import ImportanceConfig  # noqa: E402
from minitron_cli.data.prepare import run_data  # noqa: E402
from minitron_cli.importance.collect import ResidentSweep  # noqa: E402
from minitron_cli.importance.gather import Gathered  # noqa: E402
from minitron_cli.models.streaming import ResidentModel  # noqa: E402
from minitron_cli.runtime.progress import set_quiet  # noqa: E402
from minitron_cli.tokens import TokenDataset  # noqa: E402

SAMPLES, BATCH = 64, 8


def main() -> None:
    """Print seconds and the ratio."""
    heading(f"Scoring {SAMPLES} sequences of 256 tokens, in batches of {BATCH}")
    set_quiet(True)
    with TemporaryDirectory() as directory:
        data = Path(directory) / "data"
        sources = {"sources": ("python-stdlib",), "tokenizer": "builtin:tiny-py"}
        run_data(DataConfig(**sources, seq_len=256, max_tokens=SAMPLES * 256, out=data))
        checkpoint = Checkpoint(resolve("builtin:tiny-py"))
        model = ResidentModel(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
        split = TokenDataset(data).split("train")
        config = ImportanceConfig(
            checkpoint="builtin:tiny-py", data=data, out=Path(directory) / "out", samples=SAMPLES, batch_size=BATCH
        )

        def plain() -> None:
            with torch.inference_mode():
                for start in range(0, SAMPLES, BATCH):
                    rows = range(start, start + BATCH)
                    model.model(torch.from_numpy(split.rows(rows)), use_cache=False)

        def scored() -> None:
            state = Path(directory) / "state"
            state.unlink(missing_ok=True)
            ResidentSweep(model, Gathered(model, config), config, split, list(range(SAMPLES)), state).run()

        medians = interleaved({"plain forward": plain, "scored sweep": scored})
    for name, seconds in medians.items():
        rate, ratio = SAMPLES * 256 / seconds, seconds / medians["plain forward"]
        print(f"{name:<16}{seconds:8.2f} s{rate:12,.0f} tokens/s{ratio:8.2f} x plain")


if __name__ == "__main__":
    main()

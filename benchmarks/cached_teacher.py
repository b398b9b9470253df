"""A cached teacher against a live one: validation loss by k, bytes per token, and tokens per second.

python -m benchmarks.cached_teacher [--work DIR] [--steps 240] [--seeds 1] [--rounds 9] [--only losses|speeds]

The default of `--top-k` is the smallest k whose validation loss is within 0.01 nats of full logits here.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

from minitron_cli.runtime.threads import yield_while_waiting

yield_while_waiting()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.common import heading, interleaved  # noqa: E402
from minitron_cli.checkpoint.hub import resolve  # noqa: E402
from minitron_cli.config.distill import DistillConfig  # noqa: E402
from minitron_cli.config.recipe import load_recipe  # noqa: E402
from minitron_cli.distill.cache import STAGE, Content, Record, TeacherCache  # noqa: E402
from minitron_cli.distill.cache_fit import first_visits  # noqa: E402
from minitron_cli.distill.cache_reader import CachedTeacher  # noqa: E402
from minitron_cli.distill.cache_writer import write_cache  # noqa: E402
from minitron_cli.distill.losses import forward_kl, top_k, top_k_kl  # noqa: E402
from minitron_cli.distill.stage import run_distill  # noqa: E402
from minitron_cli.distill.trainer import Batch, Teacher, Trainer  # noqa: E402
from minitron_cli.manifest import StageOutput  # noqa: E402
from minitron_cli.models.load import load_model, new_model, own_memory  # noqa: E402
from minitron_cli.runtime.progress import set_quiet  # noqa: E402
from minitron_cli.stages import Chain  # noqa: E402
from minitron_cli.tokens import TokenDataset, batch_rows, read_rows  # noqa: E402

WORDS = (24, 64, 128)
TOLERANCE = 0.01
LARGER = {
    "model_type": "llama", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": True, "max_position_embeddings": 1024,
}  # fmt: skip
LAYERS = (13, 6)
"""Of the larger random teacher, and of its student: 1.96 times as many parameters."""


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, help="keep data, student and caches here, and reuse them")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=["losses", "speeds"], help="one of both tables")
    options = parser.parse_args()
    heading("A cached teacher against a live one")
    set_quiet(True)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        chain = quickstart(work)
        if options.only != "speeds":
            losses(chain, work, options.steps, options.seeds)
            storing(chain)
        if options.only != "losses":
            speeds(chain, work, options.rounds)


def quickstart(work: Path) -> dict[str, Any]:
    """Data and pruned student of the quickstart, and its options of `distill`."""
    recipe = load_recipe("quickstart", ("distill=null", "baselines=[]", "eval=null"))
    Chain(recipe, work / "quickstart", force=False).run()
    section = dict(load_recipe("quickstart").distill or {})
    paths = {
        "student": str(work / "quickstart" / "pruned"),
        "teacher": recipe.teacher,
        "data": work / "quickstart" / "data",
    }
    return {**section, **paths}


def losses(chain: dict[str, Any], work: Path, steps: int, seeds: int) -> None:
    """Validation loss after the same steps on the same batches."""
    names = [*map(str, WORDS), "full"]
    found: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(seeds):
        for name in names:
            cache = work / f"cache-{seed}-{name}-{steps}"
            extra = {} if name == "full" else {"cache_teacher": cache, "top_k": int(name)}
            out = work / f"student-{seed}-{name}-{steps}"
            result = run_distill(DistillConfig(**{**chain, **extra, "steps": steps, "seed": seed, "out": out}))
            assert result.val_loss_after is not None
            found[name].append(result.val_loss_after)
    full = np.mean(found["full"])
    print(f"builtin:tiny-py (2,048 words) to the quickstart's student, {steps} steps, {seeds} seed(s)")
    print(f"{'k':>6}{'bytes/token':>13}{'at 18 bits':>12}{'val loss':>11}{'- full':>9}")
    for name in names:
        sizes = ("-", "-") if name == "full" else (Record(2048, int(name)).nbytes, Record(1 << 18, int(name)).nbytes)
        mean = np.mean(found[name])
        print(f"{name:>6}{sizes[0]:>13}{sizes[1]:>12}{mean:>11.4f}{mean - full:>+9.4f}")
    enough = [name for name in names if np.mean(found[name]) - full <= TOLERANCE]
    print(f"smallest k within {TOLERANCE} nats: {enough[0]}")
    print("With 2,048 words, k words are a larger share of the vocabulary than in most models.\n")


def storing(chain: dict[str, Any]) -> None:
    """What cutting at k words leaves out of the KL to the untrained student, and what 16-bit storage adds."""
    device = torch.device("cpu")
    split = TokenDataset(chain["data"]).split("train")
    batch = Batch.read(read_rows(split, range(8)), device)
    logs = []
    for path in (resolve(chain["teacher"]), Path(chain["student"])):
        lesson = Teacher(load_model(path, device=device, dtype=torch.float32)).lesson(batch)
        with torch.no_grad():
            logs.append(lesson.head(lesson.hidden).double().log_softmax(-1))
    log_p, log_q = logs
    whole = forward_kl(log_q, log_p)[0].mean().item()
    print(f"KL to the pruned student before training, nats per token: {whole:.4f} over all words")
    print(f"{'k':>6}{'mass of k':>11}{'KL of k words':>15}{'cut away':>11}{'storing adds':>14}{'KL(P, stored P)':>17}")
    for k in WORDS:
        top = top_k(log_p, k)
        read = Record(log_p.shape[-1], k)
        found = read.decode(read.encode(top))
        exact = torch.cat([top.log_probs, top.log_tail[:, None]], -1)
        stored = torch.cat([found.log_probs, found.log_tail[:, None]], -1).double().log_softmax(-1)
        known = type(top)(found.ids, stored[:, :-1], stored[:, -1], found.vocab)
        cut, as_read = top_k_kl(log_q, top)[0].mean().item(), top_k_kl(log_q, known)[0].mean().item()
        off = (exact.exp() * (exact - stored)).sum(-1).mean().item()
        mass = top.log_probs.exp().sum(-1).mean().item()
        print(f"{k:>6}{mass:>11.4f}{cut:>15.4f}{whole - cut:>11.4f}{as_read - cut:>+14.1e}{off:>17.1e}")
    print()


def speeds(chain: dict[str, Any], work: Path, rounds: int) -> None:
    """Tokens per second of whole optimizer steps, live and cached, in turns."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(f"{'teacher and student':<40}{'params':>15}{'live':>11}{'cached':>11} tokens/s{'faster':>9}")
    teacher = load_model(resolve(chain["teacher"]), device=device, dtype=dtype)
    student = load_model(chain["student"], device=device, dtype=torch.float32)
    compare("quickstart, 8 x 256 tokens", teacher, student, 256, 8, chain, work, dtype, rounds)
    teacher, student = (_random(layers, device) for layers in LAYERS)
    name = f"random Llama, {LAYERS[0]} and {LAYERS[1]} layers, 4 x 256"
    compare(name, teacher.to(dtype), student, 256, 4, chain, work, dtype, rounds)


def compare(
    name: str, teacher: Any, student: Any, seq_len: int, batch_size: int, chain: dict[str, Any], work: Path,
    dtype: torch.dtype, rounds: int,
) -> None:  # fmt: skip
    """One line of the table; cached records are made here, of the same sequences."""
    device = next(student.parameters()).device
    split = TokenDataset(chain["data"]).split("train")
    steps = rounds + 1
    visits = np.concatenate([batch_rows(0, step, batch_size, len(split)) for step in range(steps)], dtype=np.int64)
    live = Teacher(teacher.eval())
    vocab = int(student.config.vocab_size)
    k = WORDS[0]
    content = Content(vocab=vocab, top_k=k, temperature=1.0, dtype=str(dtype).removeprefix("torch."))
    with tempfile.TemporaryDirectory(dir=work) as place:
        output = StageOutput(Path(place) / "cache", STAGE, content, {"teacher": "", "data": "", "sequences": ""})
        write_cache(output, content, live, split, first_visits(visits), device)
        cached = CachedTeacher(TeacherCache(Path(place) / "cache"), visits, device)
        trainers = {
            loss: Trainer(_copy(student), DistillConfig(
                student="s", teacher="t", data=Path("d"), out=Path("o"), steps=10_000, lr=1e-6, loss=loss,
            ), 10_000, dtype)
            for loss in ("kl", f"topk:{k}")
        }  # fmt: skip
        taken = {"kl": 0, f"topk:{k}": 0}

        def step(loss: str, source: Teacher | CachedTeacher) -> None:
            number, taken[loss] = taken[loss], taken[loss] + 1
            rows = visits[number * batch_size : (number + 1) * batch_size].tolist()
            batch = Batch.read(read_rows(split, rows), device)
            trainers[loss].update([batch], [source.lesson(batch)], number)
            if device.type == "cuda":
                torch.cuda.synchronize()

        medians = interleaved(
            {"live": lambda: step("kl", live), "cached": lambda: step(f"topk:{k}", cached)}, rounds=rounds
        )
        cached.close()
    tokens = batch_size * seq_len
    sizes = "/".join(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M" for model in (teacher, student))
    rates = {which: tokens / seconds for which, seconds in medians.items()}
    ratio = rates["cached"] / rates["live"]
    print(f"{name:<40}{sizes:>15}{rates['live']:>11,.0f}{rates['cached']:>11,.0f}         {ratio:>8.2f} x")


def _random(layers: int, device: torch.device) -> Any:
    model = new_model({**LARGER, "num_hidden_layers": layers}, seed=layers, dtype=torch.float32)
    own_memory(model)
    return model.to(device)


def _copy(model: Any) -> Any:
    return copy.deepcopy(model)


if __name__ == "__main__":
    main()

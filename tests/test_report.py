"""The report page, from a run directory as the chain leaves it, made of small JSON files and made-up scores."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from minitron_cli.config.report import ReportConfig
from minitron_cli.drawing import svg
from minitron_cli.drawing.format import NONE, count, fixed, scaled, signed
from minitron_cli.errors import InputError, OutputError
from minitron_cli.report import charts
from minitron_cli.report.gather import Curve
from minitron_cli.report.network import network
from minitron_cli.report.stage import run_report, write_report

TEACHER = {"layers": 6, "hidden": 128, "ffn": 384, "heads": 4, "kv_heads": 2, "head_dim": 32, "vocab": 2048}
CHOSEN = {**TEACHER, "layers": 5, "hidden": 112, "ffn": 256}
LOSSES = {"teacher": 2.031, "pruned": 4.4446, "student": 2.302, "cross-entropy": 2.348, "scratch": 3.4127}
LABELS = {
    "teacher": "teacher",
    "pruned": "pruned",
    "student": "distilled",
    "cross-entropy": "cross-entropy",
    "scratch": "from scratch",
}
STEPS, PER_STEP = 200, 4096
SEARCHED = (
    (6, 128, 128),
    (6, 112, 176),
    (6, 96, 240),
    (5, 128, 192),
    (5, 112, 256),
    (5, 96, 320),
    (6, 104, 208),
    (5, 120, 208),
)


def params(shape: dict[str, int], embedding: bool = True) -> int:
    """Parameters of a Llama with tied embeddings."""
    s = shape
    attention = 2 * s["hidden"] * s["head_dim"] * (s["heads"] + s["kv_heads"])
    layer = attention + 3 * s["hidden"] * s["ffn"] + 2 * s["hidden"]
    return s["layers"] * layer + s["hidden"] + embedding * s["vocab"] * s["hidden"]


def label(shape: dict[str, int]) -> str:
    return f"{shape['layers']}L-{shape['hidden']}h-{shape['ffn']}f-4/2x32"


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), "utf-8")


def manifest(run: Path, name: str, stage: str, config: dict[str, Any], result: dict[str, Any], seconds: float) -> None:
    """What a stage leaves beside its results."""
    versions = {
        "python": "3.11.7",
        "torch": "2.13.0+cpu",
        "transformers": "5.23.0",
        "tokenizers": "0.23.3",
        "safetensors": "0.8.0",
    }
    key = hashlib.sha256(name.encode()).hexdigest()
    write(run / name / "minitron.json", {
        "stage": stage, "key": key, "minitron": "0.1.0", "versions": versions, "config": config,
        "inputs": {"checkpoint": hashlib.sha256(b"teacher").hexdigest()}, "started": "2026-03-14T09:26:53+0000",
        "seconds": seconds, "result": {"out": str(run / name), **result},
    })  # fmt: skip


def make_run(
    run: Path,
    *,
    teacher: str = "builtin:tiny-py",
    tasks: bool = False,
    bench: bool = False,
    aligned: bool = False,
    big: tuple[int, int, int] | None = None,
    steps: int = STEPS,
) -> Path:
    """A whole run; `big` gives (layers, ffn, heads) to the scores in place of the small teacher's."""
    recipe = {
        "name": "quickstart", "teacher": teacher,
        "description": "The teacher that comes with the installation, cut to half and distilled on source code.",
        "data": {"sources": ["python-stdlib"], "seq_len": 256, "max_tokens": 1000000},
        "importance": {"samples": 128, "loss_samples": 16},
        "search": {"params_range": "45%:50%", "count": "non-embedding", "candidates": 8, "finalists": 2, "steps": 12},
        "prune": None, "distill": {"steps": steps, "batch_size": 16, "lr": 0.002, "min_lr": 0.05},
        "baselines": ["cross-entropy", "scratch"], "eval": {"batch_size": 16},
    }  # fmt: skip
    write(run / "recipe.json", recipe)
    splits = {"train": {"sequences": 3906, "tokens": 999936}, "validation": {"sequences": 239, "tokens": 61184}}
    manifest(run, "data", "data", {"seq_len": 256}, {"tokens": 1061120, "splits": splits}, 6.4)
    _importance(run, big)
    _search(run)
    implied = {"group": 2, "v_head_dim": 32}
    plan = {
        "family": "llama",
        "sizes_before": {**TEACHER, **implied},
        "sizes": {**CHOSEN, **implied},
        "layers": [0, 1, 3, 4, 5],
        "keep": {},
        "rotary_step": 1,
        "ranked_by": f"importance {run}/importance",
        "params_before": params(TEACHER),
        "params_after": params(CHOSEN),
    }
    write(run / "pruned" / "plan.json", plan)
    cut = {"params_before": params(TEACHER), "params_after": params(CHOSEN), "shape": CHOSEN}
    manifest(run, "pruned", "prune", {}, cut, 0.31)
    models = [_model(run, name, teacher, tasks, steps) for name in LOSSES]
    if bench:
        _bench(run)
    if aligned:
        make_aligned(run / "aligned")
    stages = [
        {"name": name, "status": "done", "seconds": 8.0}
        for name in (
            "data",
            "importance",
            "search",
            "pruned",
            "student",
            "cross-entropy",
            "scratch",
            *(f"eval/{name}" for name in LOSSES),
        )
    ]
    write(run / "run.json", {
        "out": str(run), "name": "quickstart", "description": recipe["description"], "stages": stages, "models": models,
        "teacher": teacher, "student": str(run / "student"), "seconds": 912.4, "report": str(run / "report.html"),
    })  # fmt: skip
    return run


def make_aligned(out: Path) -> Path:
    """What `align` writes, but for the weights."""
    course = [
        {
            "step": step,
            "reward": 0.8 + 0.3 * kl,
            "reward_error": 0.01,
            "kl": kl,
            "kl_error": 0.02,
            "win_rate": 0.5 + kl / 5,
        }
        for step, kl in ((0, 0.0), (50, 0.5), (100, 1.1))
    ]
    rivals = [
        {
            "n": n,
            "reward": reward,
            "reward_error": 0.012,
            "kl": kl,
            "difference": 1.13 - reward,
            "difference_error": 0.02,
        }
        for n, reward, kl in ((1, 0.8, 0.0), (2, 0.95, 0.193), (4, 1.1, 0.636), (8, 1.2, 1.204))
    ]
    result = {
        "out": str(out), "method": "bond", "steps": 100, "reward_before": 0.8, "reward_after": 1.13, "kl": 1.1,
        "stopped": "kl budget",
    }  # fmt: skip
    manifest(out.parent, out.name, "align", {"reward": "words:a,<b>"}, result, 60.0)
    write(out / "curve.json", {"measurements": course, "steps": [], "best_of": rivals})
    sample = {"prompt": "def <f>", "before": "(x)", "reward_before": 0.1, "after": "(self)", "reward_after": 1.0}
    (out / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    return out


def _model(run: Path, name: str, teacher: str, tasks: bool, steps: int) -> dict[str, Any]:
    shape, loss = TEACHER if name == "teacher" else CHOSEN, LOSSES[name]
    metrics: dict[str, Any] = {}
    groups: dict[str, list[str]] = {}
    if tasks:
        score = 0.25 + 0.2 / loss
        metrics = {
            "mmlu": {"acc": score, "acc_stderr": 0.012, "samples": 1420},
            "mmlu_stem": {"acc": score - 0.03, "acc_stderr": 0.021, "samples": 420},
            "hellaswag": {
                "acc": score,
                "acc_stderr": 0.02,
                "acc_norm": score + 0.05,
                "acc_norm_stderr": 0.02,
                "samples": 500,
            },
        }
        groups = {"mmlu": ["mmlu_stem"]}
    measured = {
        "tasks": metrics,
        "groups": groups,
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / 2.904 / math.log(2),
    }
    write(run / "eval" / name / "results.json", {**measured, "tokens": 60945})
    manifest(run, f"eval/{name}", "eval", {"data_split": "validation"}, {**measured, "tokens": 60945}, 7.9)
    tokens = steps * PER_STEP if name not in ("teacher", "pruned") else 0
    if tokens:
        _training(run, name, steps, loss)
    path = teacher if name == "teacher" else str(run / name)
    del measured["groups"]
    return {
        "name": name, "label": LABELS[name], "path": path, "shape": shape, "params": params(shape),
        "params_non_embedding": params(shape, False), "tokens": tokens, "train_seconds": 301.0, **measured,
    }  # fmt: skip


def _bench(run: Path) -> None:
    def side(scale: float, batch: int) -> dict[str, Any]:
        tokens = 0.004 * scale * batch**0.5
        return {
            "prefill_tokens_per_second": 9000 / scale, "decode_tokens_per_second": batch / tokens,
            "time_to_first_token": 0.05 * scale * batch, "token_p50": tokens, "token_p90": 1.2 * tokens,
            "token_p99": 1.9 * tokens, "peak_bytes": int(6e6 * scale * batch), "kv_bytes": int(8e5 * scale * batch),
        }  # fmt: skip

    ratio = {"prefill": 1.7, "decode": 1.7, "time_to_first_token": 0.59, "peak_bytes": 0.59, "kv_bytes": 0.59}
    cases = [
        {
            "batch_size": batch,
            "context": 512,
            "checkpoint": side(1.0, batch),
            "against": side(1.7, batch),
            "ratio": ratio,
        }
        for batch in (1, 8)
    ]
    models = [{"params": n, "shape": "", "weight_bytes": 4 * n, "kv_bytes_per_token": 3072} for n in (875728, 1443456)]
    result = {
        "checkpoint": str(run / "student"), "against": "builtin:tiny-py", "device": "cpu", "dtype": "float32",
        "threads": 1, "rounds": 3, "ratio": ratio, "models": models, "cases": cases,
    }  # fmt: skip
    manifest(run, "bench", "bench", {}, result, 21.0)


def _training(run: Path, name: str, steps: int, final: float) -> None:
    start = {"student": LOSSES["pruned"], "cross-entropy": LOSSES["pruned"], "scratch": math.log(2048)}[name]
    kind, random = ("kl" if name == "student" else "ce"), np.random.default_rng(len(name))
    share = np.arange(steps) / max(steps - 1, 1)
    course = final + (start - final) * np.exp(-9 * share ** (0.55 if name == "scratch" else 0.8))
    loss = np.maximum(course - (1.95 if kind == "kl" else 0.0), 0.01) * random.normal(1, 0.035, steps)
    every = max(1, steps // 8)
    validation = [[step, float(course[min(step, steps - 1)])] for step in range(0, steps, every)] + [
        [steps, final + 0.004]
    ]
    write(run / name / "curve.json", {"loss": loss.tolist(), "validation": validation, "tokens_per_step": PER_STEP})
    config = {"loss": kind, "init": "random" if name == "scratch" else "student", "eval_sequences": 64, "steps": steps}
    result = {
        "steps": steps,
        "tokens": steps * PER_STEP,
        "loss": kind,
        "val_loss_after": final + 0.004,
        "seconds": 301.0,
    }
    manifest(run, name, "distill", config, result, 301.2)


def _search(run: Path) -> None:
    rows = []
    for layers, hidden, ffn in SEARCHED:
        shape = {**TEACHER, "layers": layers, "hidden": hidden, "ffn": ffn}
        zero = 5.9 - 0.009 * hidden - 0.0016 * ffn + 0.12 * (6 - layers)
        rows.append({
            "name": label(shape), "shape": shape, "params": params(shape), "params_non_embedding": params(shape, False),
            "loss_zero_shot": 4.4446 if shape == CHOSEN else zero, "loss_retrained": None, "rank": None,
        })  # fmt: skip
    rows.sort(key=lambda row: (row["shape"] != CHOSEN, row["loss_zero_shot"]))
    rows[0]["loss_retrained"], rows[1]["loss_retrained"] = 3.2214, 3.3075
    found = {
        "out": str(run / "search"),
        "feasible": 34,
        "candidates": [{**row, "rank": n} for n, row in enumerate(rows, 1)],
        "seconds": 61.0,
    }
    write(run / "search" / "search.json", {**found, "chosen": {**rows[0], "rank": 1}})
    manifest(run, "search", "search", {"count": "non-embedding"}, {}, 61.2)


def _importance(run: Path, big: tuple[int, int, int] | None) -> None:
    layers, ffn, heads = big or (6, 384, 4)
    random = np.random.default_rng(0)
    blocks = np.concatenate([[1.009, 0.184, 0.0618, 0.0918, 0.1087, 0.1411], random.uniform(0.02, 0.1, layers)])[
        :layers
    ]
    losses = np.concatenate([[6.232, 1.449, 0.356, 0.405, 0.443, 0.642], random.uniform(0.01, 0.1, layers)])[:layers]
    scores = {
        "layers.bi": blocks, "layers.loss": losses, "hidden": random.gamma(9, 9, 128),
        "ffn": random.lognormal(1, 0.55 + 0.03 * np.arange(layers)[:, None] % 1.5, (layers, ffn)),
        "kv_heads": random.gamma(4, 8, (layers, heads // 2)), "group": random.gamma(3, 8, (layers, heads // 2, 2)),
    }  # fmt: skip
    (run / "importance").mkdir(parents=True, exist_ok=True)
    save_file(scores, run / "importance" / "scores.safetensors")
    manifest(run, "importance", "importance", {"samples": 128}, {"samples": 128, "tokens": 32768}, 10.2)


VOID = {"meta", "link", "br", "hr", "img", "input"}
SECTIONS = ["answer", "tasks", "speed", "training", "cuts", "search", "importance", "provenance"]
WITHOUT_MEASUREMENTS = [name for name in SECTIONS if name not in ("tasks", "speed")]


class Reader(HTMLParser):
    """Checks that tags are balanced and collects what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join("".join(self.words).split())
        self.ids = [value for _, name, value in self.attributes if name == "id"]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            self.scripts.append(data)
        if {"style", "script"} & set(self.open) or "title" in self.open[-1:]:
            return
        self.words.append(data)
        if "tr" in self.open and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def page(run: Path) -> Reader:
    """The page of a run, checked for what must hold for every page."""
    path = write_report(run)
    assert path == run / "report.html" and path.stat().st_size < 500_000
    text = path.read_text("utf-8")
    assert not re.search(r"\b(nan|inf|None)\b", text)
    reader = Reader(text)
    assert len(set(reader.ids)) == len(reader.ids)
    for _, name, value in reader.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "href") or (value.startswith("#") and value[1:] in reader.ids)
    assert "http://" not in text and "https://" not in text and "@import" not in text and "url(" not in text
    assert reader.scripts == [(files("minitron_cli.report") / "copy.js").read_text("utf-8")]
    hashed = base64.b64encode(hashlib.sha256(reader.scripts[0].encode()).digest()).decode()
    policy = next(
        value for _, name, value in reader.attributes if name == "content" and value.startswith("default-src")
    )
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{hashed}'"
    drawings = [name for tag, name, _ in reader.attributes if tag == "svg" and name in ("role", "aria-label")]
    assert drawings.count("role") == drawings.count("aria-label")
    return reader


def test_the_answer_comes_first(tmp_path: Path) -> None:
    reader = page(make_run(tmp_path / "run"))
    assert [name for name in reader.ids if name in SECTIONS] == WITHOUT_MEASUREMENTS
    assert (
        "builtin:tiny-py (1,443,456 params) → student (875,728 params, 54.7 % non-embedding)"
        ": validation loss 2.031 → 2.302 (+0.271 nats)." in reader.text
    )
    assert "recovered 89 % of the 2.414 nats that pruning cost" in reader.text
    assert "0.046 nats below retraining with cross-entropy on the same tokens" in reader.text
    table = reader.rows[:6]
    assert table[0][:3] == ["model", "params", "non-embedding"]
    assert table[1] == ["teacher", "1,443,456", "100.0 %", NONE, "2.031", NONE, "7.62", "1.009"]
    assert table[3] == ["distilled", "875,728", "54.7 %", "819,200", "2.302", "+0.271", "9.99", "1.144"]
    assert [row[0] for row in table[1:]] == list(LABELS.values())


def test_every_section_has_its_numbers(tmp_path: Path) -> None:
    reader = page(make_run(tmp_path / "run"))
    assert ["FFN neurons", "384", "256", "66.7 %", ""] in reader.rows
    assert ["non-embedding parameters", "1,181,312", "646,352", "54.7 %", ""] in reader.rows
    assert "Removed: layer 2. Units were ranked by importance." in reader.text
    assert ["1", "5L-112h-256f-4/2x32chosen", "5", "112", "256", "875,728", "646,352", "4.445", "3.221"] in reader.rows
    assert "34 shapes fit the budget; 8 were measured without training, the best 2 of these" in reader.text
    assert "Begin above the chart: distilled 4.445, cross-entropy 4.445, from scratch 7.625." in reader.text
    assert "The curves use the first 64 of 239 validation sequences" in reader.text
    assert any(row[:3] == ["search", "done", "1m01s"] for row in reader.rows)
    assert "2.13.0+cpu" in reader.text and hashlib.sha256(b"search").hexdigest() in reader.text
    assert f"minitron run {tmp_path}/run/recipe.json --out {tmp_path}/run-again" in reader.text
    labels = [value for tag, name, value in reader.attributes if tag == "svg" and name == "aria-label"]
    assert any(value.startswith("Loss increase without the layer: layer 0 6.232") for value in labels)
    assert any("at the end: distilled 2.306" in value for value in labels)


def test_task_scores(tmp_path: Path) -> None:
    reader = page(make_run(tmp_path / "run", tasks=True))
    assert reader.rows[0][-2:] == ["mmlu (acc)", "hellaswag (acc_norm)"]
    assert reader.rows[1][-2:] == ["0.348", "0.398"]
    assert ["mmlu_stem", "acc", "0.318 ± 0.021"] in [row[:3] for row in reader.rows]


def test_what_is_kept_of_tasks(tmp_path: Path) -> None:
    reader = page(make_run(tmp_path / "run", tasks=True))
    labels = [value for tag, name, value in reader.attributes if tag == "svg" and name == "aria-label"]
    told = next(value for value in labels if value.startswith("Share of the teacher's value by task: mmlu pruned"))
    teacher, student = 0.25 + 0.2 / LOSSES["teacher"], 0.25 + 0.2 / LOSSES["student"]
    assert f"distilled {100 * student / teacher:.1f} %" in told
    assert f"It keeps {100 * student / teacher:.1f} % of mmlu (acc)" in reader.text


def test_speed_and_memory(tmp_path: Path) -> None:
    reader = page(make_run(tmp_path / "run", bench=True))
    assert "generates 1.70 x as fast as the original, with 0.59 x its peak memory" in reader.text
    assert [
        "student",
        "8",
        "512",
        "9,000",
        "707",
        "400.0 ms",
        "11.3 ms",
        "13.6 ms",
        "21.5 ms",
        "48MB",
        "6.4MB",
    ] in reader.rows
    labels = [value for tag, name, value in reader.attributes if tag == "svg" and name == "aria-label"]
    assert any(value.startswith("Largest memory: student 6MB  (0.59 x) at batch 1, context 512; ") for value in labels)


def rectangles(drawing: str, kind: str) -> list[tuple[float, float]]:
    """Width and height of every rectangle of a class."""
    found = re.findall(r"<rect([^>]*)>", drawing)
    values = [dict(re.findall(r'([\w-]+)="([^"]*)"', rect)) for rect in found]
    return [(float(each["width"]), float(each["height"])) for each in values if each.get("class") == kind]


def test_the_picture_of_the_network_has_areas_of_parameters() -> None:
    before = {**TEACHER, "vocab": 2048}
    drawing = str(network(before, CHOSEN, [2], 880))
    unit = rectangles(drawing, "mlp")[0][0] / (3 * 384)
    mlp, attention = rectangles(drawing, "mlp"), rectangles(drawing, "attention")
    assert len(mlp) == len(attention) == 6 + 5
    assert mlp[0][0] / attention[0][0] == pytest.approx(3 * 384 / (2 * 32 * (4 + 2)), rel=0.01)
    assert mlp[-1] == (pytest.approx(3 * 256 * unit, rel=0.01), pytest.approx(mlp[0][1] * 112 / 128, rel=0.01))
    removed = re.findall(r"layer 2, (\w+): removed", drawing)
    assert removed == ["attention", "mlp"]
    assert (
        len(rectangles(drawing, "outline")) == 2 * 6 + 1
    )  # every block of the smaller one shrank, or left; embeddings
    assert "After: 5 layers, 112 hidden channels" in drawing and "Layers that left: 2." in drawing
    assert network({"layers": 4.0}, {"layers": 3.0}, [], 880) is None


def test_the_front_has_who_nobody_beats() -> None:
    dots = [charts.Dot(str(n), str(n), params, zero, trained, False) for n, (params, zero, trained) in enumerate(
        [(100, 4.0, 3.0), (120, 3.5, 3.2), (140, 3.6, 2.5), (90, 5.0, None)])]  # fmt: skip
    assert [dot.name for dot in charts.front(dots)] == ["0", "2"]
    untrained = [charts.Dot(dot.rank, dot.name, dot.params, dot.zero_shot, None, False) for dot in dots]
    assert [dot.name for dot in charts.front(untrained)] == ["3", "0", "1"]


def test_several_runs_side_by_side(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "one", tasks=True, bench=True), make_run(tmp_path / "two", tasks=True)]
    saved = json.loads((runs[1] / "run.json").read_text())
    models = [
        {**row, "bits_per_byte": 1.1, "loss": 2.2} if row["name"] == "student" else row for row in saved["models"]
    ]
    write(runs[1] / "run.json", {**saved, "name": "second", "models": models})
    out = Path(run_report(ReportConfig(run=tuple(runs), out=tmp_path / "both.html")).out)
    reader = Reader(out.read_text("utf-8"))
    assert "second ends lowest, with 1.100 bits per byte; the highest is 1.144." in reader.text
    assert reader.rows[1][:4] == ["quickstart", "builtin:tiny-py", "875,728", "60.7 %"]
    assert ["FFN neurons", "384 → 256", "384 → 256"] in reader.rows
    assert ["generating", "1.70 x", NONE] in reader.rows
    assert any(row[:2] == ["mmlu", "acc"] and "%" in row[2] for row in reader.rows)


def test_the_output_of_one_stage(tmp_path: Path) -> None:
    """A search by itself, an evaluation of several checkpoints, a folder of outputs made by hand."""
    run = make_run(tmp_path / "run", tasks=True)
    manifest(run, "search", "search", {"count": "non-embedding", "importance": str(run / "importance")}, {}, 61.2)
    write(run / "search" / "plan.json", json.loads((run / "pruned" / "plan.json").read_text()))
    assert [name for name in page(run / "search").ids if name in SECTIONS] == [
        "answer",
        "cuts",
        "search",
        "importance",
        "provenance",
    ]
    reader = page(run / "search")
    assert "builtin:tiny-py" not in reader.text  # nothing in these files names the checkpoint
    assert "5L-112h-256f-4/2x32 (875,728 params, 60.7 % of all)." in reader.text
    assert "Chosen of 34 shapes within the budget; loss right after the cut 4.445 nats per token, 3.221" in reader.text
    scores = [
        {"blimp": {"acc": value, "acc_stderr": 0.01, "samples": 9}, "blimp_x": {"acc": value}}
        for value in (0.6, 0.7, 0.8)
    ]
    rows = [
        {"checkpoint": f"/far/{name}", "tasks": tasks}
        for name, tasks in zip(("small", "cut", "whole"), scores, strict=True)
    ]
    rows = [{**row, "params": 1000 * n, "loss": 2.0, "tokens": 987_654} for n, row in enumerate(rows, 1)]
    result = {
        **rows[0],
        "against": [rows[2], rows[1]],
        "groups": {"blimp": ["blimp_x"]},
        "notes": {"blimp": "half of it"},
    }
    manifest(tmp_path, "compared", "eval", {}, result, 3.0)
    reader = page(tmp_path / "compared")
    assert ["blimp", "acc", "0.800 ± 0.010", "0.700 ± 0.010", "0.600 ± 0.010"] in reader.rows
    assert ["small", "1,000", NONE, NONE, "2.000", "0.000"] in [row[:6] for row in reader.rows]
    assert "987,654" not in reader.text  # what an evaluation predicted is not what a model was trained on
    assert "It keeps 75.0 % of blimp (acc)." in reader.text and "blimp: half of it." in reader.text
    (run / "run.json").unlink()
    assert [name for name in page(run).ids if name in SECTIONS] == [name for name in SECTIONS if name != "speed"]


def test_commands_and_licences(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "LICENSE").write_text("\nMIT License\n\nCopyright\n")
    sources = ["python-stdlib", f"{tmp_path}/corpus@0.5", "owner/set"]
    config = {"sources": sources, "tokenizer": "builtin:tiny-py", "seq_len": 256, "out": str(run / "data")}
    manifest(run, "data", "data", config, {"tokens": 5}, 6.4)
    reader = page(run)
    prepared = f"data prepare python-stdlib {tmp_path}/corpus@0.5 owner/set --tokenizer builtin:tiny-py --seq-len 256"
    assert f"minitron {prepared} --out {run}/data" in reader.text
    assert ["text", f"{tmp_path}/corpus", "MIT License (LICENSE)"] in reader.rows
    assert ["text", "owner/set", "see its page on the Hub"] in reader.rows
    assert ["text", "python-stdlib", "Python Software Foundation License"] in reader.rows


def test_a_large_model_stays_small(tmp_path: Path) -> None:
    page(make_run(tmp_path / "run", tasks=True, big=(96, 8192, 96), steps=30_000))


@pytest.mark.parametrize(
    ("gone", "sections"),
    [
        ("importance", ["answer", "training", "cuts", "search", "provenance"]),
        ("search", ["answer", "training", "cuts", "importance", "provenance"]),
        ("student", WITHOUT_MEASUREMENTS),
        ("eval", WITHOUT_MEASUREMENTS),
    ],
)
def test_absent_stages_are_left_out(tmp_path: Path, gone: str, sections: list[str]) -> None:
    run = make_run(tmp_path / "run")
    shutil.rmtree(run / gone)
    assert [name for name in page(run).ids if name in SECTIONS] == sections


def test_an_unfinished_run_shows_what_its_stages_tell(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for name in ("student", "cross-entropy", "scratch", "eval/student", "eval/scratch", "eval/cross-entropy"):
        shutil.rmtree(run / name)
    saved = json.loads((run / "run.json").read_text())
    write(run / "run.json", {**saved, "models": [], "stages": []})
    reader = page(run)
    assert reader.rows[2] == ["pruned", "875,728", NONE, NONE, "4.445", "+2.414", "85.17", "2.208"]
    assert "training" not in reader.ids
    assert "pruned model (875,728 params)" in reader.text


def test_a_bare_run(tmp_path: Path) -> None:
    write(tmp_path / "run" / "run.json", {"name": "bare"})
    assert "bare" in page(tmp_path / "run").text


def test_a_student_trained_without_a_teacher_is_not_called_distilled(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    manifest(run, "student", "distill", {"loss": "ce", "init": "random"}, {"loss": "ce"}, 1.0)
    reader = page(run)
    assert reader.rows[3][0] == "from scratch" and "Distillation" not in reader.text


def test_what_comes_from_files_is_escaped(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>\"'&"
    run = make_run(tmp_path / "run", teacher=bad)
    saved = json.loads((run / "run.json").read_text())
    saved |= {"name": bad, "description": bad, "stages": [{"name": bad, "status": bad}]}
    saved["models"] = [{**row, "label": bad, "path": bad, "tasks": {bad: {bad: 0.5}}} for row in saved["models"]]
    write(run / "run.json", saved)
    found = json.loads((run / "search" / "search.json").read_text())
    rows = [{**row, "name": bad, "rank": bad} for row in found["candidates"]]
    write(run / "search" / "search.json", {**found, "candidates": rows, "chosen": rows[0]})
    reader = page(run)
    assert reader.text.count(bad) > 10
    assert (run / "report.html").read_text().count("<script") == 1


def test_numbers_that_are_none(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    saved = json.loads((run / "run.json").read_text())
    saved["models"] = [{**row, "loss": math.nan, "perplexity": math.inf, "params": None} for row in saved["models"]]
    write(run / "run.json", saved)
    curve = {"loss": [3.0, math.nan, 2.0], "validation": [[0, math.nan], [3, 2.5]], "tokens_per_step": 8}
    write(run / "student" / "curve.json", curve)
    assert page(run).rows[1] == ["teacher", NONE, "100.0 %", NONE, NONE, NONE, NONE, "1.009"]


@pytest.mark.parametrize("name", ["missing", "empty", "file"])
def test_not_a_run(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"minitron run") as caught:
        run_report(ReportConfig(run=tmp_path / name))
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert not (tmp_path / name / "report.html").exists()


@pytest.mark.parametrize(
    "name", ["run.json", "student/curve.json", "importance/scores.safetensors", "search/search.json"]
)
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run")
    (run / name).write_bytes((run / name).read_bytes()[:40])
    with pytest.raises(InputError, match=name):
        write_report(run)


def test_where_the_page_goes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    result = run_report(ReportConfig(run=run, out=tmp_path / "pages" / "one.html"))
    assert result.to_json() == {"out": str(tmp_path / "pages" / "one.html")}
    first = Path(result.out).read_bytes()
    assert run_report(ReportConfig(run=run, out=tmp_path / "pages" / "one.html")) == result  # ours may be replaced
    assert Path(result.out).read_bytes() == first
    assert [item.name for item in (tmp_path / "pages").iterdir()] == ["one.html"]
    (tmp_path / "notes.html").write_text("mine")
    for out in (tmp_path / "notes.html", tmp_path / "pages"):
        with pytest.raises(OutputError, match="--out"):
            write_report(run, out)
    assert (tmp_path / "notes.html").read_text() == "mine"


def test_numbers_for_people() -> None:
    assert [count(1443456), fixed(2.0312), signed(0.2711), signed(-0.0121)] == [
        "1,443,456",
        "2.031",
        "+0.271",
        "−0.012",
    ]
    assert [signed(-0.0001), fixed(None), count(True), fixed(math.inf)] == ["0.000", NONE, NONE, NONE]
    assert [scaled(0, 2e5), scaled(2e5, 2e5), scaled(1.25e6, 2.5e5), scaled(1e6, 2.5e5)] == [
        "0",
        "200k",
        "1.25M",
        "1.00M",
    ]


@pytest.mark.parametrize(("low", "high"), [(2.031, 7.62), (0, 0.004), (-3, -1), (5.0, 5.0), (0, 0), (590_000, 656_000)])
def test_ticks_cover_the_values_in_round_steps(low: float, high: float) -> None:
    marks, step = svg.ticks(low, high, 5)
    assert marks[0] <= low <= high <= marks[-1] and 3 <= len(marks) <= 8
    assert np.allclose(np.diff(marks), step)


def test_labels_keep_apart() -> None:
    placed = svg.apart([100, 99, 98, 300], 16, 0, 300)
    assert sorted(np.diff(sorted(placed)) >= 16) == [True] * 3
    assert placed[0] > placed[1] > placed[2] and min(placed) >= 0 and max(placed) <= 300


def test_smoothing_is_a_mean_of_the_steps_around() -> None:
    losses = np.arange(200.0)
    curve = Curve("student", "distilled", "kl", losses, 10.0, [])
    tokens, means = charts.smoothed(curve)
    assert charts.window(curve) == 5 and tokens[0] == 10 and tokens[-1] == 2000
    assert means[100] == losses[98:103].mean() and means[-1] == losses[-3:].mean()
    spiky = Curve("student", "distilled", "kl", np.where(losses == 77, 1e6, 1.0).repeat(50), 10.0, [])
    assert max(value for _, value in charts.extremes(spiky)) == 1e6  # spikes survive the thinning
    assert len(charts.extremes(spiky)) <= 2 * charts.POINTS


def test_alignment(tmp_path: Path) -> None:
    """What one sample is worth, in words, against best-of-N in a table, over KL in a chart; of a run and of a stage."""
    make_run(tmp_path / "run", aligned=True)
    for place in (tmp_path / "run", tmp_path / "run" / "aligned"):
        page = write_report(place, tmp_path / "page.html").read_text("utf-8")
        assert "one sample has a mean reward of 1.130, before 0.800, at 1.10 nats of KL per sequence." in page
        assert "That is at least what the best of 4 samples had before (1.100). It stopped at its budget of KL." in page
        assert "words:a,&lt;b&gt;" in page and "To <code>def &lt;f&gt;</code>" in page
        row = re.search(r"<tr>(<td class=.number.>8</td>.*?)</tr>", page)
        assert row and re.findall(r">([^<]+)</td>", row[1]) == ["8", "1.200 ± 0.012", "1.20", "−0.070 ± 0.020"]
        label = "Mean reward against KL: BOND ends at 1.130 with 1.10 nats; best of 1 0.800 with 0.00"
        assert page.count(f'aria-label="{label}') == 2
    (tmp_path / "run" / "aligned" / "samples.jsonl").write_text("{")
    with pytest.raises(InputError, match="jsonl is damaged"):
        write_report(tmp_path / "run")

"""Model cards: what the stages recorded, in the Hub's format, without anything private."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers_chain import make_checkpoint, make_data
from huggingface_hub import ModelCard

from minitron_cli.checkpoint.card import card, evaluated, history_of
from minitron_cli.config.distill import DistillConfig
from minitron_cli.config.prune import PruneConfig
from minitron_cli.distill.stage import run_distill
from minitron_cli.manifest import fingerprint, read_manifest
from minitron_cli.prune.stage import run_prune


def metadata(text: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)---\n", text, re.DOTALL)
    assert found is not None
    values: dict[str, Any] = yaml.safe_load(found[1])
    return values


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with a licence, pruned, distilled, pruned again; the directories between are gone."""
    root = tmp_path_factory.mktemp("card")
    teacher = make_checkpoint(root / "teacher")
    data = make_data(root / "data", teacher)
    (teacher / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Teacher\n")
    (teacher / "LICENSE").write_text("terms")
    run_prune(PruneConfig(checkpoint=str(teacher), ffn=20, out=root / "pruned"))
    run_distill(
        DistillConfig(
            student=str(root / "pruned"), teacher=str(teacher), data=data, steps=2, batch_size=2,
            out=root / "student", device="cpu",
        )
    )  # fmt: skip
    shutil.rmtree(root / "pruned")
    run_prune(PruneConfig(checkpoint=str(root / "student"), ffn=12, out=root / "smaller"))
    return root


def test_the_whole_history_in_order(made: Path) -> None:
    text = (made / "smaller" / "README.md").read_text("utf-8")
    assert text.index("minitron prune teacher --ffn 20 --out DIR") < text.index("minitron distill pruned")
    assert text.index("minitron distill pruned") < text.index("minitron prune student --ffn 12 --out DIR")
    before = read_manifest(made / "student")
    assert before is not None
    assert f"{before['result']['steps']} steps, {before['result']['tokens']} tokens" in text
    assert re.search(r"\| ffn \| \d+ \| 12 \|", text)
    original = history_of(str(made / "smaller"))["base"]["params"]
    assert f"| parameters | {original:,} |" in text
    assert "**teacher**, pruned and distilled with minitron" in text


def test_metadata(made: Path) -> None:
    values = metadata((made / "smaller" / "README.md").read_text("utf-8"))
    assert values["license"] == "apache-2.0" and values["tags"] == ["minitron", "pruned", "distilled"]
    assert values["library_name"] == "transformers" and values["pipeline_tag"] == "text-generation"
    assert "base_model" not in values  # a directory is nothing the Hub could link to


def test_nothing_private(made: Path) -> None:
    for name in ("student", "smaller"):
        text = (made / name / "README.md").read_text("utf-8")
        assert str(made) not in text and "/tmp" not in text and str(Path.home()) not in text


def test_terms(made: Path) -> None:
    text = (made / "smaller" / "README.md").read_text("utf-8")
    assert "`apache-2.0`, holds for this model too. See LICENSE." in text
    history = history_of(str(made / "smaller"))
    history["base"]["licence"] = None
    assert "The terms of teacher hold" in card("x", made / "smaller", history)
    (made / "smaller" / "LICENSE").rename(made / "terms")
    assert "name no licence" in card("x", made / "smaller", history)
    (made / "terms").rename(made / "smaller" / "LICENSE")


def test_names_of_the_hub_are_linked(made: Path) -> None:
    history = history_of(str(made / "student"))
    history["base"]["name"] = "some-lab/Model-8B"
    history["steps"][-1]["data"] = {"sources": ["lab/corpus", "notes.jsonl"], "tokens": 1234}
    values = metadata(card("x", made / "student", history))
    assert values["base_model"] == "some-lab/Model-8B" and values["base_model_relation"] == "finetune"
    assert values["datasets"] == ["lab/corpus"]


def test_evaluation_and_consent(made: Path) -> None:
    whole = fingerprint(made / "student")
    measured = {
        "perplexity": 9.0,
        "bits_per_byte": 1.5,
        "tasks": {"mmlu": {"acc": 0.4, "acc_stderr": 0.1, "samples": 9}},
    }
    original = {"perplexity": 8.0, "bits_per_byte": 1.25, "tasks": {"mmlu": {"acc": 0.5}}}
    evaluated(made / "student", {**measured, "original": original})
    text = (made / "student" / "README.md").read_text("utf-8")
    assert "| mmlu, acc | 0.5000 | 0.4000 |" in text and "| perplexity | 8.0000 | 9.0000 |" in text
    assert "stderr" not in text
    found = ModelCard(text).data.eval_results  # the Hub's own reading
    assert found is not None and [(each.dataset_type, each.metric_type, each.metric_value) for each in found] == [
        ("mmlu", "acc", 0.4)
    ]
    assert fingerprint(made / "student") == whole  # what reads the checkpoint is not out of date
    history = history_of(str(made / "student"))
    history["steps"][-1]["data"] = {"sources": ["web.jsonl"]}
    audit = {"status": {"allowed": {"tokens": 70}, "disallowed": {"tokens": 30}}}
    history["steps"][-1]["result"]["consent"] = {"web.jsonl": audit}
    assert "consent audit of web.jsonl, tokens by status: allowed 70, disallowed 30" in card(
        "x", made / "student", history
    )

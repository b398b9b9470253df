"""Perplexity by windows with a stride, on raw and on prepared text; batches chosen by memory; results in the cache."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_eval import EOS, byte_tokenizer, make_checkpoint, make_data
from transformers import AutoModelForCausalLM

from minitron_cli.config.evaluate import EvalConfig
from minitron_cli.errors import ConfigError, InputError
from minitron_cli.evaluate import batches
from minitron_cli.evaluate.adapters import LanguageModel
from minitron_cli.evaluate.stage import run_eval
from minitron_cli.evaluate.windows import Window, evaluate_windows, windows
from minitron_cli.tokens import TokenDataset


def contexts(found: list[Window]) -> list[tuple[list[int], int]]:
    """Each predicted token with what the model sees before it."""
    return [
        (window.ids[:place].tolist(), int(window.ids[place]))
        for window in found
        for place in np.flatnonzero(window.targets)
    ]


@pytest.mark.parametrize("length", [2, 7, 8, 9, 30])
@pytest.mark.parametrize(("size", "stride"), [(8, 7), (8, 1), (8, 3), (3, 2), (40, 5)])
def test_windows_are_the_harness_rolling_ones(length: int, size: int, stride: int) -> None:
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    ids = np.arange(100, 100 + length)
    rolling = get_rolling_token_windows(
        ids[1:].tolist(), prefix_token=int(ids[0]), max_seq_len=size - 1, context_len=size - stride
    )
    expected = [
        (context + wanted[:place], wanted[place])
        for context, wanted in map(make_disjoint_window, rolling)
        for place in range(len(wanted))
    ]
    ours = list(windows(ids, size=size, stride=stride, bytes_per_target=1.0))
    assert contexts(ours) == expected
    assert sum(window.bytes for window in ours) == length - 1


def test_losses_are_those_of_each_token_after_its_context(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint(tmp_path / "model")).eval()
    ids = np.random.default_rng(3).integers(0, 256, 23)
    mask = np.arange(23) % 3 != 1
    found = list(windows(ids, size=8, stride=3, bytes_per_target=2.0, mask=mask))
    nats = []
    with torch.no_grad():
        for context, token in contexts(found):
            log = model(torch.tensor([context])).logits[0, -1].double().log_softmax(-1)
            nats.append(-float(log[token]))
    assert len(nats) == int(mask[1:].sum())
    measured = evaluate_windows(model, found, batch_size=3)
    assert measured.loss == pytest.approx(np.mean(nats), rel=1e-5) and measured.tokens == len(nats)
    assert measured.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / (2 * len(nats)), rel=1e-5)
    with pytest.raises(InputError, match="No token of the text is a target"):
        evaluate_windows(model, windows(ids[:1], size=8, stride=3, bytes_per_target=1.0), batch_size=3)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("windows")
    (root / "text").mkdir()
    (root / "text" / "a.md").write_text("# naïve\n\nA paragraph.\n\nAnother one, of more words.\n", "utf-8")
    (root / "text" / "b.txt").write_text("short\n", "utf-8")
    return {"root": root, "checkpoint": make_checkpoint(root / "model"), "data": make_data(root / "data")}


def config(world: dict[str, Any], **changes: Any) -> EvalConfig:
    return EvalConfig(**{"checkpoint": str(world["checkpoint"]), "device": "cpu", **changes})


def test_raw_text(world: dict[str, Any]) -> None:
    """Two files are two documents, every byte of which is predicted; one of them is longer than a window."""
    result = run_eval(
        config(world, text=(str(world["root"] / "text"),), window=16, stride=4, out=world["root"] / "raw")
    )
    texts = [(world["root"] / "text" / name).read_text("utf-8") for name in ("a.md", "b.txt")]
    tokens = [np.array([EOS, *byte_tokenizer()(text).input_ids]) for text in texts]
    model = AutoModelForCausalLM.from_pretrained(world["checkpoint"]).eval()
    each = [window for ids in tokens for window in windows(ids, size=16, stride=4, bytes_per_target=1.0)]
    expected = evaluate_windows(model, each, batch_size=2)
    assert result.tokens == sum(len(text.encode()) for text in texts) == expected.tokens
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(result.loss / math.log(2), rel=1e-9)  # one token is one byte here
    shorter = run_eval(config(world, text=(str(world["root"] / "text"),), window=16, out=world["root"] / "whole"))
    assert shorter.tokens == result.tokens and shorter.loss != result.loss


def test_prepared_text_as_one_stream(world: dict[str, Any]) -> None:
    result = run_eval(config(world, data=world["data"], stride=5, max_sequences=4, out=world["root"] / "stream"))
    ids = TokenDataset(world["data"]).split("validation").tokens.reshape(-1)
    found = list(windows(ids, size=12, stride=5, bytes_per_target=3.0))[:4]
    model = AutoModelForCausalLM.from_pretrained(world["checkpoint"]).eval()
    assert result.loss == pytest.approx(evaluate_windows(model, found, batch_size=4).loss, rel=1e-6)
    assert result.tokens == 11 + 3 * 5


def test_without_out_the_cache_keeps_it(
    world: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = run_eval(config(world, data=world["data"]))
    assert Path(first.out).parent == tmp_path / "minitron" / "eval"
    assert "--out DIR chooses another place" in capsys.readouterr().err
    again = run_eval(config(world, data=world["data"], batch_size=2))
    assert again == first and "is up to date" in capsys.readouterr().err
    other = run_eval(config(world, data=world["data"], max_sequences=2))
    assert other.out != first.out and json.loads((Path(first.out) / "results.json").read_text())["loss"] == first.loss


def test_options_that_contradict(world: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--data and --text both"):
        config(world, data=world["data"], text=("python-stdlib",))
    with pytest.raises(ConfigError, match="--stride is about perplexity"):
        config(world, tasks=("mmlu",), stride=4)
    with pytest.raises(ConfigError, match=r"--batch-size: Input should be a valid integer or 'auto' \(got 'large'\)"):
        config(world, data=world["data"], batch_size="large")
    with pytest.raises(InputError, match="does not exist"):
        run_eval(config(world, text=("./nothing.txt",), out=world["root"] / "x"))
    assert not (world["root"] / "x").exists()


def test_a_batch_takes_what_memory_has_room_for(world: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(world["checkpoint"]).eval()
    most = batches.tokens_at_once(model)
    assert most == batches.MOST_ON_CPU and batches.sequences_at_once(model, 100, "auto") == most // 100
    assert batches.sequences_at_once(model, 10**9, "auto") == 1 and batches.sequences_at_once(model, 100, 3) == 3
    each = (8 * 48 + 3 * max(model.config.intermediate_size, 4 * 48)) * 4
    monkeypatch.setattr(batches, "available_bytes", lambda device: 2 * 70 * each)
    assert batches.tokens_at_once(model) == 70


def test_a_batch_that_does_not_fit_is_halved(world: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(world["checkpoint"]).eval()
    requests = [(("", ""), [EOS, 60 + number], [97, 98]) for number in range(9)]

    def scores(limit: int, batch_size: Any = "auto") -> tuple[list[Any], list[int]]:
        lm = LanguageModel(model, byte_tokenizer(), batch_size=batch_size, answered=lambda done, total: None)
        sizes: list[int] = []
        score = lm._score

        def failing(batch: Any, wanted: Any) -> Any:
            sizes.append(len(batch))
            if len(batch) > limit:
                raise torch.OutOfMemoryError
            return score(batch, wanted)

        monkeypatch.setattr(lm, "_score", failing)
        return lm._loglikelihood_tokens(requests), sizes

    whole, _ = scores(100)
    halved, sizes = scores(2)
    assert sizes == [9, 4, 2, 2, 2, 2, 1]
    for one, other in zip(whole, halved, strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-5) and one[1] == other[1]
    with pytest.raises(torch.OutOfMemoryError):
        scores(2, batch_size=4)  # a number that the user gave stays

"""Perplexity, bits per byte, the eval stage and its table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_eval import VOCABULARY, byte_tokenizer, make_checkpoint, make_data
from transformers import AutoConfig, AutoModelForCausalLM

from minitron_cli.config.evaluate import EvalConfig
from minitron_cli.errors import ConfigError, InputError, OutputError, RunError
from minitron_cli.evaluate import stage
from minitron_cli.evaluate.perplexity import evaluate_split, token_losses
from minitron_cli.evaluate.stage import EvalResult, run_eval
from minitron_cli.evaluate.table import format_eval
from minitron_cli.tokens import TokenDataset

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
HEADS: dict[str, dict[str, Any]] = {
    # Every way in which a family treats its logits: not at all, soft-cap, multiply, divide, bias.
    "llama": {},
    "gemma2": {"final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 5.0},
    "phi": {},
}


def tiny(family: str, **changes: Any) -> Any:
    """A random model with weights large enough that soft-caps and scales matter."""
    values = {**SIZES, **HEADS[family], **changes}
    if family == "phi":
        del values["head_dim"]
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return model


def naive_losses(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """-log p of every next token from the whole logits, in fp64."""
    with torch.no_grad():
        log = model(ids).logits.double().log_softmax(-1)
    return -log[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]


@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize("chunk", [1, 97 * 3 * 4, 1 << 24])
def test_chunked_losses_are_the_whole_models(family: str, chunk: int) -> None:
    model = tiny(family)
    ids = torch.randint(0, 97, (3, 11), generator=torch.Generator().manual_seed(2))
    found = token_losses(model, ids, chunk_elements=chunk)
    assert found.shape == (3, 10) and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), naive_losses(model, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_the_familys_treatment_of_logits_matters_here(family: str) -> None:
    """Guards the test above: without cap or scale the losses would differ plainly."""
    off = {
        "gemma2": {"final_logit_softcapping": None},
        "cohere": {"logit_scale": 1.0},
        "granite": {"logits_scaling": 1.0},
    }
    ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(2))
    plain, treated = naive_losses(tiny(family, **off[family]), ids), naive_losses(tiny(family), ids)
    assert (plain - treated).abs().mean() > 0.1


def test_no_more_logits_than_the_chunk_allows() -> None:
    model = tiny("llama")
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: seen.append(output.numel()))
    token_losses(model, torch.zeros(2, 33, dtype=torch.long), chunk_elements=97 * 2 * 5)
    assert max(seen) == 97 * 2 * 5 and sum(seen) == 97 * 2 * 32


def test_the_model_is_whole_again_afterwards() -> None:
    model = tiny("llama")
    ids = torch.randint(0, 97, (1, 6))
    before = model(ids).logits
    token_losses(model, ids)
    assert "forward" not in vars(model.model)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("batch_size", "max_sequences"), [(1, None), (3, None), (7, 5), (2, 100)])
def test_split_against_a_naive_sum(tmp_path: Path, masked: bool, batch_size: int, max_sequences: int | None) -> None:
    split = TokenDataset(make_data(tmp_path / "data", masked=masked)).split("validation")
    model = tiny("llama", vocab_size=VOCABULARY)
    nats = count = 0.0
    for row in range(min(7, max_sequences or 7)):
        losses = naive_losses(model, torch.tensor(np.asarray(split.tokens[row], np.int64))[None])[0]
        targets = np.ones(12) if split.mask is None else split.mask[row]
        for position in range(1, 12):
            if targets[position]:
                nats += float(losses[position - 1])
                count += 1
    found = evaluate_split(model, split, batch_size=batch_size, max_sequences=max_sequences)
    assert found.tokens == count
    assert found.loss == pytest.approx(nats / count, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / (count * 3), rel=1e-5)


def test_a_model_that_knows_nothing(tmp_path: Path) -> None:
    """Equal logits: the loss is the log of the vocabulary, whatever the text."""
    model = tiny("llama", vocab_size=VOCABULARY)
    torch.nn.init.zeros_(model.lm_head.weight)
    split = TokenDataset(make_data(tmp_path / "data", bytes_per_token=2)).split("validation")
    found = evaluate_split(model, split, batch_size=4)
    assert found.tokens == 7 * 11
    assert found.loss == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    assert found.perplexity == pytest.approx(VOCABULARY, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(math.log2(VOCABULARY) / 2, rel=1e-6)


def test_nothing_to_predict_and_broken_numbers(tmp_path: Path) -> None:
    path = make_data(tmp_path / "data", masked=True)
    (path / "validation.mask").write_bytes(bytes(7 * 12))
    split = TokenDataset(path).split("validation")
    model = tiny("llama", vocab_size=VOCABULARY)
    with pytest.raises(InputError, match="No token of the validation split is a target"):
        evaluate_split(model, split, batch_size=4)
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    whole = TokenDataset(make_data(tmp_path / "whole")).split("validation")
    with pytest.raises(RunError, match="sequences 0 to 3"):
        evaluate_split(model, whole, batch_size=4)


def test_stage_writes_results_and_is_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, data = make_checkpoint(tmp_path / "model"), make_data(tmp_path / "data")
    config = EvalConfig(checkpoint=str(checkpoint), data=data, out=tmp_path / "out", batch_size=2, device="cpu")
    result = run_eval(config)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    direct = evaluate_split(model, TokenDataset(data).split("validation"), batch_size=2)
    assert (result.loss, result.perplexity, result.tokens) == (direct.loss, direct.perplexity, direct.tokens)
    assert result.bits_per_byte == direct.bits_per_byte and result.tasks == {}
    stored = json.loads((config.out / "results.json").read_text())
    assert stored["loss"] == direct.loss and "seconds" not in stored
    assert {path.name for path in config.out.iterdir()} == {"results.json", "minitron.json"}
    monkeypatch.setattr(stage, "load_model", lambda *args, **kwargs: pytest.fail("measured again"))
    again = EvalConfig(checkpoint=str(checkpoint), data=data, out=tmp_path / "out", batch_size=5, device="cpu")
    assert run_eval(again) == result
    assert EvalResult(**json.loads(json.dumps(result.to_json()))) == result
    with pytest.raises(OutputError):
        run_eval(EvalConfig(checkpoint=str(checkpoint), data=data, out=tmp_path / "out", max_sequences=3))


def test_data_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    checkpoint, data = make_checkpoint(tmp_path / "model"), make_data(tmp_path / "data")
    byte_tokenizer(merges=(("a", "b"),)).save_pretrained(checkpoint)
    with pytest.raises(InputError, match="another tokenizer") as caught:
        run_eval(EvalConfig(checkpoint=str(checkpoint), data=data, out=tmp_path / "out"))
    assert str(data) in str(caught.value) and str(checkpoint) in str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_options() -> None:
    def tasks(value: Any) -> tuple[str, ...]:
        return EvalConfig(checkpoint="c", out=Path("o"), tasks=value).tasks

    assert tasks("mmlu, arc_easy") == tasks(("mmlu,arc_easy", "mmlu")) == tasks(["mmlu", "arc_easy"])
    assert tasks("mmlu, arc_easy") == ("mmlu", "arc_easy")
    with pytest.raises(ConfigError, match="--tasks"):
        EvalConfig(checkpoint="c", out=Path("o"))
    with pytest.raises(ConfigError, match="--tasks"):
        EvalConfig(checkpoint="c", out=Path("o"), tasks=" , ")
    with pytest.raises(ConfigError, match="--data-dir"):
        EvalConfig(checkpoint="c", out=Path("o"), data=Path("d"), data_dir=Path("m"))
    with pytest.raises(ConfigError, match="--limit"):
        EvalConfig(checkpoint="c", out=Path("o"), data=Path("d"), limit=0)
    with pytest.raises(ConfigError, match="--tasks"):
        EvalConfig(checkpoint="c", out=Path("o"), tasks=3)  # type: ignore[arg-type]


def test_table() -> None:
    result = EvalResult(
        out="out", checkpoint="model", loss=2.0, perplexity=7.389, bits_per_byte=0.75, tokens=65408, seconds=1.0,
        groups={"all": ["part"], "part": ["leaf"]},
        tasks={
            "all": {"samples": 1200}, "part": {"samples": 9, "acc": 0.25, "acc_stderr": 0.125},
            "leaf": {"samples": 9, "acc": 0.25}, "other": {"samples": 3, "em,strict": 1.0, "em_stderr,strict": 0.5},
        },
    )  # fmt: skip
    assert format_eval(result).splitlines() == [
        "perplexity 7.389  2.0000 nats/token  0.7500 bits/byte  (65,408 tokens)",
        "",
        "task      metric      value     +/-  questions",
        "all                                      1,200",
        "  part    acc        0.2500  0.1250          9",
        "    leaf  acc        0.2500                  9",
        "other     em,strict  1.0000  0.5000          3",
    ]

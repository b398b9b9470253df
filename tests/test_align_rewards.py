"""Rewards: graded ones by hand, models against the stock classes, and models that cannot read the text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_align import options
from helpers_chain import make_checkpoint
from helpers_tokenizer import CHATML, make_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from minitron_cli.align.prompts import Prompt
from minitron_cli.align.reward_models import Likelihood, RewardModel, open_reward
from minitron_cli.align.rewards import Checked, Length, RewardFailed, Words, require_signal, shortened, tie_rate
from minitron_cli.errors import ConfigError, InputError, UserError
from minitron_cli.models.tokenizer import load_tokenizer

CPU = torch.device("cpu")
PROMPTS = [Prompt("the quick", (1,)), Prompt("def add(", (2,)), Prompt("", (3,))]
RESPONSES = [" brown fox", "first, second)", " over the lazy dog and on"]


def make_reward_model(path: Path, *, labels: int = 1, pad: bool = True, **changes: Any) -> Path:
    tokenizer = make_tokenizer(path, template=changes.pop("template", None))
    if pad:
        tokenizer.pad_token = "</s>"
        tokenizer.save_pretrained(path)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, num_labels=labels,
        pad_token_id=tokenizer.pad_token_id if pad else None, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    return path


def test_length() -> None:
    assert Length(10)(PROMPTS, ["", "x" * 10, "x" * 15]) == [-1.0, 0.0, -0.5]


def test_words() -> None:
    found = Words(("if", "return"))(PROMPTS, ["nothing", "if if", "if x: return"])
    assert found == pytest.approx([0.0, 1 + 4 / 5, 2 + 8 / 12])
    assert Words(("a",))(PROMPTS[:1], [""]) == [0.0]


def test_tie_rate() -> None:
    assert tie_rate(torch.tensor([[1.0, 2.0, 3.0]])) == 0
    assert tie_rate(torch.tensor([[1.0, 1.0, 3.0], [2.0, 2.0, 2.0]])) == pytest.approx((1 / 3 + 1) / 2)
    assert tie_rate(torch.tensor([[1.0]])) == 0
    require_signal("r", torch.tensor([[1.0, 1.0], [1.0, 2.0]]))


def test_likelihood_is_the_mean_log_probability(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "m")
    tokenizer, model = load_tokenizer(path), AutoModelForCausalLM.from_pretrained(path).eval()
    found = Likelihood(str(path), CPU, torch.float32)(PROMPTS, RESPONSES)
    for value, prompt, response in zip(found, PROMPTS, RESPONSES, strict=True):
        before = tokenizer(prompt.text).input_ids or [tokenizer.bos_token_id]
        after = tokenizer(response, add_special_tokens=False).input_ids
        with torch.no_grad():
            scores = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
        chosen = [scores[len(before) - 1 + place, word].item() for place, word in enumerate(after)]
        assert value == pytest.approx(sum(chosen) / len(chosen), abs=1e-4)
    empty = Likelihood(str(path), CPU, torch.float32)(PROMPTS[:1], [""])
    assert empty == [pytest.approx(-math.log(model.config.vocab_size))]
    with pytest.raises(RewardFailed, match="reads 64 tokens"):
        Likelihood(str(path), CPU, torch.float32)(PROMPTS[:1], ["fox " * 60])


@pytest.mark.parametrize("pad", [True, False])
def test_reward_model_scores_the_text(pad: bool, tmp_path: Path) -> None:
    """In batches where the model has padding, one by one where it has none; like the stock class on each alone."""
    path = make_reward_model(tmp_path / "m", pad=pad)
    reward = RewardModel(str(path), None, CPU, torch.float32)
    tokenizer, model = load_tokenizer(path), AutoModelForSequenceClassification.from_pretrained(path).eval()
    for value, prompt, response in zip(reward(PROMPTS, RESPONSES), PROMPTS, RESPONSES, strict=True):
        with torch.no_grad():
            (expected,) = model(torch.tensor([tokenizer(prompt.text + response).input_ids])).logits[0]
        assert value == pytest.approx(expected.item(), abs=1e-5)


def test_labels(tmp_path: Path) -> None:
    names = {0: "bad", 1: "good", 2: "other"}
    path = make_reward_model(tmp_path / "m", labels=3, id2label=names, label2id={v: k for k, v in names.items()})
    for label in ("good", "1"):
        reward = RewardModel(str(path), label, CPU, torch.float32)
        ids = load_tokenizer(path)(PROMPTS[0].text + RESPONSES[0]).input_ids
        with torch.no_grad():
            probabilities = reward.model(torch.tensor([ids])).logits[0].softmax(-1)
        odds = probabilities[1] / (1 - probabilities[1])
        assert reward(PROMPTS[:1], RESPONSES[:1]) == [pytest.approx(odds.log().item(), abs=1e-5)]
    for label in (None, "best"):
        with pytest.raises(ConfigError, match=r"labels bad, good, other; choose one with --reward-label"):
            RewardModel(str(path), label, CPU, torch.float32)
    with pytest.raises(ConfigError, match="leave out --reward-label"):
        RewardModel(str(make_reward_model(tmp_path / "one")), "good", CPU, torch.float32)


def test_conversations_go_through_the_models_template(tmp_path: Path) -> None:
    path = make_reward_model(tmp_path / "m", template=CHATML)
    reward = RewardModel(str(path), None, CPU, torch.float32)
    prompt = Prompt("whatever", (1,), ({"role": "user", "content": "what is the answer?"},))
    text = "<|im_start|>user\nwhat is the answer?<|im_end|>\n<|im_start|>assistant\nbelow<|im_end|>\n"
    ids = load_tokenizer(path)(text, add_special_tokens=False).input_ids
    with torch.no_grad():
        expected = reward.model(torch.tensor([ids])).logits[0, 0].item()
    assert reward([prompt], ["below"]) == [pytest.approx(expected, abs=1e-5)]


def test_models_that_are_no_reward_models(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no score\.weight, so it is no reward model; .*likelihood:CKPT"):
        RewardModel(str(make_checkpoint(tmp_path / "lm")), None, CPU, torch.float32)
    path = make_reward_model(tmp_path / "damaged")
    (path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="not a sequence-classification checkpoint"):
        RewardModel(str(path), None, CPU, torch.float32)
    with pytest.raises(UserError, match="does not exist"):
        RewardModel(str(tmp_path / "nowhere"), None, CPU, torch.float32)


def test_a_model_that_cannot_read_the_text(tmp_path: Path) -> None:
    reward = Checked("m", RewardModel(str(make_reward_model(tmp_path / "m")), None, CPU, torch.float32))
    with pytest.raises(RewardFailed, match=r"reads 64 tokens, and a prompt with its response has \d+; use shorter"):
        reward(PROMPTS[:1], ["fox " * 60])


def test_open_reward(tmp_path: Path) -> None:
    common = {"policy": "p", "prompts": Path("p"), "steps": 1}
    path = make_reward_model(tmp_path / "m")
    for spec, kind in {"length:4": Length, "words:a,b": Words, str(path): RewardModel}.items():
        opened = open_reward(options(common, tmp_path / "o", reward=spec), CPU, torch.float32)
        assert isinstance(opened.reward, kind) and opened.name == spec
    with pytest.raises(ConfigError, match="--reward-label names a label of a reward model"):
        open_reward(options(common, tmp_path / "o", reward="length:4", reward_label="x"), CPU, torch.float32)


def test_shortened() -> None:
    assert shortened("a") == "'a'" and shortened("a" * 70) == repr("a" * 57 + "...")

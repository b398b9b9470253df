"""Best-of-N when a model is used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers_chain import make_checkpoint

from minitron_cli.align.inference import best_of_n
from minitron_cli.align.rewards import Length
from minitron_cli.errors import ConfigError, InputError
from minitron_cli.models.load import load_model
from minitron_cli.models.tokenizer import load_tokenizer

PROMPTS = ["the quick", "", "return"]


def test_the_best_of_all_that_were_drawn(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "m")
    model, tokenizer = load_model(path, device=torch.device("cpu"), dtype=torch.float32), load_tokenizer(path)
    found = best_of_n(model, tokenizer, Length(20), PROMPTS, 6, max_new_tokens=8)
    assert [each.prompt for each in found] == PROMPTS
    for each in found:
        assert len(each.rewards) == 6 and each.reward == max(each.rewards) > min(each.rewards)
        assert Length(20)([], [each.response]) == [each.reward]
    assert best_of_n(model, tokenizer, Length(20), PROMPTS, 6, max_new_tokens=8) == found
    assert best_of_n(model, tokenizer, Length(20), PROMPTS, 6, max_new_tokens=8, seed=1) != found
    cut = best_of_n(model, tokenizer, Length(20), PROMPTS, 6, max_new_tokens=8, stop="o")
    assert all("o" not in each.response for each in cut)
    with pytest.raises(InputError, match="at least one prompt"):
        best_of_n(model, tokenizer, Length(20), [], 6)
    with pytest.raises(ConfigError, match="no single token"):
        best_of_n(model, tokenizer, Length(20), PROMPTS, 6, stop="no such token")

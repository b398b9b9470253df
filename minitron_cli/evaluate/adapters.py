"""Where the harness's classes meet ours. Importing this module imports lm_eval; do so inside functions only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from datasets import Dataset, DatasetDict
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM

from minitron_cli.evaluate.batches import sequences_at_once, tokens_at_once
from minitron_cli.evaluate.local import LocalFiles
from minitron_cli.models.head import Head, backbone_output

Request = tuple[tuple[str, str], list[int], list[int]]
"""(context, continuation) as text, then the ids of each."""


@contextmanager
def rows_from(local: LocalFiles) -> Iterator[None]:
    """Tasks built inside read their rows from files; name, prompt, metric and groups stay the harness's.

    `download` is the method that the harness lets tasks override; its task index has no way to name a subclass for
    the members of a group, hence the exchange on the class itself.
    """

    def download(self: Any, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        rows = local.rows(self.config.task, str(self.DATASET_NAME))
        splits = {split: Dataset.from_list(found) for split, found in rows.items()}
        # The harness looks for solved examples in splits that may not be here: there are none.
        none = next(iter(splits.values())).select([])
        named = (self.config.training_split, self.config.validation_split, self.config.test_split)
        self.dataset = DatasetDict({split: none for split in named if split is not None} | splits)

    original = ConfigurableTask.download
    ConfigurableTask.download = download
    try:
        yield
    finally:
        ConfigurableTask.download = original


class LanguageModel(HFLM):  # type: ignore[misc]
    """The harness's model class, with the output head applied only where a continuation is scored.

    The stock class computes logits and their softmax at every position of the prompt: with 128k words, eight prompts
    of 2,000 tokens are 8 GB. `answered(done, total)` is called after each batch; `truncated` counts prompts that did
    not fit into the model's context and lost their beginning.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, batch_size: int | Literal["auto"], answered: Callable[[int, int], None]
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1)
        self.batch_size_per_gpu = sequences_at_once(model, self.max_length, batch_size)  # for generation
        self._tokens = tokens_at_once(model) if batch_size == "auto" else None
        self._answered = answered
        self.truncated = 0

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Per request: the log-probability of the continuation in nats, and whether greedy decoding gives it."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            whole = (context + continuation)[-(self.max_length + 1) :]
            members = groups.setdefault(tuple(whole[:-1]), [])  # " A" to " D" after one prompt: one row
            self.truncated += not members and len(whole) < len(context) + len(continuation)
            members.append(index)
        rows = sorted(groups, key=lambda ids: (-len(ids), ids))
        answers: dict[int, tuple[float, bool]] = {}
        done = 0
        while done < len(rows):
            batch = rows[done : done + (override_bs or self._fitting(len(rows[done])))]
            wanted = [[(index, requests[index][2]) for index in groups[row]] for row in batch]
            try:
                answers.update(self._score(batch, wanted))
            except torch.OutOfMemoryError:
                if self._tokens is None or len(batch) == 1:
                    raise
                self._tokens = len(batch) // 2 * len(batch[0])  # for the rest of the run, too
                continue
            done += len(batch)
            if override_bs is None:  # else one of many calls, and `len(requests)` is not the total
                self._answered(len(answers), len(requests))
        return [answers[index] for index in range(len(requests))]

    def _fitting(self, longest: int) -> int:
        """Rows of a batch: a given number, or what the memory has room for at this length."""
        return int(self.batch_size) if self._tokens is None else max(1, self._tokens // longest)

    def _score(
        self, batch: Sequence[tuple[int, ...]], wanted: Sequence[Sequence[tuple[int, list[int]]]]
    ) -> dict[int, tuple[float, bool]]:
        """Score continuations, each ending one position after its row of input ids. Keys are request indices."""
        ids = torch.zeros(len(batch), len(batch[0]), dtype=torch.long)  # padded right: causal, so nothing sees it
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = torch.tensor(tokens)
        output = backbone_output(self.model, ids.to(self.device))
        keep = max(len(continuation) for row in wanted for _, continuation in row)
        ends = torch.tensor([len(tokens) for tokens in batch])[:, None]
        places = (ends - keep + torch.arange(keep)).clamp(min=0).to(self.device)  # (rows, keep)
        hidden = output.last_hidden_state
        hidden = hidden.gather(1, places[:, :, None].expand(-1, -1, hidden.shape[-1]))
        scores = (
            Head(self.model, output)(hidden.flatten(0, 1)).log_softmax(-1).view(*hidden.shape[:2], -1)
        )  # (rows, keep, vocab)
        found = {}
        for row, continuations in enumerate(wanted):
            for index, continuation in continuations:
                target = torch.tensor(continuation, device=self.device)
                part = scores[row, keep - len(continuation) :]
                total = float(part.gather(-1, target[:, None]).sum())
                found[index] = (total, bool((part.argmax(-1) == target).all()))
        return found

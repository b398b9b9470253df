"""Does a cache serve a run: its teacher, data, temperature, words and sequences?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from minitron_cli.config.distill import DistillConfig
from minitron_cli.distill.cache import Content, TeacherCache
from minitron_cli.errors import ConfigError, InputError, ShapeError
from minitron_cli.runtime.progress import say


def first_visits(visits: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Each sequence once, in the order in which training first meets it."""
    _, places = np.unique(visits, return_index=True)
    return visits[np.sort(places)]


def require_fit(
    cache: TeacherCache,
    config: DistillConfig,
    source: str | None,
    data: str,
    student_vocab: int,
    visits: npt.NDArray[np.int64],
) -> None:
    """Refuse a cache that was made for something else than this run.

    Raises:
        UserError: of another teacher, data, temperature, vocabulary, or with too few sequences.
    """
    name, content = cache.directory, cache.content
    again = "cache the teacher again with --cache-teacher in another directory"
    if source is not None and cache.inputs["teacher"] != source:
        raise InputError(f"{name} holds the answers of another teacher than {config.teacher}; {again}.")
    if cache.inputs["data"] != data:
        raise InputError(f"{name} was cached on other data than {config.data}; {again}.")
    if content.temperature != config.temperature:
        raise ConfigError(
            f"{name} was cached at temperature {content.temperature:g} and this run has {config.temperature:g}; "
            f"give --temperature {content.temperature:g}, or {again}."
        )
    if content.vocab > student_vocab:
        raise ShapeError(
            f"{name} was cached over {content.vocab} words and the student knows {student_vocab}; {again}."
        )
    rows = first_visits(visits)
    missing = cache.missing(rows)
    if missing:
        raise InputError(
            f"{name} lacks {missing} of the {len(rows)} sequences that these steps and this seed visit; "
            f"use fewer --steps or the --seed it was made with, or {again}."
        )


def cached_loss(config: DistillConfig, directory: Path, content: Content) -> str:
    """The loss in terms of k words.

    Raises:
        ConfigError: it needs more of the teacher than a cache holds.
    """
    objective = config.objective
    limit = content.vocab - 1
    wanted = max(config.top_k or 0, *objective.top_k, 0)
    if min(wanted, limit) > content.top_k:
        raise ConfigError(
            f"{directory} holds the {content.top_k} likeliest words per token and this run asks for {wanted}; "
            f"use at most {content.top_k}, or cache the teacher again in another directory."
        )
    loss = objective.on_top_k(config.top_k or content.top_k)
    if loss != objective:
        say(f"The loss is {loss} of the cached teacher: a lower bound of the KL over all words.")
    return str(loss)

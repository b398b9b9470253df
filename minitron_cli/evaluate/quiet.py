"""Keep the harness from changing the process around it."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Import and run lm_eval inside: no log lines, no bars, and no trace afterwards.

    The harness logs as it goes, draws a tqdm bar per task (ours is the one that knows the whole), seeds the global
    generators, and sets environment variables when it is imported.
    """
    logger = logging.getLogger("lm_eval")
    level, environment = logger.level, dict(os.environ)
    states = random.getstate(), np.random.get_state()
    logger.setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), _no_bars():
            yield
    finally:
        logger.setLevel(level)
        random.setstate(states[0])
        np.random.set_state(states[1])
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


@contextmanager
def _no_bars() -> Iterator[None]:
    from tqdm.std import tqdm  # type: ignore[import-untyped]  # the harness's modules hold this class by name, so its constructor is what can change

    original = tqdm.__init__

    def disabled(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "disable": True})

    tqdm.__init__ = disabled
    try:
        yield
    finally:
        tqdm.__init__ = original


def seed_harness() -> None:
    """The harness's default seeds; called before each task, so that a task's result does not depend on the others."""
    random.seed(0)
    np.random.seed(1234)
    torch.manual_seed(1234)


FEWSHOT_SEED = 1234
"""The harness's default for tasks that draw their examples."""

"""What a search has finished: written at once, so that a killed search goes on there."""

from __future__ import annotations

import json
import math
from pathlib import Path

from minitron_cli.manifest import write_json
from minitron_cli.runtime.group import Group
from minitron_cli.search.contender import Curve

JOURNAL = "state.search.json"


class Journal:
    """Zero-shot losses, and curves up to the end of each candidate's last rung; beside the candidates' checkpoints."""

    def __init__(self, directory: Path, group: Group | None = None) -> None:
        self.path, self.group = directory / JOURNAL, group or Group()
        self.zero_shot: dict[str, float | None] = {}
        self.curves: dict[str, Curve] = {}
        if self.path.exists():
            saved = json.loads(self.path.read_text("utf-8"))
            self.zero_shot = saved["zero_shot"]
            self.curves = {name: Curve(**curve) for name, curve in saved["curves"].items()}

    def start(self, name: str) -> float:
        """A zero-shot loss to compare by: infinite where it was not finite."""
        loss = self.zero_shot[name]
        return math.inf if loss is None else loss

    def save(self) -> None:
        """Replace the file; of several processes, the first does."""
        if not self.group.main:
            return
        curves = {name: curve.to_json() for name, curve in self.curves.items()}
        write_json(self.path, {"zero_shot": self.zero_shot, "curves": curves})

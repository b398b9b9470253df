"""The consent filter as a step of a datatrove pipeline, which runs it on Slurm, Ray or many local processes.

    from minitron_cli.data.consent.steps import ConsentFilter
    pipeline = [JsonlReader("corpus"), ConsentFilter("robots-store", unknown="drop"), JsonlWriter("filtered")]

The verdicts are those of `minitron data audit`. datatrove is not among minitron's dependencies.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minitron_cli.config.audit import AuditConfig
from minitron_cli.data.consent.filtering import keeps
from minitron_cli.data.consent.policy import STATUSES, Judge
from minitron_cli.data.consent.rows import moment
from minitron_cli.data.consent.snapshot import INDEX, Snapshot, build_snapshot
from minitron_cli.data.consent.stage import question_of

try:
    from datatrove.data import Document
    from datatrove.pipeline.filters.base_filter import BaseFilter
except ImportError as error:
    raise ImportError("The pipeline step needs datatrove; install it with `pip install datatrove`.") from error


class ConsentFilter(BaseFilter):  # type: ignore[misc]
    """Drops documents that the agents may not have; writes status and blocked agents into their metadata."""

    name = "Consent (robots.txt)"

    def __init__(
        self, robots: str, unknown: str, agents: Sequence[str] = (), *, as_of: str | None = None,
        signals: str = "strictest", scheme: str = "exact", url_key: str = "url", date_key: str = "date",
        snapshot: str | None = None, exclusion_writer: Any = None,
    ) -> None:  # fmt: skip
        """Options as of `minitron data audit --filter`.

        `snapshot`: a directory that all tasks see, where `build_snapshot(robots, snapshot)` has laid out the store for
        look-ups; without it each task does so for itself, in a temporary directory.

        Raises:
            UserError: an option is wrong, or there is no such store.
        """
        super().__init__(exclusion_writer)
        options = {"unknown": unknown, "agents": tuple(agents), "as_of": as_of, "signals": signals, "scheme": scheme}
        given = {"source": "-", "robots": Path(robots), "out": Path("-"), "filter": True, **options}
        self.config = AuditConfig.from_mapping(given)
        self.url_key, self.date_key, self.snapshot = url_key, date_key, snapshot
        self.question = question_of(self.config, months=[])
        self._judge: Judge | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Tasks open the look-up files for themselves."""
        return {**self.__dict__, "_judge": None}

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Whether the document stays; else with its status as the reason."""
        judge = self._judge or self._open()
        date = moment(doc.metadata.get(self.date_key)) if self.question.crawl else None
        outcome = judge.verdict(doc.metadata.get(self.url_key), date)[0]
        status = STATUSES[outcome.status]
        blocked = [agent.name for number, agent in enumerate(self.question.agents) if outcome.blocked >> number & 1]
        doc.metadata["consent_status"], doc.metadata["consent_blocked"] = status, ", ".join(blocked)
        return True if keeps(outcome.status, str(self.config.unknown)) else (False, status)

    def _open(self) -> Judge:
        with tempfile.TemporaryDirectory() as temporary:
            place = Path(self.snapshot or temporary)
            if not (place / INDEX).exists():
                build_snapshot(self.config.robots, place)
            self._judge = Judge(Snapshot(place), self.question)  # the files stay mapped after their names are gone
        return self._judge

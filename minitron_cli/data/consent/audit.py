"""The audit of one part of a corpus: verdicts per row, counts, totals per site, and the rows that stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from minitron_cli.data.consent.corpus import Columns, Part
from minitron_cli.data.consent.domains import Domain, folded, write_run
from minitron_cli.data.consent.filtering import Filtered, keeps
from minitron_cli.data.consent.policy import STATUSES, Judge, Question
from minitron_cli.data.consent.rows import Batch, Counter, read_part
from minitron_cli.data.consent.snapshot import Snapshot
from minitron_cli.data.consent.urls import host_of

VERDICTS, CORPUS = "verdicts", "corpus"
"""Folders of the output."""

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("url", pa.string()),
        ("status", pa.string()),
        ("agents", pa.string()),
        ("refused_by", pa.string()),
        ("rule", pa.string()),
        ("line", pa.int32()),
        ("fetched_at", pa.timestamp("ms", tz="UTC")),
    ]
)
"""`agents`: those that may not have the document, comma-separated. `fetched_at`: of the capture that decided."""

VERDICT_ROWS = 1 << 17
"""Rows of one row group of verdicts."""

SITES = 400_000
"""Sites whose totals are held in memory before they are written out as a sorted run."""


@dataclass(frozen=True)
class Plan:
    """What every process needs, sent to it once. `unknown`: "keep" or "drop"; None without filter."""

    directory: Path
    question: Question
    columns: Columns
    unknown: str | None
    tokenizer: str | None


Kind = tuple[int, int, str, bool]
"""Base status, bitset of blocked agents, sources that refuse, conflict."""


@dataclass
class PartCounts:
    """What was found in one part: [documents, tokens] per kind of outcome, the same of what the filter kept, and the
    files with totals per site."""

    kinds: dict[Kind, list[int]] = field(default_factory=dict)
    runs: list[str] = field(default_factory=list)
    kept: tuple[int, int] = (0, 0)


class Auditor:
    """Audits parts, one after another, with caches that outlive them."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.judge = Judge(Snapshot(plan.directory), plan.question)
        self.counter = token_counter(plan.tokenizer) if plan.columns.tokens_from == "tokenizer" else None
        self._names: dict[int, str] = {}

    def audit(self, part: Part, advance: Callable[[int], None]) -> PartCounts:
        """Read a part, write its verdicts and, when filtering, its kept rows; `advance` hears of every batch's rows."""
        counts = PartCounts()
        sites = _Sites(self.plan.directory, part.number, counts.runs)
        batches = read_part(part, self.plan.columns, self.counter, self.plan.unknown is not None)
        with _VerdictFile(self.plan.directory / VERDICTS / verdict_name(part)) as file:
            if self.plan.unknown is None:
                for batch in batches:
                    file.add(self._judge(batch, sites, counts.kinds)[0])
                    advance(len(batch.urls))
            else:
                with Filtered(part, self.plan.directory / CORPUS) as filtered:
                    for batch in batches:
                        table, statuses = self._judge(batch, sites, counts.kinds)
                        file.add(table)
                        kept = [place for place, status in enumerate(statuses) if keeps(status, self.plan.unknown)]
                        filtered.write(batch, kept)
                        of_kept = sum(batch.tokens[place] for place in kept)
                        counts.kept = (counts.kept[0] + len(kept), counts.kept[1] + of_kept)
                        advance(len(batch.urls))
        sites.flush()
        return counts

    def _judge(self, batch: Batch, sites: _Sites, kinds: dict[Kind, list[int]]) -> tuple[pa.Table, list[int]]:
        """Verdicts of a batch as a table, and their statuses; adds to the counts."""
        verdict, totals, names = self.judge.verdict, sites.totals, self._names
        statuses: list[int] = []
        agents: list[str] = []
        refused: list[str] = []
        rules: list[str | None] = []
        lines: list[int | None] = []
        times: list[int | None] = []
        dates = batch.dates
        for place, (url, count) in enumerate(zip(batch.urls, batch.tokens, strict=True)):
            outcome, authority, site, fetched_at = verdict(url, None if dates is None else dates[place])
            base, blocked, by, rule, line, conflict = outcome
            statuses.append(outcome.status)
            known = names.get(blocked)
            if known is None:
                known = names[blocked] = self._shown(blocked)
            agents.append(known)
            refused.append(by)
            rules.append(rule)
            lines.append(line)
            times.append(fetched_at)
            kind = (base, blocked, by, conflict)
            found = kinds.get(kind)
            if found is None:
                kinds[kind] = [1, count]
            else:
                found[0] += 1
                found[1] += count
            if site is not None:
                total = totals.get(authority)
                if total is None:
                    totals[authority] = [1, count, site.extents]
                else:
                    total[0] += 1
                    total[1] += count
        if len(totals) > SITES:
            sites.flush()
        return _table(batch, statuses, agents, refused, rules, lines, times), statuses

    def _shown(self, blocked: int) -> str:
        return ", ".join(a.name for n, a in enumerate(self.plan.question.agents) if blocked >> n & 1)


def verdict_name(part: Part) -> str:
    """The file of a part's verdicts, below the folder."""
    return part.name if part.name.endswith(".parquet") else f"{part.name}.parquet"


def token_counter(tokenizer: str | None) -> Counter:
    """A function from texts to their numbers of tokens, without special tokens."""
    from minitron_cli.models.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer or "")
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        return lambda texts: [len(loaded.encode(text, add_special_tokens=False, verbose=False)) for text in texts]
    backend.no_truncation()
    backend.no_padding()
    return lambda texts: [len(found.ids) for found in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _table(
    batch: Batch, statuses: list[int], agents: list[str], refused: list[str], rules: list[str | None],
    lines: list[int | None], times: list[int | None],
) -> pa.Table:  # fmt: skip
    names = pa.array(STATUSES)
    columns = [
        pa.array(batch.numbers, pa.int64()),
        _strings([url if url is None or isinstance(url, str) else str(url) for url in batch.urls]),
        names.take(pa.array(statuses, pa.int8())),
        pa.array(agents, pa.string()),
        pa.array(refused, pa.string()),
        _strings(rules),
        pa.array(lines, pa.int32()),
        pa.array([None if at is None else 1000 * at for at in times], SCHEMA.field("fetched_at").type),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _strings(values: list[Any]) -> pa.Array:
    """Text that UTF-8 may not be able to hold (JSON and robots.txt allow it), such characters replaced."""
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:
        clean = [None if v is None else v.encode("utf-8", "replace").decode("utf-8") for v in values]
        return pa.array(clean, pa.string())


class _VerdictFile:
    """Verdicts of one part, gathered into row groups of a useful size."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = pq.ParquetWriter(path, SCHEMA, compression="zstd")
        self._held: list[pa.Table] = []
        self._rows = 0

    def add(self, table: pa.Table) -> None:
        self._held.append(table)
        self._rows += table.num_rows
        if self._rows >= VERDICT_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            self._writer.write_table(pa.concat_tables(self._held).combine_chunks())
        self._held, self._rows = [], 0

    def __enter__(self) -> _VerdictFile:
        return self

    def __exit__(self, *raised: object) -> None:
        if raised[0] is None:
            self._flush()
        self._writer.close()


class _Sites:
    """Documents and tokens per authority, written out as sorted runs so that memory stays bounded."""

    def __init__(self, directory: Path, part: int, runs: list[str]) -> None:
        self.totals: dict[str, list[Any]] = {}
        self._directory, self._part, self._runs = directory, part, runs

    def flush(self) -> None:
        """Write the totals so far as one run and begin anew (in place: the dictionary is held elsewhere)."""
        if self.totals:
            name = f"state.sites-{self._part:06d}-{len(self._runs):04d}.arrow"
            rows = (Domain(host_of(site), total[2], total[0], total[1]) for site, total in self.totals.items())
            write_run(self._directory / name, folded(sorted(rows)))
            self._runs.append(name)
            self.totals.clear()

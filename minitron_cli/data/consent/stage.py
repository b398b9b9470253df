"""`minitron data audit`: what a corpus may be used for under robots.txt and other opt-out signals, and the filter."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_cli.config.audit import AuditConfig
from minitron_cli.data.consent.agents import Agents
from minitron_cli.data.consent.audit import CORPUS, Plan
from minitron_cli.data.consent.corpus import Corpus, open_corpus
from minitron_cli.data.consent.domains import View, domain_view, merged
from minitron_cli.data.consent.policy import Question
from minitron_cli.data.consent.pool import audit_parts
from minitron_cli.data.consent.snapshot import Snapshot, build_snapshot, month_end
from minitron_cli.data.consent.store import store_files, stored_bytes
from minitron_cli.data.consent.summary import TermsTable, count_tables, merged_counts, without_tokens
from minitron_cli.data.consent.terms import Terms, read_annotations
from minitron_cli.errors import ConfigError, InputError
from minitron_cli.manifest import StageOutput, digest, fingerprint, require_disk, write_json
from minitron_cli.runtime.progress import Progress, quantity, say

SUMMARY = "summary.json"
TIMELINE = 120
"""Months that the timeline shows at most: the last ones."""


@dataclass(frozen=True)
class AuditResult:
    """The audit's numbers (the content of summary.json) and where they are."""

    out: Path
    summary: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {"out": str(self.out), **self.summary}


def run_audit(config: AuditConfig) -> AuditResult:
    """Judge every document; write verdicts, summary and, with `filter`, the documents that may be used.

    A document is disallowed when any of the agents may not have it, no_robots when its site answered 4xx, unknown when
    the store cannot tell (never fetched, no answer, 429, 5xx, a body that is no robots.txt), and bad_url when its URL
    is none. The same inputs and options give the same bytes, whatever `workers` is.

    Raises:
        UserError: an input that cannot be used; nothing is left behind.
        RunError: a process died, or the disk filled up.
    """
    agents, terms = agents_of(config), None if config.terms is None else read_annotations(config.terms)
    chosen = question_of(config, []).agents
    files = store_files(config.robots)
    if config.out.resolve().is_relative_to(Path(config.source).expanduser().resolve()):
        raise ConfigError(f"--out {config.out} lies inside the corpus {config.source}; choose a directory elsewhere.")
    corpus = open_corpus(
        config.source, url=config.url_column, text=config.text_column, tokens=config.tokens_column,
        date=config.date_column if config.as_of == "crawl" else None, tokenizer=config.tokenizer is not None,
        subset=config.subset, split=config.hub_split,
    )  # fmt: skip
    inputs = {"corpus": corpus.identity, "robots": digest([fingerprint(file) for file in files])}
    inputs["agents"] = digest([[a.name, a.operator, a.purpose, a.organisation] for a in [*chosen, *agents.all()]])
    if config.terms is not None:
        inputs["terms"] = fingerprint(config.terms)
    if config.tokenizer is not None and corpus.columns.tokens_from == "tokenizer":
        inputs["tokenizer"] = _tokenizer_identity(config.tokenizer)
    output = StageOutput(config.out, "audit", config, inputs, force=config.force)
    if output.result is not None:
        say(f"{config.out} is up to date.")
        return AuditResult(config.out, {key: value for key, value in output.result.items() if key != "out"})
    size = stored_bytes(files) + int(corpus.size * (1.3 if config.filter else 0.3))
    require_disk(config.out, size, "The audit")
    with output:
        summary = _audit(config, corpus, agents, terms, output.partial)
        write_json(output.partial / SUMMARY, summary)
        result = AuditResult(config.out, summary)
        output.commit(result.to_json())
    return result


def agents_of(config: AuditConfig) -> Agents:
    """The list of agents: the user's, or the shipped one."""
    return Agents.shipped() if config.agents_file is None else Agents.load(config.agents_file)


def question_of(config: AuditConfig, months: Sequence[str]) -> Question:
    """What the options ask of every URL.

    Raises:
        ConfigError: an agent is unknown, or the list has none that collects training text.
        InputError: the list of agents cannot be read.
    """
    agents = agents_of(config)
    chosen = tuple(agents.select(config.agents) if config.agents else agents.training())
    if not chosen:
        raise ConfigError(f"{agents.origin} lists no agent that collects training text; name some with --agents.")
    table = [agent.name for row in agents.organisations().values() for agent in row]
    return Question(
        agents=chosen,
        viewed=tuple(dict.fromkeys([*(agent.name for agent in chosen), *table, "*"])),
        signals=config.signals,
        at=config.at,
        crawl=config.as_of == "crawl",
        either_scheme=config.scheme == "either",
        months=tuple(month_end(month) for month in months),
    )


def _tokenizer_identity(tokenizer: str) -> str:
    from minitron_cli.models.tokenizer import load_tokenizer
    from minitron_cli.tokens import tokenizer_identity

    return digest(tokenizer_identity(load_tokenizer(tokenizer)))


def _audit(
    config: AuditConfig, corpus: Corpus, agents: Agents, terms: Mapping[str, Terms] | None, directory: Path
) -> dict[str, Any]:
    """Everything between the checks and the commit; returns the summary."""
    say(f"Reading the policies of {config.robots}.")
    build_snapshot(config.robots, directory)
    snapshot = Snapshot(directory)
    months = snapshot.months()
    months = months[-TIMELINE:] if len(months) > 1 else []
    question = question_of(config, months)
    viewed = question.viewed
    plan = Plan(directory, question, corpus.columns, config.unknown if config.filter else None, config.tokenizer)
    with _Documents(corpus.rows) as progress:
        counts = audit_parts(plan, corpus.parts, config.workers or os.cpu_count() or 1, progress.advance)
    tables = count_tables(merged_counts(counts), question.agents)
    if not tables["documents"]:
        raise InputError(f"{config.source} holds no documents.")
    by_documents = corpus.columns.tokens_from == "none"
    view = View(
        {name: (place,) for place, name in enumerate(viewed)},
        {name: tuple(viewed.index(agent.name) for agent in row) for name, row in agents.organisations().items()},
        tuple(months),
        by_documents,
    )
    table = TermsTable(terms or {}, tuple(range(len(question.agents))), by_documents)
    runs = [name for part in counts for name in part.runs]
    summary = {
        **tables,
        "domains": domain_view(merged(directory, runs), view, table.see),
        "terms": None if terms is None else table.to_json(),
        "tokens_from": corpus.columns.tokens_from,
        "policy": _policy(config, agents, snapshot),
        "filter": None,
    }
    if config.filter:
        kept = [sum(part.kept[place] for part in counts) for place in (0, 1)]
        summary["filter"] = {
            "unknown": config.unknown, "documents": kept[0], "tokens": kept[1],
            "corpus": fingerprint(directory / CORPUS),
        }  # fmt: skip
    return without_tokens(summary) if by_documents else summary


def _policy(config: AuditConfig, agents: Agents, snapshot: Snapshot) -> dict[str, Any]:
    """By what the documents were judged."""
    first, last = snapshot.span()
    return {
        "store": str(config.robots), "captures": len(snapshot), "first": first, "last": last,
        "as_of": config.as_of or "latest", "signals": config.signals, "scheme": config.scheme,
        "agents": agents.origin, "agents_version": agents.version,
    }  # fmt: skip


class _Documents(Progress):
    """Documents done; the total is an estimate for files of lines, so the end is where the count stands."""

    def __init__(self, rows: int) -> None:
        super().__init__("audit", rows, "documents")

    def line(self) -> str:
        if self.total >= self.done and self.total:
            return super().line()
        return f"{self.title}  {quantity(self.done)} documents"

    def close(self) -> None:
        self.total = self.done
        super().close()

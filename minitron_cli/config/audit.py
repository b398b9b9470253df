"""Options of `minitron data audit` and `minitron data robots`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from minitron_cli.config.base import StageConfig, WritingConfig, argument, option, required
from minitron_cli.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class AuditConfig(WritingConfig):
    """Judge every document of a corpus by robots.txt and other opt-out signals; --filter writes what may be used."""

    source: str = argument(
        "Corpus with URLs: a JSONL, Parquet or CSV file, a directory of them, or a Hub data set id.", keyed=False
    )
    robots: Path = required("Store of robots.txt files, made by `data robots fetch` or `import`.", keyed=False)
    filter: bool = option(False, "Write the documents that may be used to OUT/corpus; needs --unknown.")
    unknown: Literal["keep", "drop"] | None = option(
        None, "What --filter does with documents whose site's policy is not known, or whose URL is malformed."
    )
    agents: tuple[str, ...] = option(
        (),
        "Agents to judge for, comma-separated; a document is disallowed if any of them is. `*` stands for agents that "
        "no file names. Default: all agents that collect training text.",
        commas=True,
    )
    agents_file: Path | None = option(
        None, "Agents in place of the shipped list: YAML, or robots.json of ai.robots.txt."
    )
    signals: Literal["strictest", "robots"] = option(
        "strictest", "strictest: any signal that refuses counts. robots: only Allow and Disallow lines."
    )
    as_of: str | None = option(
        None, "Policy as of a date (2025-06-30), or `crawl`: as of each document's own date. Default: the latest."
    )
    scheme: Literal["exact", "either"] = option(
        "exact", "either: where a site has no capture under its own scheme, that of http for https counts, and reverse."
    )
    url_column: str = option("url", "Column that holds the URL or domain; `a.b` is field b of column a.")
    text_column: str = option("text", "Column that holds the text, from which tokens are counted or estimated.")
    tokens_column: str | None = option(None, "Column that holds the number of tokens.")
    date_column: str = option("date", "Column that holds the crawl date, for --as-of crawl.")
    tokenizer: str | None = option(None, "Checkpoint whose tokenizer counts tokens; else 4 bytes are taken as a token.")
    terms: Path | None = option(
        None, "Annotations of terms of service: CSV or JSONL of domain, category, code, evidence."
    )
    subset: str | None = option(None, "Configuration name of a Hub data set.")
    hub_split: str = option("train", "Split of a Hub data set to read.")
    workers: Annotated[int, Ge(0)] = option(0, "Processes; 0 means one per core.", keyed=False)

    def check(self) -> None:
        if self.filter and self.unknown is None:
            raise ConfigError(
                "--filter needs --unknown keep or --unknown drop: documents of sites whose policy is not known are "
                "neither allowed nor disallowed."
            )
        if self.unknown is not None and not self.filter:
            raise ConfigError("--unknown says what --filter does; add --filter or leave it out.")
        if self.as_of not in (None, "crawl"):
            end_of(str(self.as_of))

    @property
    def at(self) -> int | None:
        """The last second (Unix time) whose policy counts; None for the latest, or each document's own."""
        return None if self.as_of in (None, "crawl") else end_of(str(self.as_of))


def end_of(date: str) -> int:
    """Unix time of a moment, or of the last second of a day (UTC).

    Raises:
        ConfigError: not an ISO date.
    """
    try:
        moment = datetime.fromisoformat(date)
    except ValueError:
        raise ConfigError(f"--as-of {date} is neither a date such as 2025-06-30 nor `crawl`.") from None
    if len(date) <= 10:
        moment = moment.replace(hour=23, minute=59, second=59)
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


@dataclass(frozen=True, kw_only=True)
class RobotsFetchConfig(StageConfig):
    """Fetch robots.txt of every site of a corpus into a store; the same command again continues."""

    corpus: str = required(
        "Corpus with URLs, or a text file with one domain or URL per line.", flag="--from", keyed=False
    )
    out: Path = required("Store to fill; made if it does not exist.", keyed=False)
    contact: str | None = option(None, "Mail address or page that the user agent names, for the sites' operators.")
    tdmrep: bool = option(False, "Fetch /.well-known/tdmrep.json too.")
    max_age: Annotated[float, Ge(0)] = option(
        7.0, "Days for which a capture in the store is fresh and not fetched again."
    )
    retry_failed: bool = option(False, "Fetch again what failed (no answer, 429 or 5xx), however fresh.")
    concurrency: Annotated[int, Gt(0), Le(10_000)] = option(64, "Requests under way at once, over all hosts.")
    delay: Annotated[float, Ge(0)] = option(1.0, "Seconds between two requests to one host; one runs at a time.")
    timeout: Annotated[float, Gt(0)] = option(30.0, "Seconds that one request may take in all.")
    retries: Annotated[int, Ge(0), Le(10)] = option(2, "Further tries after no answer, 429 or 5xx, ever more apart.")
    url_column: str = option("url", "Column that holds the URL or domain.")
    subset: str | None = option(None, "Configuration name of a Hub data set.")
    hub_split: str = option("train", "Split of a Hub data set to read.")


@dataclass(frozen=True, kw_only=True)
class RobotsImportConfig(StageConfig):
    """Add robots.txt files that are on disk to a store: directories, JSONL, WARC."""

    path: Path = argument(
        "Directory with DOMAIN.robots.txt or DOMAIN/robots.txt files, JSONL (.gz, .zst), WARC (.gz), or a directory "
        "of JSONL or WARC files.",
        keyed=False,
    )
    out: Path = required("Store to fill; made if it does not exist.", keyed=False)
    date: str | None = option(None, "Date of captures that carry none, such as 2025-06-30. Default: the files' own.")

    def check(self) -> None:
        if self.date is not None:
            try:
                datetime.fromisoformat(self.date)
            except ValueError:
                raise ConfigError(f"--date {self.date} is not a date such as 2025-06-30.") from None


@dataclass(frozen=True, kw_only=True)
class TermsConfig(WritingConfig):
    """Let a judge of your choice read terms of service; its answers are annotations for `data audit --terms`."""

    pages: Path = argument("JSONL with a domain and the text of a terms page on every line.", keyed=False)
    judge: str = required(
        "module:function called with domain and text, or an OpenAI-compatible endpoint as https://host/v1#model "
        "(its key in OPENAI_API_KEY)."
    )
    domain_column: str = option("domain", "Key that holds the domain.")
    text_column: str = option("text", "Key that holds the text.")
    timeout: Annotated[float, Gt(0)] = option(120.0, "Seconds that one answer may take.", keyed=False)

"""Terms of service read by a judge of the user's choice, page by page; what is written, `data audit --terms` takes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minitron_cli.config.audit import TermsConfig
from minitron_cli.data.consent.terms import Terms
from minitron_cli.data.consent.terms_judge import load_judge
from minitron_cli.errors import InputError
from minitron_cli.manifest import StageOutput, fingerprint
from minitron_cli.runtime.progress import Progress, say

ANNOTATIONS = "annotations.jsonl"
STATE = "state.answers.jsonl"


def run_terms(config: TermsConfig) -> dict[str, Any]:
    """Ask the judge about every page; a killed run asks only about those that have no answer yet.

    Raises:
        UserError: the pages or the judge are wrong; nothing was written.
        RunError: the judge failed midway; its answers so far are kept.
    """
    judge = load_judge(config.judge, config.timeout)
    pages = list(_pages(config))
    if not pages:
        raise InputError(f"{config.pages} holds no pages; write one JSON object per line with a domain and a text.")
    inputs = {"pages": fingerprint(config.pages)}
    output = StageOutput(config.out, "terms", config, inputs, force=config.force, resumable=True)
    if output.result is not None:
        say(f"{config.out} is up to date.")
        return output.result
    with output:
        state = output.partial / STATE
        answers = _answers(state)
        with (
            state.open("a", encoding="utf-8") as file,
            Progress("terms", len(pages), "pages", start=len(answers)) as progress,
        ):
            for domain, text in pages[len(answers) :]:
                answers.append(_row(judge(domain, text)))
                file.write(json.dumps(answers[-1], ensure_ascii=False) + "\n")
                file.flush()
                progress.advance(note=domain)
        with (output.partial / ANNOTATIONS).open("w", encoding="utf-8") as file:
            for answer in answers:
                for category, code in answer["codes"].items():
                    row = {"domain": answer["domain"], "category": category, "code": code}
                    file.write(json.dumps(row | {"evidence": answer["evidence"].get(category, "")}) + "\n")
        domains = {answer["domain"] for answer in answers}
        output.commit({"out": str(config.out), "pages": len(pages), "domains": len(domains), "judge": config.judge})
    assert output.result is not None
    return output.result


def _pages(config: TermsConfig) -> Iterator[tuple[str, str]]:
    """(domain, text) of every line."""
    try:
        lines = config.pages.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{config.pages} cannot be read ({error}); give a JSONL file in UTF-8.") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            yield str(row[config.domain_column]).strip().lower(), str(row[config.text_column])
        except (ValueError, TypeError, KeyError):
            raise InputError(
                f"{config.pages}: line {number} is no JSON object with '{config.domain_column}' and "
                f"'{config.text_column}'; choose them with --domain-column and --text-column."
            ) from None


def _answers(state: Path) -> list[dict[str, Any]]:
    """Answers of a killed run; a last line that was cut short is taken off the file."""
    if not state.exists():
        return []
    whole = state.read_bytes()
    whole = whole[: whole.rfind(b"\n") + 1]
    os.truncate(state, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def _row(terms: Terms) -> dict[str, Any]:
    return {"domain": terms.domain, "codes": dict(terms.codes), "evidence": dict(terms.evidence)}

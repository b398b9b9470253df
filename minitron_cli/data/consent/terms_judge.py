"""Judges that read terms of service: a function of the user's, or a model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import importlib
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from minitron_cli.data.consent.terms import CATEGORIES, Terms, check_codes
from minitron_cli.errors import ConfigError, InputError, RunError

TermsJudge = Callable[[str, str], Terms]
"""(domain, text of the terms) to codes with evidence."""

KEY_VARIABLE = "OPENAI_API_KEY"
"""Environment variable with the endpoint's key; absent for endpoints that ask for none."""

MAX_CHARACTERS = 100_000
"""Longer terms are refused rather than cut: the clause that matters may be the last."""


def load_judge(name: str, timeout: float = 120.0) -> TermsJudge:
    """`module:function`, or the base URL of an OpenAI-compatible endpoint with the model: `https://host/v1#model`.

    A function gets (domain, text) and returns `Terms`, or a mapping of category to code or to {code, evidence}.

    Raises:
        ConfigError: it is neither, cannot be imported, or is no function.
    """
    if name.startswith(("http://", "https://")):
        base, _, model = name.partition("#")
        if not model or not urlsplit(base).hostname:
            raise ConfigError(f"'{name}' names no model; write the endpoint as https://host/v1#model.")
        return lambda domain, text: _ask(base.rstrip("/"), model, domain, text, timeout)
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise ConfigError(f"'{name}' is no judge; give module:function, or an endpoint as https://host/v1#model.")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"'{name}' cannot be loaded ({error}); give module:function of an installed module."
        ) from None
    if not callable(function):
        raise ConfigError(f"'{name}' is no function; it must take a domain and a text.")
    return lambda domain, text: _terms(domain, function(domain, text), name)


def instructions() -> str:
    """What a model is told: the taxonomy with its codes, and the form of the answer."""
    lines = [
        "You classify the terms of service of one website. For each category choose the one code the text supports."
    ]
    for category, meanings in CATEGORIES.items():
        lines.append(f"{category}: " + "; ".join(f"{code} = {text}" for code, text in enumerate(meanings, 1)))
    lines.append(
        'Answer with one JSON object: each category maps to {"code": number, "evidence": "the sentence that says so, '
        'word for word, or empty"}. When the text says nothing about a category, choose its last code.'
    )
    return "\n".join(lines)


def _ask(base: str, model: str, domain: str, text: str, timeout: float) -> Terms:
    """One question to a chat endpoint.

    Raises:
        InputError: the terms are too long.
        RunError: the endpoint does not answer, or not in the form asked for.
    """
    if len(text) > MAX_CHARACTERS:
        raise InputError(
            f"{domain}: terms of {len(text):,} characters exceed {MAX_CHARACTERS:,}; annotate them by hand."
        )
    messages = [{"role": "system", "content": instructions()}, {"role": "user", "content": text}]
    body = {"model": model, "messages": messages, "temperature": 0, "response_format": {"type": "json_object"}}
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{base}/chat/completions", json.dumps(body).encode("utf-8"), headers)
    try:
        with _OPENER.open(request, timeout=timeout) as response:
            answer = json.load(response)
        content = json.loads(answer["choices"][0]["message"]["content"])
    except urllib.error.HTTPError as error:  # its body could quote the key
        hint = f"; is {KEY_VARIABLE} right?" if error.code in (401, 403) else ""
        raise RunError(f"{base} answered {error.code} when asked about {domain}{hint}") from None
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise RunError(f"{base} gave no usable answer about {domain} ({type(error).__name__}).") from None
    try:
        return _terms(domain, content, model)
    except InputError as error:
        raise RunError(f"{error} The model does not keep to the form asked for.") from None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key goes to the host that the user named, and nowhere else."""

    def redirect_request(self, *arguments: Any, **options: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _terms(domain: str, answer: Any, judge: str) -> Terms:
    """A judge's answer as terms.

    Raises:
        InputError: it has another form.
    """
    if isinstance(answer, Terms):
        return Terms(domain, check_codes(answer.codes, f"{judge} about {domain}"), dict(answer.evidence))
    if not isinstance(answer, Mapping):
        raise InputError(f"{judge} about {domain}: the answer is {type(answer).__name__}, not category to code.")
    entries = {str(key): value if isinstance(value, Mapping) else {"code": value} for key, value in answer.items()}
    codes = check_codes({key: value.get("code") for key, value in entries.items()}, f"{judge} about {domain}")
    return Terms(
        domain, codes, {key: str(value["evidence"]) for key, value in entries.items() if value.get("evidence")}
    )

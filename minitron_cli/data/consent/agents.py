"""The agents that robots.txt files name: operator and purpose, from the shipped file or one of the user's."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Self

import yaml

from minitron_cli.errors import ConfigError, InputError

PURPOSES = ("training", "search", "user_fetch", "archive", "other")

_FUNCTIONS = (
    ("other", r"undocumented|unclear"),
    ("user_fetch", r"assistant|user-initiated|user queries|user prompts|\bagents?\b"),
    ("training", r"\btrain|\bllms?\b|machine learning|\bai (llm |data )?scraper|scrapes data (to|for)"),
    ("search", r"\bsearch"),
    ("archive", r"archiv"),
)
"""Purpose by words in the free text that ai.robots.txt calls `function`; the first line that matches counts.

"AI Assistants" and "AI Agents" fetch for a user, "AI Data Scrapers" collect for training. "AI Data Providers", who sell
what they collect, and all that the text leaves open stay "other": an audit counts them when they are named.
"""

_KEYS = {"name", "operator", "purpose", "recognised", "organisation", "source"}


@dataclass(frozen=True, slots=True)
class Agent:
    """One product token.

    `recognised`: whether its operator says that the agent exists and is theirs. `organisation`: the row of the domain
    table it counts in (Consent in Crisis, Table 5); None: in no row. `source`: where the facts come from.
    """

    name: str
    operator: str
    purpose: str
    recognised: bool = True
    organisation: str | None = None
    source: str = ""


ANY = Agent("*", "any", "training", source="agents that no group of a file names")


class Agents:
    """A list of agents. `version`: of the data file; `origin`: its path, or "shipped"."""

    def __init__(self, agents: Iterable[Agent], version: str, origin: str) -> None:
        self._agents = tuple(agents)
        self.version, self.origin = version, origin

    @classmethod
    def shipped(cls) -> Self:
        """The list that comes with the package."""
        text = resources.files("minitron_cli").joinpath("assets", "agents.yaml").read_text("utf-8")
        return cls._from_yaml(yaml.safe_load(text), "shipped")

    @classmethod
    def load(cls, path: Path) -> Self:
        """A list in our YAML layout, or the `robots.json` of ai.robots.txt.

        Raises:
            InputError: the file is neither, or an entry is wrong.
        """
        try:
            text = path.read_text("utf-8-sig")
            data = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); give a list of agents.") from None
        except (ValueError, yaml.YAMLError, RecursionError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{path}: neither JSON nor YAML ({reason}); give a list of agents.") from None
        if isinstance(data, Mapping) and "agents" in data:
            return cls._from_yaml(data, str(path))
        if isinstance(data, Mapping) and data and all(isinstance(entry, Mapping) for entry in data.values()):
            return cls([_imported(str(name), entry) for name, entry in _unique(data).items()], "robots.json", str(path))
        raise InputError(
            f"{path}: no list of agents; give a YAML file with `agents:`, or the robots.json of ai.robots.txt."
        )

    @classmethod
    def _from_yaml(cls, data: Mapping[str, Any], origin: str) -> Self:
        entries = data["agents"]
        if not isinstance(entries, list) or not entries:
            raise InputError(f"{origin}: `agents` is not a list; write one entry with `name` and `purpose` per agent.")
        agents = [_entry(entry, f"{origin}: agent {number}") for number, entry in enumerate(entries, 1)]
        names = [agent.name.lower() for agent in agents]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"{origin}: the agent '{twice}' is listed twice (case does not count); remove one entry.")
        return cls(agents, str(data.get("version", "none")), origin)

    def all(self) -> list[Agent]:
        """Every agent, in the order of the file."""
        return list(self._agents)

    def training(self) -> list[Agent]:
        """The agents that collect text for training: the default of an audit."""
        return [agent for agent in self._agents if agent.purpose == "training"]

    def select(self, names: Sequence[str]) -> list[Agent]:
        """The named agents in the order given, case ignored and each once; `*` stands for agents that no group names.

        Raises:
            ConfigError: a name is unknown.
        """
        known = {agent.name.lower(): agent for agent in self._agents} | {"*": ANY}
        chosen: dict[str, Agent] = {}
        for name in names:
            agent = known.get(name.strip().lower())
            if agent is None:
                near = difflib.get_close_matches(name.strip().lower(), known, n=1, cutoff=0.0)
                raise ConfigError(
                    f"'{name}' is not in the list of {len(self._agents)} agents; the nearest is "
                    f"'{known[near[0]].name}' (add others with a list of your own)."
                )
            chosen[agent.name] = agent
        return list(chosen.values())

    def organisations(self) -> dict[str, list[Agent]]:
        """Organisation to its agents: rows of the domain table, in the order of the file."""
        rows: dict[str, list[Agent]] = {}
        for agent in self._agents:
            if agent.organisation is not None:
                rows.setdefault(agent.organisation, []).append(agent)
        return rows


def _entry(entry: Any, where: str) -> Agent:
    """One agent of our layout.

    Raises:
        InputError: a key is missing, unknown or of the wrong kind.
    """
    if not isinstance(entry, Mapping):
        raise InputError(f"{where} is not a mapping; write `name`, `operator` and `purpose`.")
    if unknown := sorted(map(str, set(entry) - _KEYS)):
        raise InputError(f"{where} has the unknown key '{unknown[0]}'; known are {', '.join(sorted(_KEYS))}.")
    for key in _KEYS - {"recognised"}:
        if not isinstance(entry.get(key, ""), str):
            raise InputError(f"{where}: `{key}` is not text; put it in quotes.")
    name, purpose = entry.get("name", "").strip(), entry.get("purpose", "")
    if not re.match(r"[A-Za-z0-9_-]", name):
        raise InputError(f"{where} has no `name` that a robots.txt could hold; it starts with a letter, digit, _ or -.")
    if purpose not in PURPOSES:
        raise InputError(f"{where} ({name}): purpose '{purpose}' is none of {', '.join(PURPOSES)}.")
    recognised = entry.get("recognised", True)
    if not isinstance(recognised, bool):
        raise InputError(f"{where} ({name}): `recognised` is neither true nor false.")
    row = entry.get("organisation")
    return Agent(name, entry.get("operator", "unknown"), purpose, recognised, row, entry.get("source", ""))


def _imported(name: str, entry: Mapping[str, Any]) -> Agent:
    """One agent of ai.robots.txt; its operator, a Markdown link at times, is also its organisation."""
    operator = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", str(entry.get("operator", "unknown"))).strip()
    clear = bool(operator) and not operator.lower().startswith(("unclear", "unknown"))
    function = str(entry.get("function", ""))
    return Agent(
        name, operator if clear else "unknown", purpose_of(function), clear, operator if clear else None, function
    )


def purpose_of(function: str) -> str:
    """Purpose of an agent by the `function` text of ai.robots.txt; "other" when the text does not tell."""
    text = function.lower()
    return next((purpose for purpose, words in _FUNCTIONS if re.search(words, text)), "other")


def _unique(data: Mapping[str, Any]) -> dict[str, Any]:
    """Entries by name without those that repeat an earlier name in another case."""
    seen: dict[str, tuple[str, Any]] = {}
    for name, entry in data.items():
        seen.setdefault(str(name).lower(), (name, entry))
    return dict(seen.values())

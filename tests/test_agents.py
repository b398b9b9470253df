"""The lists of agents: the shipped one, ai.robots.txt, and what a wrong one is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import SHARED

from minitron_cli.data.consent.agents import ANY, PURPOSES, Agents, purpose_of
from minitron_cli.data.robots import RobotsTxt
from minitron_cli.errors import ConfigError, InputError

ROBOTS_JSON = SHARED / "robots" / "ai_robots_txt" / "robots.json"

TABLE = {
    "OpenAI": ["GPTBot", "ChatGPT-User"],
    "Google (AI)": ["Google-Extended"],
    "Google Search": ["Googlebot"],
    "Common Crawl": ["CCBot"],
    "Anthropic": ["ClaudeBot"],
    "False Anthropic": ["anthropic-ai", "Claude-Web"],
    "Meta": ["FacebookBot"],
    "Cohere": ["cohere-ai"],
    "Internet Archive": ["ia_archiver"],
}
"""Consent in Crisis, Table 5."""


def test_shipped_list() -> None:
    agents = Agents.shipped()
    assert agents.version and agents.origin == "shipped"
    assert {name: [agent.name for agent in row] for name, row in agents.organisations().items()} == TABLE
    assert len({agent.name.lower() for agent in agents.all()}) == len(agents.all()) >= 40
    assert {agent.purpose for agent in agents.all()} == set(PURPOSES)
    assert all(agent.source and agent.operator for agent in agents.all())
    unrecognised = {agent.name for agent in agents.all() if not agent.recognised}
    assert {"anthropic-ai", "Claude-Web", "cohere-ai"} <= unrecognised and "GPTBot" not in unrecognised
    training = {agent.name for agent in agents.training()}
    assert {"GPTBot", "CCBot", "ClaudeBot", "Google-Extended", "Applebot-Extended"} <= training
    assert not training & {"Applebot", "Googlebot", "ChatGPT-User", "OAI-SearchBot", "ia_archiver", "*"}


def test_every_shipped_name_binds_its_own_group_and_no_other() -> None:
    agents = Agents.shipped().all()
    for agent in agents:
        robots = RobotsTxt.parse(f"User-agent: {agent.name}\nDisallow: /\n")
        assert [other.name for other in agents if robots.group_of(other.name) >= 0] == [agent.name]


def test_select() -> None:
    agents = Agents.shipped()
    assert [agent.name for agent in agents.select(["ccbot", " GPTBot", "*", "CCBot"])] == ["CCBot", "GPTBot", "*"]
    assert agents.select(["*"]) == [ANY]
    with pytest.raises(ConfigError, match=r"'GTPBot' is not in the list of \d+ agents; the nearest is 'GPTBot'"):
        agents.select(["GTPBot"])
    with pytest.raises(ConfigError, match="'' is not in the list"):
        agents.select([""])


def test_own_list(tmp_path: Path) -> None:
    path = tmp_path / "agents.yaml"
    path.write_text(
        "version: 3\nagents:\n- {name: MyBot, operator: We, purpose: training, organisation: Us}\n", "utf-8"
    )
    agents = Agents.load(path)
    assert agents.version == "3" and agents.origin == str(path)
    assert [agent.name for agent in agents.training()] == ["MyBot"] and list(agents.organisations()) == ["Us"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("agents: []", "`agents` is not a list"),
        ("agents: [x]", "agent 1 is not a mapping"),
        ("agents: [{name: A, purpose: train}]", "purpose 'train' is none of training"),
        ("agents: [{name: '*', purpose: other}]", "no `name` that a robots.txt could hold"),
        ("agents: [{name: A, purpose: other, operater: B}]", "unknown key 'operater'"),
        ("agents: [{name: 5, purpose: other}]", "`name` is not text"),
        ("agents: [{name: A, purpose: other, recognised: 1}]", "neither true nor false"),
        ("agents: [{name: A, purpose: other}, {name: a, purpose: other}]", "'a' is listed twice"),
        ("hello", "no list of agents"),
        ("a: [", "neither JSON nor YAML"),
        ("", "no list of agents"),
    ],
)
def test_wrong_lists(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "agents.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(InputError, match=message.replace("*", r"\*")) as error:
        Agents.load(path)
    assert "\n" not in str(error.value)


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Agents.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("function", "purpose"),
    [
        ("AI Assistants", "user_fetch"),
        ("AI Data Scrapers", "training"),
        ("AI Data Providers", "other"),
        ("AI Search Crawlers", "search"),
        ("AI research crawler", "other"),
        ("LLM training.", "training"),
        ("Scrapes data to train OpenAI's products.", "training"),
        ("Undocumented AI Agents", "other"),
        ("Unclear at this time.", "other"),
        ("Website archiving", "archive"),
        ("", "other"),
    ],
)
def test_purpose_from_text(function: str, purpose: str) -> None:
    assert purpose_of(function) == purpose


def test_robots_json_layout(tmp_path: Path) -> None:
    path = tmp_path / "robots.json"
    link = {"operator": "[Op](https://op.example)", "function": "LLM training."}
    path.write_text(json.dumps({"Bot": link, "bot": {}, "Odd Bot": {"operator": "Unclear at this time."}}), "utf-8")
    first, second = Agents.load(path).all()
    assert (first.name, first.operator, first.purpose, first.recognised) == ("Bot", "Op", "training", True)
    assert (second.name, second.operator, second.purpose, second.recognised) == ("Odd Bot", "unknown", "other", False)


@pytest.mark.shared_data
@pytest.mark.skipif(not ROBOTS_JSON.is_file(), reason="ai.robots.txt is not here")
def test_ai_robots_txt() -> None:
    agents = Agents.load(ROBOTS_JSON)
    names = {agent.name.lower(): agent for agent in agents.all()}
    assert len(agents.all()) == len(names) > 150
    expected = {"gptbot": "training", "ccbot": "training", "chatgpt-user": "user_fetch", "oai-searchbot": "search"}
    assert {name: names[name].purpose for name in expected} == expected
    assert names["gptbot"].operator == "OpenAI"
    ours = {agent.name.lower(): agent.purpose for agent in Agents.shipped().all()}
    differ = {
        name for name in names.keys() & ours.keys() if {names[name].purpose, ours[name]} == {"training", "search"}
    }
    assert differ <= {"youbot"}  # it says both of itself

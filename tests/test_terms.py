"""Terms of service and the domain view: taxonomies, annotations, the mismatch table, and judges."""

from __future__ import annotations

import csv
import json
import random
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from minitron_cli.config.audit import TermsConfig
from minitron_cli.data.consent.domain import EXTENTS, LEVELS, extent, level, organisation_extent
from minitron_cli.data.consent.terms import CATEGORIES, Terms, merge, mismatch, read_annotations
from minitron_cli.data.consent.terms_judge import KEY_VARIABLE, MAX_CHARACTERS, load_judge
from minitron_cli.data.consent.terms_stage import run_terms
from minitron_cli.data.robots import RobotsTxt
from minitron_cli.errors import ConfigError, InputError, RunError

# --- the domain view --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ("", "none"),
        ("Disallow:", "none"),
        ("Disallow: /\nAllow: /", "none"),
        ("Disallow: foo", "none"),
        ("Allow: /a", "none"),
        ("Disallow: /a\nAllow: /a", "none"),
        ("Disallow: /a", "some"),
        ("Disallow: /*.pdf$", "some"),
        ("Disallow: /a$\nAllow: /a*", "none"),
        ("Disallow: /aa$\nAllow: /a*", "some"),
        ("Disallow: /\nAllow: /$", "some"),
        ("Disallow: /\nAllow: /public/", "some"),
        ("Disallow: /\nAllow: /*.txt$", "some"),
        ("Disallow: /x\nAllow: /*", "none"),
        ("Disallow: /xy\nAllow: /*", "some"),
        ("Disallow: /", "full"),
        ("Disallow: /*", "full"),
        ("Disallow: *", "full"),
        ("Disallow: /*\nAllow: /", "full"),
        ("Disallow: /\nAllow: /robots.txt", "full"),
        ("Disallow: /\nAllow: /robots.txt$", "full"),
        ("Disallow: /\nDisallow: /public/\nAllow: /public", "some"),
        ("Disallow: /\nDisallow: /public*\nAllow: /public", "full"),
    ],
)
def test_extent(rules: str, expected: str) -> None:
    robots = RobotsTxt.parse(f"User-agent: *\nDisallow: /x\n\nUser-agent: a\nUser-agent: b\n{rules}\n")
    assert extent(robots, "a") == extent(robots, "B/1.0") == expected
    assert extent(robots, "c") == "some"
    assert extent(RobotsTxt.parse(f"User-agent: a\n{rules}\n"), "c") == "none"


def test_extent_agrees_with_many_paths() -> None:
    """Slow check: what is called full or none holds for every path over a small alphabet, and some is mixed."""
    paths = ["/" + "".join(random.Random(number).choices("abz/", k=number % 5)) for number in range(400)]
    for number in range(300):
        rng = random.Random(number)
        rules = [
            rng.choice(("Allow: ", "Disallow: "))
            + rng.choice(("/", "/", "/*", "*"))
            + "".join(rng.choices(("a", "b", "*", "/", "$"), k=rng.randint(0, 3)))
            for _ in range(rng.randint(1, 4))
        ]
        robots = RobotsTxt.parse("\n".join(["User-agent: *", *rules]))
        seen = {robots.verdict(f"https://h{path}", "x").allowed for path in paths}
        found = extent(robots, "x")
        assert found != "full" or seen == {False}, rules
        assert found != "none" or seen == {True}, rules


def test_organisation_takes_the_strictest() -> None:
    robots = RobotsTxt.parse("User-agent: a\nDisallow: /\n\nUser-agent: b\nDisallow: /x\n")
    assert [organisation_extent(robots, names) for names in ([], ["c"], ["b", "c"], ["b", "a"])] == [
        *("none", "none", "some", "full")
    ]
    assert EXTENTS == ("none", "some", "full")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (None, 1),
        ("<html>404</html>", 1),
        ("", 2),
        ("User-agent: *\nDisallow:", 2),
        ("Sitemap: https://h/s.xml", 3),
        ("User-agent: *\nCrawl-delay: 1\nDisallow:\nSitemap: https://h/s.xml", 4),
        ("User-agent: *\nDisallow: /*?s=\nDisallow: /search", 5),
        ("User-agent: *\nDisallow: /search\nDisallow: /admin/", 6),
        ("User-agent: *\nDisallow: /search\nDisallow: /admin/\nAllow: /admin/", 5),
        ("User-agent: *\nDisallow: /", 7),
        ("User-agent: *\nDisallow: /\n\nUser-agent: a\nCrawl-delay: 5\nDisallow:", 4),
        ("User-agent: a\nDisallow: /admin/\n\nUser-agent: *\nDisallow: /", 6),
    ],
)
def test_level(body: str | None, expected: int) -> None:
    assert level(RobotsTxt.parse(body) if body is not None else None, "a") == expected
    assert len(LEVELS) == 7


# --- annotations ------------------------------------------------------------------------------------------------------

ROWS = [
    {"domain": "News.example", "category": "crawling_ai", "code": 4, "evidence": "with permission"},
    {"domain": "news.example", "category": "crawling_ai", "code": 1, "evidence": "no robots, no models"},
    {"domain": "news.example", "category": "license", "code": 2, "evidence": ""},
    {"domain": "shop.example", "category": "competing", "code": 1, "evidence": "do not compete"},
    {"domain": "shop.example", "category": "competing", "code": 3, "evidence": "both"},
]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_annotations(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"terms.{kind}"
    if kind == "csv":
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n", "utf-8")
    assert read_annotations(path) == {
        "news.example": Terms(
            "news.example", {"crawling_ai": 1, "license": 2}, {"crawling_ai": "no robots, no models"}
        ),
        "shop.example": Terms("shop.example", {"competing": 3}, {"competing": "both"}),
    }


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.jsonl", '{"domain": "a", "category": "licence", "code": 1}', "line 1: 'licence' is no category"),
        ("t.jsonl", '{"domain": "a", "category": "license", "code": 4}', "license has the code '4'; give 1 to 3"),
        ("t.jsonl", '{"domain": "a", "category": "license", "code": "²"}', "has the code '²'"),
        ("t.jsonl", '\n{"domain": "a", "category": "license"}', "line 2 has no 'code'"),
        ("t.jsonl", "[1]", "line 1 is no JSON object"),
        ("t.jsonl", "domain,category", "neither CSV"),
        ("t.jsonl", "", "holds no annotations"),
        ("t.csv", "domain,category,code\n,license,1", "line 2 has no 'domain'"),
        ("t.csv", "url,code\na,1", "has no 'domain'"),
    ],
)
def test_wrong_annotations(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text, "utf-8")
    with pytest.raises(InputError) as error:
        read_annotations(tmp_path / name)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_unreadable_annotations(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"domain\n\xff\xfe")
    for name in ("none.csv", "t.csv"):
        with pytest.raises(InputError):
            read_annotations(tmp_path / name)


def test_merge_keeps_the_strictest_of_each_category() -> None:
    pages = [Terms("d", {"crawling_ai": 5, "competing": 4}, {}), Terms("d", {"crawling_ai": 2, "competing": 2}, {})]
    assert merge(pages).codes == merge(reversed(pages)).codes == {"crawling_ai": 2, "competing": 2}


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ({"crawling_ai": 3, "license": 1}, "no AI, crawling not mentioned"),
        ({"crawling_ai": 4, "license": 1, "competing": 1}, "personal, non-commercial or research use only"),
        ({"crawling_ai": 4, "license": 2, "competing": 1}, "no competing service"),
        ({"crawling_ai": 4, "license": 2, "competing": 4}, "conditional"),
        ({"crawling_ai": 5}, "none"),
        ({}, "not annotated"),
    ],
)
def test_headline(codes: dict[str, int], expected: str) -> None:
    assert Terms("d", codes, {}).headline() == expected


def test_mismatch() -> None:
    terms = {name: Terms(name, {"crawling_ai": code}, {}) for name, code in {"a": 1, "b": 5, "c": 2, "d": 4}.items()}
    terms["e"] = Terms("e", {"license": 1}, {})
    tokens = {"a": 40.0, "b": 10.0, "c": 20.0, "d": 20.0, "e": 5.0, "f": 5.0}
    table = mismatch(tokens, {"a": "none", "b": "full", "c": "no_robots", "d": "some", "e": "none"}, terms)
    assert table.total == 100
    assert table.cells["none"] == {0: 5, 1: 40, 2: 0, 3: 0, 4: 0, 5: 0}
    assert table.cells["unknown"][0] == 5
    assert table.terms_stricter() == pytest.approx(0.6) and table.robots_stricter() == pytest.approx(0.3)
    empty = mismatch({}, {}, {})
    assert empty.total == empty.terms_stricter() == empty.robots_stricter() == 0


# --- judges -----------------------------------------------------------------------------------------------------------


def test_function_as_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_judge.py").write_text(
        "def fair(domain, text):\n    return {'license': {'code': len(text), 'evidence': text}, 'competing': 4}\n"
        "def wrong(domain, text):\n    return 'no'\nnumber = 5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    judged = load_judge("my_judge:fair")("d", "ab")
    assert judged == Terms("d", {"license": 2, "competing": 4}, {"license": "ab"})
    with pytest.raises(InputError, match="the code '5'; give 1 to 3"):
        load_judge("my_judge:fair")("d", "abcde")
    with pytest.raises(InputError, match="the answer is str"):
        load_judge("my_judge:wrong")("d", "ab")
    for name in (
        "my_judge",
        "my_judge:",
        "my_judge:none",
        "my_judge:number",
        "no_such_module:f",
        "http://h/v1",
        "http://#m",
    ):
        with pytest.raises(ConfigError):
            load_judge(name)
    sys.modules.pop("my_judge")


def test_pages_become_annotations_and_a_stopped_run_asks_no_page_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stopping_judge.py").write_text(
        "asked = []\nlimit = 2\n"
        "def judge(domain, text):\n"
        "    if len(asked) == limit:\n        raise KeyboardInterrupt\n"
        "    asked.append(domain)\n    return {'license': {'code': len(text), 'evidence': text}}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    pages = tmp_path / "pages.jsonl"
    rows = [("a.com", "x"), ("b.com", "xx"), ("a.com", "xxx"), ("c.com", "xx")]
    pages.write_text("".join(json.dumps({"domain": domain, "text": text}) + "\n" for domain, text in rows))
    config = TermsConfig(pages=pages, judge="stopping_judge:judge", out=tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        run_terms(config)
    with (tmp_path / "out.partial" / "state.answers.jsonl").open("a") as state:
        state.write('{"domain": "a.c')  # a line that a kill cut short
    module = sys.modules.pop("stopping_judge")
    (tmp_path / "stopping_judge.py").write_text((tmp_path / "stopping_judge.py").read_text().replace("2", "9"))
    assert run_terms(config) == {
        "out": str(tmp_path / "out"), "pages": 4, "domains": 3, "judge": "stopping_judge:judge"
    }  # fmt: skip
    assert module.asked + sys.modules.pop("stopping_judge").asked == ["a.com", "b.com", "a.com", "c.com"]
    found = read_annotations(tmp_path / "out" / "annotations.jsonl")
    assert {domain: terms.codes for domain, terms in found.items()} == {
        "a.com": {"license": 1}, "b.com": {"license": 2}, "c.com": {"license": 2}
    }  # fmt: skip
    for text, words in (("", "holds no pages"), ("[1]\n", "line 1"), ('{"domain": "a"}\n', "line 1")):
        pages.write_text(text)
        with pytest.raises(InputError, match=words):
            run_terms(config)


class Endpoint(BaseHTTPRequestHandler):
    """Answers as told by `answer`: a status, or the content of the model's message."""

    answer: Any = None
    asked: dict[str, Any] = {}  # noqa: RUF012

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Endpoint.asked = {"path": self.path, "body": body, "key": self.headers.get("Authorization")}
        status = Endpoint.answer if isinstance(Endpoint.answer, int) else 200
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"message": {"content": Endpoint.answer}}]}).encode())

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_endpoint_as_judge(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "sk-secret")
    judge = load_judge(f"{endpoint}/#small-model")
    Endpoint.answer = json.dumps({"crawling_ai": {"code": 2, "evidence": "Do not scrape."}, "license": {"code": 3}})
    assert judge("d", "Do not scrape.") == Terms(
        "d", {"crawling_ai": 2, "license": 3}, {"crawling_ai": "Do not scrape."}
    )
    assert Endpoint.asked["path"] == "/v1/chat/completions" and Endpoint.asked["key"] == "Bearer sk-secret"
    assert Endpoint.asked["body"]["model"] == "small-model"
    told = Endpoint.asked["body"]["messages"][0]["content"]
    assert all(meaning in told for meanings in CATEGORIES.values() for meaning in meanings)
    with pytest.raises(InputError, match="exceed"):
        judge("d", "x" * (MAX_CHARACTERS + 1))


@pytest.mark.parametrize("answer", [401, 302, 500, "I think it is fine.", "[]", '{"license": 9}', '{"mood": 1}', None])
def test_endpoint_that_fails(endpoint: str, monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "sk-secret")
    Endpoint.answer = answer
    with pytest.raises(RunError) as error:
        load_judge(f"{endpoint}#m")("d", "text")
    assert "sk-secret" not in str(error.value)
    assert (KEY_VARIABLE in str(error.value)) == (answer == 401)


def test_endpoint_that_is_not_there() -> None:
    with pytest.raises(RunError, match="no usable answer about d"):
        load_judge("http://127.0.0.1:9/v1#m", timeout=2)("d", "text")

"""The consent audit: verdicts against a slow reference, formats, determinism, the filter, and everything malformed."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import SHARED
from helpers_audit import AGENTS, BLOCK_AI, OPEN, audit, make_store, site, slow_audit, write_jsonl
from helpers_tokenizer import make_tokenizer

from minitron_cli.config.audit import AuditConfig, RobotsImportConfig
from minitron_cli.config.data import DataConfig
from minitron_cli.data.consent import domains as domains_module
from minitron_cli.data.consent import pieces as pieces_module
from minitron_cli.data.consent.imports import run_import
from minitron_cli.data.consent.policy import LeastRecent
from minitron_cli.data.consent.stage import run_audit
from minitron_cli.data.consent.urls import authority_of, host_of, other_scheme, split_url
from minitron_cli.data.prepare import run_data
from minitron_cli.errors import ConfigError, InputError, UserError
from minitron_cli.report.stage import write_report

STATUS = ("allowed", "disallowed", "no_robots", "unknown", "bad_url")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://Example.COM/a?b#c", ("https://example.com", "/a?b")),
        ("http://example.com:80", ("http://example.com", "/")),
        ("https://example.com:443?q=1", ("https://example.com", "/?q=1")),
        ("https://example.com:8443/", ("https://example.com:8443", "/")),
        ("HTTPS://user:pass@example.com./x", ("https://example.com", "/x")),
        ("example.com/a", ("https://example.com", "/a")),
        ("//example.com/a", ("https://example.com", "/a")),
        (" www.example.co.uk ", ("https://www.example.co.uk", "/")),
        ("https://bücher.example/ü", ("https://xn--bcher-kva.example", "/ü")),
        ("https://faß.example/", ("https://xn--fa-hia.example", "/")),
        ("http://例え。テスト/", ("http://xn--r8jz45g.xn--zckzah", "/")),
        ("http://[2001:DB8::1]:8080/x", ("http://[2001:db8::1]:8080", "/x")),
        ("http://127.0.0.1:0080/x", ("http://127.0.0.1", "/x")),
        ("http://a_b.example-.com/", ("http://a_b.example-.com", "/")),
        ("http://localhost/x", ("http://localhost", "/x")),
    ],
)  # fmt: skip
def test_urls(url: str, expected: tuple[str, str]) -> None:
    assert split_url(url) == expected
    assert authority_of(expected[0] + expected[1]) == expected[0], "normalising twice changes nothing"


@pytest.mark.parametrize(
    "url",
    [
        None, 7, "", "   ", "nodot", "http://", "http:///path", "ftp://example.com/", "mailto:a@example.com",
        "javascript:void(0)", "http://exa mple.com/", "http://example.com:port/", "http://example.com:99999/",
        "http://example.com:0/", "http://[::1", "http://[::g]/", "http://1.2.3.999/", "http://a..b.com/",
        "http://" + "a" * 64 + ".com/", "http://" + "a.b" * 100 + ".com/", "http://xn--\udcff.com/", "https://\u200d.com/",
    ],
)  # fmt: skip
def test_malformed_urls(url: object) -> None:
    assert split_url(url) is None


def test_hosts_and_schemes() -> None:
    assert host_of("https://example.com:8443") == "example.com"
    assert host_of("http://[::1]:80") == "[::1]"
    assert other_scheme("https://example.com") == "http://example.com"
    assert other_scheme("https://example.com:8443") is None


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(
        tmp_path / "store",
        [
            site("https://block.com", BLOCK_AI),
            site("https://open.org", OPEN),
            site("https://none.net", status=404),
            site("https://many.net", status=429),
            site("https://down.net", status=503),
            site("https://dead.net", status=0),
            site("https://html.net", "<!doctype html><title>Log in</title>"),
            site("https://loop.net", status=302),
            site("http://old.com", BLOCK_AI),
            site("https://block.com:8443", OPEN),
        ],
    )


ROWS = [
    ("https://block.com/a", "disallowed", 10),
    ("https://block.com:8443/a", "allowed", 20),
    ("https://open.org/private/x", "allowed", 30),
    ("https://none.net/", "no_robots", 40),
    ("https://many.net/", "unknown", 50),
    ("https://down.net/", "unknown", 60),
    ("https://dead.net/", "unknown", 70),
    ("https://html.net/", "unknown", 80),
    ("https://loop.net/", "unknown", 90),
    ("https://never.seen/", "unknown", 100),
    ("https://old.com/", "unknown", 110),
    ("https://bad host/", "bad_url", 120),
    (None, "bad_url", 130),
]


def corpus(path: Path, *, text: bool = False) -> Path:
    rows: list[dict[str, Any]] = [{"url": url, "n": tokens} for url, _, tokens in ROWS]
    for row in rows if text else []:
        row["text"] = "x" * 4 * row["n"]
    return write_jsonl(path, rows)


def expected_status() -> dict[str, dict[str, int]]:
    table = {status: {"documents": 0, "tokens": 0} for status in STATUS}
    for _, status, tokens in ROWS:
        table[status]["documents"] += 1
        table[status]["tokens"] += tokens
    return table


def test_four_values(store: Path, tmp_path: Path) -> None:
    found = audit(corpus(tmp_path / "c.jsonl"), store, tmp_path / "out", tokens_column="n")
    assert found["documents"] == len(ROWS) and found["tokens"] == sum(row[2] for row in ROWS)
    assert found["status"] == expected_status()
    assert found["agents"]["GPTBot"]["disallowed"] == {"documents": 1, "tokens": 10}
    assert found["agents"]["ClaudeBot"]["disallowed"] == {"documents": 0, "tokens": 0}
    assert found["refused_by"] == {"robots.txt": {"documents": 1, "tokens": 10}}
    rows = pq.read_table(tmp_path / "out/verdicts/c.jsonl.parquet").to_pylist()
    assert [row["status"] for row in rows] == [status for _, status, _ in ROWS]
    first = rows[0]
    assert (first["row"], first["agents"], first["rule"], first["line"]) == (1, "GPTBot, CCBot", "/", 3)
    assert first["fetched_at"].date().isoformat() == "2025-06-15" and rows[9]["fetched_at"] is None
    saved = json.loads((tmp_path / "out/summary.json").read_text())
    assert saved == {key: value for key, value in found.items() if key != "out"}
    assert not list((tmp_path / "out").glob("state.*"))


def test_either_scheme(store: Path, tmp_path: Path) -> None:
    source = corpus(tmp_path / "c.jsonl")
    found = audit(source, store, tmp_path / "out", tokens_column="n", scheme="either")
    assert found["status"]["disallowed"] == {"documents": 2, "tokens": 120}


def test_random_against_slow(tmp_path: Path) -> None:
    """Many hosts, rules and URLs against plain loops over `RobotsTxt.verdict`; all processes give the same bytes."""
    chance = random.Random(0)
    paths = ["/", "/a", "/a/b.html", "/private/x?q=1", "/a%20b", "/ü", "/x/y/z.pdf"]
    bodies: dict[str, tuple[int, bytes]] = {}
    for number in range(60):
        lines = []
        for _ in range(chance.randint(0, 4)):
            lines += [f"User-agent: {chance.choice([*AGENTS, '*', 'Other'])}" for _ in range(chance.randint(1, 3))]
            rules = [
                f"{chance.choice(['Allow', 'Disallow'])}: {chance.choice([*paths, '/*.pdf$', ''])}" for _ in range(3)
            ]
            lines += rules
        status = chance.choice([200] * 8 + [404, 503])
        bodies[f"https://h{number}.com"] = status, "\n".join(lines).encode()
    store = make_store(tmp_path / "store", [site(name, body, status=code) for name, (code, body) in bodies.items()])
    rows = []
    for _ in range(3000):
        authority = f"https://h{min(int(chance.expovariate(0.05)), 80)}.com"
        rows.append((authority + chance.choice(paths), authority, chance.randint(0, 1000)))
    (tmp_path / "corpus").mkdir()
    for piece in range(5):
        write_jsonl(tmp_path / f"corpus/{piece}.jsonl", [{"url": u, "n": n} for u, _, n in rows[piece::5]])
    found = audit(tmp_path / "corpus", store, tmp_path / "one", tokens_column="n", filter=True, unknown="drop")
    slow = slow_audit(rows, bodies, AGENTS)
    assert found["status"] == slow["status"]
    for agent in AGENTS:
        assert {name: found["agents"][agent][name] for name in STATUS} == slow["agents"][agent]
    again = audit(
        tmp_path / "corpus", store, tmp_path / "two", tokens_column="n", filter=True, unknown="drop", workers=2
    )
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "two") for p in (tmp_path / "two").rglob("*") if p.is_file())
    for name in files:
        if name.name != "minitron.json":
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert {**again, "out": ""} == {**found, "out": ""}


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "csv", "saved"])
@pytest.mark.parametrize("unknown", ["keep", "drop"])
def test_filter_keeps_the_format(suffix: str, unknown: str, store: Path, tmp_path: Path) -> None:
    rows = [{"url": url, "n": tokens, "text": f"text {tokens}\n ü"} for url, _, tokens in ROWS[:-1]]
    source = tmp_path / f"c.{suffix}"
    plain = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), source, row_group_size=3)
    elif suffix == "csv":
        with source.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["url", "n", "text"])
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == "saved":
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(str(source))
    else:
        packed = {
            "jsonl": plain,
            "jsonl.gz": gzip.compress(plain),
            "jsonl.zst": pa.compress(plain, "zstd", asbytes=True),
        }
        source.write_bytes(packed[suffix])
    found = audit(source, store, tmp_path / "out", tokens_column="n", filter=True, unknown=unknown)
    gone = {"disallowed"} if unknown == "keep" else {"disallowed", "unknown", "bad_url"}
    kept = [row for row, (_, status, _) in zip(rows, ROWS, strict=False) if status not in gone]
    assert found["filter"]["documents"] == len(kept)
    assert found["filter"]["tokens"] == sum(int(row["n"]) for row in kept)
    (written,) = [file for file in (tmp_path / "out/corpus").rglob("*") if file.is_file()]
    if suffix in ("parquet", "saved"):
        assert pq.read_table(written).to_pylist() == kept
    elif suffix == "csv":
        with written.open(newline="") as stream:
            assert list(csv.DictReader(stream)) == [{k: str(v) for k, v in row.items()} for row in kept]
    else:
        data = written.read_bytes()
        data = gzip.decompress(data) if suffix.endswith("gz") else data
        data = pa.CompressedInputStream(pa.BufferReader(data), "zstd").read() if suffix.endswith("zst") else data
        assert data == "".join(json.dumps(row) + "\n" for row in kept).encode()


def test_divided_files(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of one file together say what the file says, with the file's row numbers."""
    rows = [{"url": url, "n": tokens} for url, _, tokens in ROWS * 5]
    lines = [json.dumps(row) for row in rows]
    lines.insert(3, "")
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet", row_group_size=4)
    whole = audit(tmp_path / "c.jsonl", store, tmp_path / "whole", tokens_column="n")
    monkeypatch.setattr(pieces_module, "PART_BYTES", 300)
    for name in ("c.jsonl", "c.parquet"):
        found = audit(tmp_path / name, store, tmp_path / f"out-{name}", tokens_column="n")
        assert found["status"] == whole["status"] and found["agents"] == whole["agents"]
        files = sorted((tmp_path / f"out-{name}/verdicts").iterdir())
        assert len(files) > 3
        numbers = [row for file in files for row in pq.read_table(file)["row"].to_pylist()]
        skipped = [number for number in range(1, len(lines) + 1) if number != 4]
        assert numbers == (skipped if name == "c.jsonl" else list(range(1, len(rows) + 1)))


def test_many_runs(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Totals per domain do not depend on how often they were written out and merged."""
    source = corpus(tmp_path / "c.jsonl")
    whole = audit(source, store, tmp_path / "a", tokens_column="n")
    monkeypatch.setattr("minitron_cli.data.consent.audit.SITES", 1)
    monkeypatch.setattr("minitron_cli.data.consent.rows.BATCH_ROWS", 2)
    monkeypatch.setattr(domains_module, "FAN_IN", 2)
    parts = audit(source, store, tmp_path / "b", tokens_column="n")
    assert parts["domains"] == whole["domains"]


def test_tokens(store: Path, tmp_path: Path) -> None:
    """Column, tokenizer, bytes, nothing: in this order, and it says which."""
    with_text, without = corpus(tmp_path / "t.jsonl", text=True), corpus(tmp_path / "u.jsonl")
    named = audit(with_text, store, tmp_path / "a", tokens_column="n")
    estimated = audit(with_text, store, tmp_path / "b")
    assert (named["tokens_from"], estimated["tokens_from"]) == ("column", "bytes")
    assert named["status"] == estimated["status"]
    nothing = audit(without, store, tmp_path / "c")
    assert nothing["tokens_from"] == "none" and nothing["tokens"] is None
    assert nothing["status"]["unknown"] == {"documents": 7, "tokens": None}
    assert nothing["domains"]["all"]["domains"] == 10
    words = write_jsonl(tmp_path / "w.jsonl", [{"url": "https://open.org/", "text": "a b"}, {"url": "x", "text": None}])
    make_tokenizer(tmp_path / "tok")
    counted = audit(words, store, tmp_path / "d", tokenizer=str(tmp_path / "tok"))
    from minitron_cli.models.tokenizer import load_tokenizer

    expected = len(load_tokenizer(tmp_path / "tok").encode("a b", add_special_tokens=False))
    assert counted["tokens_from"] == "tokenizer" and counted["tokens"] == expected
    pq.write_table(pa.table({"url": ["https://open.org/"], "text": ["ü" * 6]}), tmp_path / "p.parquet")
    assert audit(tmp_path / "p.parquet", store, tmp_path / "e")["tokens"] == 3


def test_nested_columns(store: Path, tmp_path: Path) -> None:
    rows = [{"metadata": {"url": "https://block.com/a"}, "n": 1}, {"metadata": {"url": "https://open.org/"}, "n": 2}]
    write_jsonl(tmp_path / "c.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    for name in ("c.jsonl", "c.parquet"):
        found = audit(tmp_path / name, store, tmp_path / f"o-{name}", url_column="metadata.url", tokens_column="n")
        assert found["status"]["disallowed"]["tokens"] == 1 and found["status"]["allowed"]["tokens"] == 2


@pytest.fixture
def history(tmp_path: Path) -> Path:
    """One site opens, closes and opens again; another is fetched once, with two answers of one date."""
    return make_store(
        tmp_path / "history",
        [
            site("https://a.com", OPEN, date="2024-01-10"),
            site("https://a.com", BLOCK_AI, date="2024-06-10"),
            site("https://a.com", status=503, date="2025-01-10"),
            site("https://b.com", OPEN, date="2024-06-10"),
            site("https://b.com", BLOCK_AI, date="2024-06-10"),
        ],
    )


@pytest.mark.parametrize(
    ("as_of", "status"),
    [
        ("2023-12-31", "unknown"), ("2024-01-10", "allowed"), ("2024-06-09", "allowed"), ("2024-06-10", "disallowed"),
        ("2024-06-10T11:59:59", "allowed"), ("2024-12-31", "disallowed"), ("2025-01-10", "unknown"), (None, "unknown"),
    ],
)  # fmt: skip
def test_as_of(as_of: str | None, status: str, history: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "c.jsonl", [{"url": "https://a.com/x"}])
    assert audit(source, history, tmp_path / "out", as_of=as_of)["status"][status]["documents"] == 1


def test_as_of_crawl(history: Path, tmp_path: Path) -> None:
    dates = ["2023-01-01", "2024-02-01T00:00:00Z", "2024-07-01", "2025-02-01", None, "soon"]
    expected = ["unknown", "allowed", "disallowed", "unknown", "unknown", "unknown"]
    source = write_jsonl(tmp_path / "c.jsonl", [{"url": "https://a.com/x", "date": date} for date in dates])
    audit(source, history, tmp_path / "out", as_of="crawl")
    rows = pq.read_table(tmp_path / "out/verdicts/c.jsonl.parquet")["status"].to_pylist()
    assert rows == expected


def test_duplicate_dates_and_timeline(history: Path, tmp_path: Path) -> None:
    """Of two captures of one date the one added last counts; the timeline has every month of the store."""
    source = write_jsonl(
        tmp_path / "c.jsonl", [{"url": "https://a.com/x", "n": 1}, {"url": "https://b.com/x", "n": 10}]
    )
    found = audit(source, history, tmp_path / "out", tokens_column="n")
    assert found["status"]["disallowed"]["tokens"] == 10
    months = {entry["month"]: entry["agents"]["GPTBot"] for entry in found["domains"]["timeline"]}
    full = {month: row["full"]["tokens"] for month, row in months.items()}
    assert full == {"2024-01": 0, "2024-06": 11, "2025-01": 10}
    assert months["2024-01"]["unknown"]["tokens"] == 10


def test_domain_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """none, some, full per agent and organisation, http and https of a host as one domain, head and tail."""
    monkeypatch.setattr(domains_module, "HEAD", 1)
    store = make_store(
        tmp_path / "store",
        [
            site("http://a.com", OPEN), site("https://a.com", BLOCK_AI), site("https://b.com", OPEN),
            site("https://c.com", "User-agent: GPTBot\nDisallow: /x/\n"), site("https://d.com", status=410),
        ],
    )  # fmt: skip
    urls = {"http://a.com/": 1, "https://a.com/": 2, "https://b.com/": 4, "https://c.com/": 8, "https://d.com/": 16,
            "https://e.com/": 32}  # fmt: skip
    source = write_jsonl(tmp_path / "c.jsonl", [{"url": url, "n": n} for url, n in urls.items()])
    found = audit(source, store, tmp_path / "out", tokens_column="n")["domains"]
    row = {extent: cell["tokens"] for extent, cell in found["all"]["agents"]["GPTBot"].items()}
    assert row == {"full": 3, "none": 4, "some": 8, "no_robots": 16, "unknown": 32}
    assert found["all"]["organisations"]["OpenAI"]["full"] == {"domains": 1, "documents": 2, "tokens": 3}
    assert found["all"]["agents"]["*"]["full"]["domains"] == 0
    assert (found["head"]["domains"], found["head"]["tokens"]) == (1, 32)
    assert (found["tail"]["domains"], found["tail"]["tokens"]) == (4, 31)
    assert found["timeline"] == []


SIGNALS = "User-agent: *\nContent-Signal: search=yes, ai-train=no\nAllow: /\n"


def test_signals(tmp_path: Path) -> None:
    """Other signals count by default, from the file, a header, or tdmrep.json beside a missing robots.txt."""
    reserve = b'[{"location": "/", "tdm-reservation": 1}]'
    store = make_store(
        tmp_path / "store",
        [
            site("https://a.com", SIGNALS), site("https://b.com", OPEN, headers={"x-robots-tag": "noai"}),
            site("https://c.com", status=404), site("https://c.com", reserve, kind="tdmrep"),
            site("https://d.com", reserve, kind="tdmrep"), site("https://e.com", OPEN),
        ],
    )  # fmt: skip
    source = write_jsonl(tmp_path / "c.jsonl", [{"url": f"https://{name}.com/x"} for name in "abcde"])
    found = audit(source, store, tmp_path / "out")
    rows = pq.read_table(tmp_path / "out/verdicts/c.jsonl.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["disallowed"] * 4 + ["allowed"]
    assert [row["refused_by"] for row in rows] == ["content-signal", "x-robots-tag", "tdmrep", "tdmrep", ""]
    assert found["conflicts"]["documents"] == 1, "Allow: / beside ai-train=no"
    lenient = audit(source, store, tmp_path / "robots", signals="robots")
    rows = pq.read_table(tmp_path / "robots/verdicts/c.jsonl.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["allowed", "allowed", "no_robots", "unknown", "allowed"]
    assert lenient["refused_by"] == found["refused_by"], "they are still reported"


def test_star_is_opt_in(tmp_path: Path) -> None:
    store = make_store(
        tmp_path / "store", [site("https://a.com", "User-agent: *\nDisallow: /\n\nUser-agent: GPTBot\n")]
    )
    source = write_jsonl(tmp_path / "c.jsonl", [{"url": "https://a.com/"}])
    assert audit(source, store, tmp_path / "a", agents=("GPTBot",))["status"]["allowed"]["documents"] == 1
    assert audit(source, store, tmp_path / "b", agents="GPTBot,*")["status"]["disallowed"]["documents"] == 1
    assert "*" not in audit(source, store, tmp_path / "c", agents=())["agents"]


def test_terms(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", [site("https://a.com", BLOCK_AI), site("https://www.b.com", OPEN)])
    (tmp_path / "terms.csv").write_text(
        "domain,category,code,evidence\nb.com,crawling_ai,1,no robots\na.com,crawling_ai,5,\n"
    )
    rows = [{"url": "https://a.com/", "n": 1}, {"url": "https://www.b.com/", "n": 2}, {"url": "https://c.com/", "n": 5}]
    source = write_jsonl(tmp_path / "c.jsonl", rows)
    found = audit(source, store, tmp_path / "out", tokens_column="n", terms=tmp_path / "terms.csv")["terms"]
    assert found["cells"]["full"]["5"] == 1 and found["cells"]["none"]["1"] == 2 and found["cells"]["unknown"]["0"] == 5
    assert found["annotated_domains"] == 2
    assert found["terms_stricter"] == pytest.approx(2 / 8) and found["robots_stricter"] == pytest.approx(1 / 8)


def test_report(history: Path, tmp_path: Path) -> None:
    source = write_jsonl(
        tmp_path / "c.jsonl", [{"url": "https://a.com/<b>", "n": 1}, {"url": "https://b.com/", "n": 10}]
    )
    audit(source, history, tmp_path / "out", tokens_column="n", filter=True, unknown="drop")
    page = write_report(tmp_path / "out", tmp_path / "page.html").read_text()
    assert (
        "of 11 tokens" in page.lower() and "90.9 %" in page and "2024-06" in page and "Domains by organisation" in page
    )


def test_data_prepare_carries_the_audit(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside an audited corpus its summary goes into the manifest of the prepared data; not after a change."""
    rows = [{"url": "https://open.org/", "text": f"a b c {number} " * 20} for number in range(50)]
    source = write_jsonl(tmp_path / "c.jsonl", rows)
    audit(source, store, tmp_path / "out", filter=True, unknown="drop")
    make_tokenizer(tmp_path / "tok")
    options: dict[str, Any] = {"tokenizer": str(tmp_path / "tok"), "seq_len": 8, "validation": 0.0}
    with pytest.raises(InputError, match="is an audit"):
        run_data(DataConfig(sources=(str(tmp_path / "out"),), out=tmp_path / "d0", **options))
    for name, given in (("d1", tmp_path / "out/corpus"), ("d2", tmp_path / "out/corpus/c.jsonl")):
        result = run_data(DataConfig(sources=(str(given),), out=tmp_path / name, **options)).to_json()
        manifest = json.loads((tmp_path / name / "minitron.json").read_text())["result"]
        assert result["consent"] == manifest["consent"]
        assert result["consent"][str(given)]["status"]["allowed"]["documents"] == 50
        again = run_data(DataConfig(sources=(str(given),), out=tmp_path / name, **options)).to_json()
        assert again == result
    with (tmp_path / "out/corpus/c.jsonl").open("a") as stream:
        stream.write('{"text": "smuggled in"}\n')
    changed = run_data(DataConfig(sources=(str(tmp_path / "out/corpus"),), out=tmp_path / "d3", **options)).to_json()
    assert "consent" not in changed and "was changed after its audit" in capsys.readouterr().err


def broken(tmp_path: Path, content: bytes, name: str = "c.jsonl") -> Path:
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


@pytest.mark.parametrize(
    ("content", "name", "options", "said"),
    [
        (b"", "c.jsonl", {}, "holds no documents"),
        (b"\n\n", "c.jsonl", {}, "holds no documents"),
        (b"", "c.csv", {}, "holds no documents"),
        (b"url\n", "c.csv", {}, "holds no documents"),
        (b'{"link": "x"}\n', "c.jsonl", {}, "no column 'url', only link; choose with --url-column"),
        (b'{"url": "x"}\n', "c.jsonl", {"tokens_column": "n"}, "choose with --tokens-column"),
        (b'{"url": "x"}\n', "c.jsonl", {"as_of": "crawl"}, "choose with --date-column"),
        (b'{"url": "x"}\n', "c.jsonl", {"tokenizer": "t"}, "choose with --text-column"),
        (b'{"url": "x", "n": "many"}\n', "c.jsonl", {"tokens_column": "n"}, "c.jsonl:1: 'many' is not a number"),
        (b'{"url": "x", "n": -1}\n', "c.jsonl", {"tokens_column": "n"}, "is not a number"),
        (b'{"url": "x"}\n{"url": ', "c.jsonl", {}, "c.jsonl:2: broken JSON"),
        (b'{"url": "x", "text": 7}\n', "c.jsonl", {}, "holds int, not text"),
        (gzip.compress(b'{"url": "x"}\n' * 9999)[:-60], "c.jsonl.gz", {}, "cannot be read after line"),
        (b"PAR1", "c.parquet", {}, "not a whole Parquet file"),
        (b"url\n\xff\xfe\n", "c.csv", {}, "is not a CSV file in UTF-8"),
        (b"text", "c.txt", {}, "neither JSONL, Parquet nor CSV"),
        (b'{"url": "x"}\n', "c.jsonl", {"agents": ("GTPBot",)}, "GPTBot"),
    ],
)  # fmt: skip
def test_bad_input(content: bytes, name: str, options: dict[str, Any], said: str, store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        audit(broken(tmp_path, content, name), store, tmp_path / "out", **options)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_bad_input_in_processes(store: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for number in range(3):
        write_jsonl(tmp_path / f"corpus/{number}.jsonl", [{"url": "https://open.org/"}] * 10)
    (tmp_path / "corpus/1.jsonl").write_text('{"url": "x"}\n{"url"')
    with pytest.raises(InputError, match=r"1\.jsonl:2: broken JSON"):
        audit(tmp_path / "corpus", store, tmp_path / "out", workers=2)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_bad_options(store: Path, tmp_path: Path) -> None:
    source = corpus(tmp_path / "c.jsonl")
    for options, said in (
        ({"filter": True}, "--unknown keep or --unknown drop"),
        ({"unknown": "keep"}, "add --filter"),
        ({"as_of": "yesterday"}, "neither a date"),
    ):
        with pytest.raises(ConfigError, match=said):
            AuditConfig(source=str(source), robots=store, out=tmp_path / "o", **options)
    with pytest.raises(InputError, match="does not exist; fill one with"):
        audit(source, tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no captures"):
        audit(source, tmp_path / "empty", tmp_path / "out")
    with pytest.raises(InputError, match="does not exist"):
        audit(tmp_path / "nowhere.jsonl", store, tmp_path / "out")
    with pytest.raises(ConfigError, match="lies inside"):
        audit(tmp_path, store, tmp_path / "out")


def test_up_to_date(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = corpus(tmp_path / "c.jsonl")
    first = audit(source, store, tmp_path / "out", tokens_column="n")
    assert audit(source, store, tmp_path / "out", tokens_column="n") == first
    assert "is up to date" in capsys.readouterr().err
    make_store(store, [site("https://never.seen", OPEN)])
    with pytest.raises(UserError, match="--force"):
        audit(source, store, tmp_path / "out", tokens_column="n")
    changed = audit(source, store, tmp_path / "out", tokens_column="n", force=True)
    assert changed["status"]["allowed"]["documents"] == first["status"]["allowed"]["documents"] + 1


def test_odd_strings(tmp_path: Path) -> None:
    """Half surrogate pairs, control characters, octets that are no UTF-8 in rules: nothing lost, nothing raised."""
    store = make_store(
        tmp_path / "store", [site("https://a.com", b"User-agent: *\nDisallow: /\xff\nDisallow: /\x01\n")]
    )
    lines = [
        rb'{"url": "https://a.com/\ud800"}',
        rb'{"url": "https://a.com/%FF"}',
        rb'{"url": "\ud800"}',
        rb'{"url": 5}',
    ]
    found = audit(broken(tmp_path, b"\n".join(lines)), store, tmp_path / "out")
    assert found["documents"] == 4 and found["status"]["bad_url"]["documents"] == 2
    assert found["status"]["disallowed"]["documents"] == 1


def test_caches_forget(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With caches that hold next to nothing the numbers are the same."""
    source = corpus(tmp_path / "c.jsonl")
    whole = audit(source, store, tmp_path / "a", tokens_column="n")
    monkeypatch.setattr("minitron_cli.data.consent.policy.SITE_BYTES", 1)
    monkeypatch.setattr("minitron_cli.data.consent.policy.POLICY_BYTES", 1)
    assert {**audit(source, store, tmp_path / "b", tokens_column="n"), "out": ""} == {**whole, "out": ""}
    cache: LeastRecent[str, int] = LeastRecent(10)
    for name, weight in (("a", 4), ("b", 4), ("c", 4)):
        cache.put(name, weight, weight)
        cache.get("a")
    assert (cache.get("a"), cache.get("b"), cache.get("c"), cache.weight) == (4, None, 4, 8)


def test_hub_data_set(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A streamed data set in several shards; only the columns needed are read."""
    import datasets

    def rows(shards: list[int]) -> Any:
        for shard in shards:
            for url, _, tokens in ROWS[shard::3]:
                yield {"url": url, "n": tokens, "text": "x"}

    def load(name: str, subset: str | None, *, split: str, streaming: bool) -> Any:
        assert (name, subset, split, streaming) == ("owner/set", None, "train", True)
        return datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": [0, 1, 2]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    found = audit(Path("owner/set"), store, tmp_path / "out", tokens_column="n", filter=True, unknown="drop")
    assert found["status"] == expected_status()
    assert len(list((tmp_path / "out/verdicts").iterdir())) == 3
    kept = [row for file in sorted((tmp_path / "out/corpus").iterdir()) for row in pq.read_table(file).to_pylist()]
    assert len(kept) == found["filter"]["documents"] == 3 and set(kept[0]) == {"url", "n", "text"}


@pytest.mark.skipif(importlib.util.find_spec("datatrove") is None, reason="datatrove is not installed")
def test_datatrove_step(store: Path) -> None:
    import pickle

    from datatrove.data import Document

    from minitron_cli.data.consent.steps import ConsentFilter

    step = pickle.loads(pickle.dumps(ConsentFilter(str(store), "drop", AGENTS)))
    documents = [Document(text="x", id=str(n), metadata={"url": url}) for n, (url, _, _) in enumerate(ROWS)]
    kept = list(step.run(iter(documents)))
    assert [document.id for document in kept] == [
        str(n) for n, row in enumerate(ROWS) if row[1] in ("allowed", "no_robots")
    ]
    assert documents[0].metadata["consent_status"] == "disallowed"
    assert documents[0].metadata["consent_blocked"] == "GPTBot, CCBot"


@pytest.mark.shared_data
def test_real_domains(tmp_path: Path) -> None:
    """Domains and token counts of C4, robots.txt files of well-known sites, against the slow audit."""
    folder = SHARED / "robots"
    bodies = folder / "sites_2025_06/bodies"
    run_import(RobotsImportConfig(path=bodies, out=tmp_path / "store", date="2025-06-30"))
    source = folder / "data_provenance/relevant_url_token_counts.csv"
    agents = ("GPTBot", "CCBot", "ClaudeBot", "Google-Extended", "Applebot-Extended")
    config = AuditConfig(
        source=str(source), robots=tmp_path / "store", out=tmp_path / "out", tokens_column="c4_tokens", agents=agents,
        workers=1, signals="robots",
    )  # fmt: skip
    found = run_audit(config).to_json()
    known = {f"https://{p.name.removesuffix('.robots.txt')}": (200, p.read_bytes()) for p in bodies.iterdir()}
    rows = []
    with source.open(newline="") as stream:
        for row in csv.DictReader(stream):
            domain = row["url"]
            rows.append(
                (f"https://{domain}/", f"https://{domain}" if "." in domain else "", int(row["c4_tokens"] or 0))
            )
    slow = slow_audit(rows, known, agents)
    assert found["documents"] == len(rows) == 13989
    assert found["status"] == slow["status"]
    for agent in agents:
        assert {name: found["agents"][agent][name] for name in STATUS} == slow["agents"][agent]
    assert 0.94 < found["status"]["unknown"]["tokens"] / found["tokens"] < 0.97
    assert found["status"]["disallowed"]["documents"] > 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped(number: signal.Signals, store: Path, tmp_path: Path) -> None:
    """Ctrl-C leaves nothing; after kill -9 no process of the audit lives on, and the same command starts anew."""
    (tmp_path / "corpus").mkdir()
    for piece in range(2):
        write_jsonl(tmp_path / f"corpus/{piece}.jsonl", [{"url": f"https://h{n}.com/"} for n in range(30_000)])
    out = tmp_path / "out"
    words = ["data", "audit", str(tmp_path / "corpus"), "--robots", str(store), "--out", str(out), "--workers", "2"]
    process = subprocess.Popen([sys.executable, "-m", "minitron_cli", *words], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (out.with_name("out.partial") / "verdicts").is_dir():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -9)
    psutil.wait_procs(children, timeout=20)
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert not out.exists() and out.with_name("out.partial").exists() == (number == signal.SIGKILL)
    if number == signal.SIGKILL:
        assert audit(tmp_path / "corpus", store, out)["documents"] == 60_000

"""The store of policies: captures in and out, look-ups, imports of directories, JSONL and WARC; kills and damage."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers_audit import make_store, seconds, site, write_jsonl

from minitron_cli.config.audit import RobotsImportConfig
from minitron_cli.data.consent import store as store_module
from minitron_cli.data.consent.imports import run_import
from minitron_cli.data.consent.policy import ALLOWED, NO_ROBOTS, UNKNOWN, base_status
from minitron_cli.data.consent.snapshot import Snapshot, build_snapshot, latest, month_end
from minitron_cli.data.consent.store import BODY_LIMIT, Capture, StoreWriter, read_captures, read_index
from minitron_cli.data.robots import RobotsTxt
from minitron_cli.errors import InputError, OutputError


def test_round_trip(tmp_path: Path) -> None:
    captures = [
        site("https://b.com", b"\x00\xff" * 10, headers={"x-robots-tag": "noai"}, note="redirected to x"),
        site("https://a.com", "x", date="2020-02-29", status=0, kind="tdmrep"),
        site("https://a.com", "é" * BODY_LIMIT, date="1999-01-01"),
    ]
    store = make_store(tmp_path / "store", captures)
    found = list(read_captures(store))
    assert [item.authority for item in found] == ["https://a.com", "https://a.com", "https://b.com"], "sorted"
    assert {(c.authority, c.kind, c.fetched_at): c for c in captures if len(c.body) < BODY_LIMIT}.items() <= {
        (c.authority, c.kind, c.fetched_at): c for c in found
    }.items()
    assert len(found[0].body) == BODY_LIMIT, "one more than a parser reads, so that it knows of the cut"
    assert RobotsTxt.parse(found[0].body).size_cut


def test_lookups_against_a_dictionary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "FLUSH_ROWS", 37)
    monkeypatch.setattr(store_module, "ROW_GROUP", 10)
    chance = random.Random(1)
    known: dict[tuple[str, str], list[Capture]] = {}
    with StoreWriter(tmp_path / "store") as writer:
        for number in range(400):
            authority = f"{chance.choice(['http', 'https'])}://h{chance.randint(0, 60)}.com"
            capture = Capture(
                authority, chance.randint(1, 50) * 86400, chance.choice([200, 404, 0]), b"x" * chance.randint(0, 3),
                {"a": str(number)}, chance.choice(["robots", "robots", "tdmrep"]),
            )  # fmt: skip
            writer.add(capture)
            known.setdefault((authority, capture.kind), []).append(capture)
    assert len(list((tmp_path / "store").glob("*.parquet"))) == 400 // 37 + 1
    build_snapshot(tmp_path / "store", tmp_path)
    snapshot = Snapshot(tmp_path)
    assert len(snapshot) == 400
    for number in range(62):
        for scheme in ("http", "https"):
            for place, kind in enumerate(("robots", "tdmrep")):
                authority = f"{scheme}://h{number}.com"
                rows = snapshot.rows(authority, place)
                # Files are sorted inside, so of one file's equal dates the one added last is last as well.
                expected = sorted(known.get((authority, kind), []), key=lambda capture: capture.fetched_at)
                assert [(r.fetched_at, r.status) for r in rows] == [(c.fetched_at, c.status) for c in expected]
                assert [snapshot.body(r.number) for r in rows] == [c.body for c in expected]
                assert [dict(snapshot.headers(r.number)) for r in rows] == [dict(c.headers) for c in expected]
                at = 25 * 86400
                past = [c for c in expected if c.fetched_at <= at]
                chosen = latest(rows, at)
                assert (chosen is None) == (not past)
                if chosen is not None:
                    assert snapshot.headers(chosen.number) == past[-1].headers
    assert (tmp_path / "state.bodies").stat().st_size <= 1 + 1 + 2 + 3, "equal bodies are kept once"


def test_months(tmp_path: Path) -> None:
    dates = ["2024-12-31", "2025-01-01", "2025-01-31"]
    store = make_store(tmp_path / "store", [site("https://a.com", date=date) for date in dates])
    build_snapshot(store, tmp_path)
    snapshot = Snapshot(tmp_path)
    assert snapshot.months() == ["2024-12", "2025-01"] and snapshot.span() == ("2024-12-31", "2025-01-31")
    assert month_end("2024-12") == seconds("2025-01-01") - 12 * 3600 - 1
    assert month_end("2024-02") == seconds("2024-03-01") - 12 * 3600 - 1


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (200, "User-agent: *\nDisallow: /", ALLOWED), (200, "", ALLOWED), (204, "", ALLOWED), (206, "x", ALLOWED),
        (200, "<html>", UNKNOWN), (200, b"\x1f\x8b\x08", UNKNOWN), (401, "", NO_ROBOTS), (403, "", NO_ROBOTS),
        (404, "", NO_ROBOTS), (410, "", NO_ROBOTS), (429, "", UNKNOWN), (500, "", UNKNOWN), (503, "", UNKNOWN),
        (0, "", UNKNOWN), (301, "", UNKNOWN), (999, "", UNKNOWN),
    ],
)  # fmt: skip
def test_status(status: int, body: str | bytes, expected: int) -> None:
    assert base_status(status, RobotsTxt.parse(body)) == expected


def test_writers(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", [site("https://a.com")])
    with StoreWriter(store), pytest.raises(OutputError, match="Another process"):
        StoreWriter(store).__enter__()
    (store / "captures-000002.parquet.tmp").write_bytes(b"half")
    assert len(read_index(store)) == 1, "what a killed writer left is not looked at"
    make_store(store, [site("https://b.com")])
    assert sorted(file.name for file in store.iterdir()) == [
        "captures-000001.parquet", "captures-000002.parquet", "store.lock",
    ]  # fmt: skip
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt"), StoreWriter(tmp_path / "other"):
        pass
    with pytest.raises(OutputError, match="is a file"), StoreWriter(tmp_path / "other/notes.txt"):
        pass


def test_an_error_keeps_what_was_added(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), StoreWriter(tmp_path / "store") as writer:
        writer.add(site("https://a.com"))
        raise KeyboardInterrupt
    assert len(read_index(tmp_path / "store")) == 1


def test_killed_writer(tmp_path: Path) -> None:
    """kill -9 while files are being added: what is there is whole, and writing goes on."""
    code = (
        "import sys; from pathlib import Path\n"
        "from minitron_cli.data.consent.store import StoreWriter, Capture\n"
        f"with StoreWriter(Path({str(tmp_path / 'store')!r})) as writer:\n"
        "    for n in range(10**6):\n"
        "        writer.add(Capture(f'https://h{n}.com', n, 200, b'x' * 1000)); writer.flush()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    while not (tmp_path / "store").is_dir() or len(list((tmp_path / "store").glob("*.parquet"))) < 5:
        time.sleep(0.02)
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    found = [capture.fetched_at for capture in read_captures(tmp_path / "store")]
    assert found == list(range(len(found))) and len(found) >= 5
    make_store(tmp_path / "store", [site("https://z.com")])
    assert len(read_index(tmp_path / "store")) == len(found) + 1


@pytest.mark.parametrize("content", [b"not parquet", b""])
def test_damaged_store(content: bytes, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", [site("https://a.com")])
    (store / "captures-000002.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"captures-000002\.parquet is damaged"):
        read_index(store)
    pq.write_table(pa.table({"a": [1]}), store / "captures-000002.parquet")
    with pytest.raises(InputError, match="not a file of a robots store"):
        read_index(store)


def load(path: Path, out: Path, date: str | None = None) -> list[Capture]:
    result = run_import(RobotsImportConfig(path=path, out=out, date=date))
    found = list(read_captures(out))
    assert result.captures == len(found)
    return found


def test_import_directories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both layouts; a bare domain stands for http and https; names that are no hosts are counted."""
    bodies = tmp_path / "bodies"
    (bodies / "b.org").mkdir(parents=True)
    (bodies / "www.a.com.robots.txt").write_bytes(b"A\xff")
    (bodies / "b.org/robots.txt").write_bytes(b"")
    (bodies / "not a host.robots.txt").write_bytes(b"x")
    os.utime(bodies / "b.org/robots.txt", (1000, 1000))
    found = load(bodies, tmp_path / "one", "2025-06-30")
    assert [(c.authority, c.status, c.body) for c in found] == [
        ("http://b.org", 200, b""), ("http://www.a.com", 200, b"A\xff"),
        ("https://b.org", 200, b""), ("https://www.a.com", 200, b"A\xff"),
    ]  # fmt: skip
    assert "1 entries name no web host" in capsys.readouterr().err
    assert {c.fetched_at for c in found} == {seconds("2025-06-30") - 12 * 3600}
    assert {c.fetched_at for c in load(bodies / "b.org", tmp_path / "two")} == {1000}


def test_import_jsonl(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"authority": "https://a.com:8443", "body": "A", "date": "2025-01-02T03:04:05Z"},
        {"url": "http://b.com/robots.txt", "content": None, "status": 404, "timestamp": 5},
        {"domain": "c.com", "body_base64": base64.b64encode(b"\xff\x00").decode(), "fetched_at": "2025-01-02"},
        {"url": "https://d.com/.well-known/tdmrep.json", "body": "[]", "date": 7, "headers": {"Content-Type": "x"}},
        {"domain": "bücher.example", "body": "", "date": 8, "status": 0},
    ]
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    found = {capture.authority: capture for capture in load(tmp_path / "in.jsonl.gz", tmp_path / "store")}
    assert found["https://a.com:8443"].body == b"A"
    assert found["https://a.com:8443"].fetched_at == seconds("2025-01-02") - 12 * 3600 + 3 * 3600 + 4 * 60 + 5
    assert (found["http://b.com"].status, found["http://b.com"].body, found["http://b.com"].fetched_at) == (404, b"", 5)
    assert found["http://c.com"].body == found["https://c.com"].body == b"\xff\x00"
    assert (found["https://d.com"].kind, found["https://d.com"].headers) == ("tdmrep", {"content-type": "x"})
    assert "https://xn--bcher-kva.example" in found and len(found) == 7


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"body": "x", "date": 1}, "in.jsonl:1 names no site"),
        ({"domain": "a.com", "body": "x"}, "no date that can be read"),
        ({"domain": "a.com", "body": "x", "date": "soon"}, "no date that can be read"),
        ({"domain": "a.com", "body": 5, "date": 1}, "the body is int"),
        ({"domain": "a.com", "body_base64": "?", "date": 1}, "not Base64"),
        ({"domain": "a.com", "status": "ok", "date": 1}, "no HTTP status"),
        ({"domain": "a.com", "kind": "llms", "date": 1}, "kind 'llms'"),
        ({"domain": "nodot", "body": "x", "date": 1}, "no robots.txt of a web host"),
    ],
)
def test_import_bad_rows(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", [row])
    with pytest.raises(InputError, match=said):
        load(tmp_path / "in.jsonl", tmp_path / "store")


def test_import_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load(tmp_path / "no", tmp_path / "store")
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(InputError, match="neither DOMAIN"):
        load(tmp_path / "a.zip", tmp_path / "store")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no DOMAIN"):
        load(tmp_path / "empty", tmp_path / "store")


def write_warc(path: Path, responses: list[tuple[str, str, list[tuple[str, str]], bytes, dict[str, str]]]) -> Path:
    """(URL, status line, headers, body, WARC headers) as a WARC file."""
    writer = pytest.importorskip("warcio.warcwriter")
    headers = pytest.importorskip("warcio.statusandheaders")
    with path.open("wb") as stream:
        warc = writer.WARCWriter(stream, gzip=path.suffix == ".gz")
        warc.write_record(warc.create_warcinfo_record(path.name, {"software": "test"}))
        for url, status, fields, body, more in responses:
            http = headers.StatusAndHeaders(status, fields, protocol="HTTP/1.1")
            given = {"WARC-Date": "2025-03-04T05:06:07Z", **more}
            record = warc.create_warc_record(
                url, "response", payload=io.BytesIO(body), http_headers=http, warc_headers_dict=given
            )
            warc.write_record(record)
    return path


@pytest.mark.parametrize("suffix", ["warc", "warc.gz"])
def test_import_warc(suffix: str, tmp_path: Path) -> None:
    """Hops of redirects are joined, also across hosts; transfer and content coding are undone."""
    chunked = [("Transfer-Encoding", "chunked"), ("Content-Encoding", "gzip"), ("X-Robots-Tag", "noai")]
    packed = gzip.compress(b"packed")
    to = "Location"
    path = write_warc(
        tmp_path / f"crawl.{suffix}",
        [
            ("https://a.com/robots.txt", "200 OK", [], b"A", {}),
            ("http://a.com/robots.txt", "301 Moved", [(to, "https://a.com/robots.txt")], b"moved", {}),
            ("https://b.com/robots.txt", "200 OK", chunked, b"%x\r\n%b\r\n0\r\n\r\n" % (len(packed), packed), {}),
            ("https://c.com/robots.txt", "404 Not Found", [], b"<html>", {}),
            ("https://d.com/robots.txt", "302 Found", [(to, "/en/robots.txt")], b"", {}),
            ("https://d.com/en/robots.txt", "307 Again", [(to, "https://www.d.com/r")], b"", {}),
            ("https://www.d.com/r", "200 OK", [], b"D", {}),
            ("https://e.com/robots.txt", "301 Moved", [(to, "https://gone.com/robots.txt")], b"", {}),
            ("https://f.com/robots.txt", "301 Moved", [(to, "https://f.com/robots.txt")], b"", {}),
            ("https://g.com/robots.txt", "200 OK", [], b"half", {"WARC-Truncated": "disconnect"}),
            ("https://h.com/page.html", "200 OK", [], b"no robots", {}),
        ],
    )
    found = {c.authority: (c.status, c.body) for c in load(path, tmp_path / "store")}
    assert found == {
        "https://a.com": (200, b"A"), "http://a.com": (200, b"A"), "https://b.com": (200, b"packed"),
        "https://c.com": (404, b""), "https://d.com": (200, b"D"), "https://e.com": (301, b""),
        "https://f.com": (301, b""), "https://g.com": (0, b""),
    }  # fmt: skip
    captures = {c.authority: c for c in read_captures(tmp_path / "store")}
    assert captures["https://b.com"].headers == {"x-robots-tag": "noai"}
    assert captures["https://d.com"].note == "redirected to https://www.d.com/r"
    assert captures["https://a.com"].fetched_at == seconds("2025-03-04") - 12 * 3600 + 5 * 3600 + 6 * 60 + 7


def test_import_damaged_warc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("warcio")
    (tmp_path / "a.warc").write_bytes(b"hello\n" * 100)
    with pytest.raises(InputError, match=r"a\.warc"):
        load(tmp_path / "a.warc", tmp_path / "store")
    monkeypatch.setitem(sys.modules, "warcio.archiveiterator", None)
    with pytest.raises(InputError, match="pip install warcio"):
        load(tmp_path / "a.warc", tmp_path / "store")

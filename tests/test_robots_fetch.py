"""Fetching robots.txt from local servers that behave in every way servers do."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers_audit import write_jsonl

from minitron_cli import __version__
from minitron_cli.config.audit import RobotsFetchConfig
from minitron_cli.data.consent import client as client_module
from minitron_cli.data.consent.fetch import corpus_sites, run_fetch
from minitron_cli.data.consent.store import BODY_LIMIT, Capture, read_captures
from minitron_cli.errors import InputError

Answer = Callable[[BaseHTTPRequestHandler, int], None]
"""Writes the answer to the request with a number, from 0."""


class Site:
    """One server on a port of its own. `requests`: paths asked for; `times`: when they began and ended."""

    def __init__(self, answer: Answer) -> None:
        self.requests: list[str] = []
        self.agents: list[str] = []
        self.times: list[tuple[float, float]] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.requests.append(self.path)
                site.agents.append(self.headers["User-Agent"])
                began = time.monotonic()
                with contextlib.suppress(OSError):  # the client went away
                    answer(self, len(site.requests) - 1)
                site.times.append((began, time.monotonic()))

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.authority = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], Site]]:
    sites: list[Site] = []

    def start(answer: Answer) -> Site:
        sites.append(Site(answer))
        return sites[-1]

    yield start
    for site in sites:
        site.server.shutdown()
        site.server.server_close()


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "BACKOFF_SECONDS", 0.01)


def reply(status: int, body: bytes = b"", **headers: str) -> Answer:
    """An answer of fixed status, body and headers; `x_robots_tag` is X-Robots-Tag."""

    def answer(request: BaseHTTPRequestHandler, number: int) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(body)

    return answer


def in_turn(*answers: Answer) -> Answer:
    """One answer after another; the last for all further requests."""
    return lambda request, number: answers[min(number, len(answers) - 1)](request, number)


def drip(request: BaseHTTPRequestHandler, number: int) -> None:
    request.send_response(200)
    request.end_headers()
    for _ in range(100):
        request.wfile.write(b"#")
        request.wfile.flush()
        time.sleep(0.05)


def silence(request: BaseHTTPRequestHandler, number: int) -> None:
    time.sleep(3)


def reset(request: BaseHTTPRequestHandler, number: int) -> None:
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    request.connection.close()


def cut(request: BaseHTTPRequestHandler, number: int) -> None:
    request.send_response(200)
    request.send_header("Content-Length", "100")
    request.end_headers()
    request.wfile.write(b"User-agent: *")


def endless(request: BaseHTTPRequestHandler, number: int) -> None:
    request.send_response(200)
    request.end_headers()
    for _ in range(1000):
        request.wfile.write(b"#" * 65535 + b"\n")


def garbage(request: BaseHTTPRequestHandler, number: int) -> None:
    request.wfile.write(b"\x00\x01\x02 this is no HTTP\r\n\r\n")


def fetch(sites: list[str], store: Path, tmp_path: Path, **options: Any) -> dict[str, Any]:
    source = write_jsonl(tmp_path / "corpus.jsonl", [{"url": f"{authority}/page"} for authority in sites])
    options = {"delay": 0.0, "timeout": 0.6, "retries": 1, **options}
    return run_fetch(RobotsFetchConfig(corpus=str(source), out=store, **options)).to_json()


def captured(store: Path) -> dict[str, Capture]:
    return {capture.authority: capture for capture in read_captures(store)}


def test_every_behaviour(serve: Callable[[Answer], Site], tmp_path: Path) -> None:
    body = b"User-agent: *\nDisallow: /x\n"
    binary = bytes(range(256)) * 4
    packed = reply(200, gzip.compress(body), Content_Encoding="gzip")
    elsewhere = serve(reply(200, body))
    answers: dict[str, tuple[Answer, int, bytes]] = {
        "plain": (reply(200, body, X_Robots_Tag="noai", Set_Cookie="a=b"), 200, body),
        "empty": (reply(200), 200, b""),
        "packed": (packed, 200, body),
        "binary": (reply(200, binary), 200, binary),
        "missing": (reply(404, b"<html>"), 404, b""),
        "forbidden": (reply(403), 403, b""),
        "error": (reply(503), 503, b""),
        "busy": (in_turn(reply(429, Retry_After="0"), reply(200, body)), 200, body),
        "flaky": (in_turn(reset, reply(200, body)), 200, body),
        "moved": (reply(301, Location=elsewhere.authority + "/robots.txt"), 200, body),
        "relative": (in_turn(reply(308, Location="/r?a=%2Fb"), reply(200, body)), 200, body),
        "chain": (in_turn(*[reply(302, Location=f"/{n}") for n in range(10)], reply(200, body)), 200, body),
        "too long": (lambda request, n: reply(302, Location=f"/{n}")(request, n), 302, b""),
        "circle": (reply(307, Location="/robots.txt"), 307, b""),
        "to ftp": (reply(301, Location="ftp://example.com/robots.txt"), 301, b""),
        "no place": (reply(302), 302, b""),
        "drip": (drip, 0, b""),
        "silent": (silence, 0, b""),
        "reset": (reset, 0, b""),
        "cut": (cut, 0, b""),
        "garbage": (garbage, 0, b""),
        "endless": (endless, 200, (b"#" * 65535 + b"\n") * 8),
    }
    sites = {name: serve(answer) for name, (answer, _, _) in answers.items()}
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        refused = f"http://127.0.0.1:{unused.getsockname()[1]}"
        authorities = [site.authority for site in sites.values()]
        result = fetch([*authorities, refused, "https://bad host"], tmp_path / "store", tmp_path, contact="me@x.org")
    found = captured(tmp_path / "store")
    for name, (_, status, expected) in answers.items():
        capture = found[sites[name].authority]
        assert (capture.status, capture.body) == (status, expected[:BODY_LIMIT]), (name, capture.note)
        assert abs(capture.fetched_at - time.time()) < 60
    assert (result["sites"], result["fetched"], result["malformed"]) == (len(answers) + 1, len(answers) + 1, 1)
    assert found[refused].status == 0 and "Connect" in found[refused].note
    assert found[sites["plain"].authority].headers == {"x-robots-tag": "noai"}
    assert found[sites["moved"].authority].note == f"redirected to {elsewhere.authority}/robots.txt"
    assert elsewhere.authority not in found, "what a redirect leads to counts for the site asked first, only"
    assert sites["relative"].requests == ["/robots.txt", "/r?a=%2Fb"], "escapes stay as they are"
    assert len(sites["error"].requests) == 2 and len(sites["missing"].requests) == 1, "only failures are tried again"
    assert len(sites["too long"].requests) == 11
    assert sites["plain"].agents == [f"minitron/{__version__} (robots.txt consent audit; me@x.org)"]
    assert "circle" in found[sites["circle"].authority].note and "0.6 s" in found[sites["drip"].authority].note
    assert len(found[sites["endless"].authority].body) == BODY_LIMIT


def test_again(serve: Callable[[Answer], Site], tmp_path: Path) -> None:
    """What is fresh is not asked again; failures on request; everything once it is old."""
    good, bad = serve(reply(200, b"x")), serve(reply(500))
    both = [good.authority, bad.authority]
    assert fetch(both, tmp_path / "store", tmp_path, retries=0)["status"] == {"2xx": 1, "5xx": 1}
    again = fetch(both, tmp_path / "store", tmp_path)
    assert (again["fetched"], again["fresh"], len(good.requests), len(bad.requests)) == (0, 2, 1, 1)
    assert fetch(both, tmp_path / "store", tmp_path, retries=0, retry_failed=True)["fetched"] == 1
    assert (len(good.requests), len(bad.requests)) == (1, 2)
    more = fetch([*both, serve(reply(404)).authority], tmp_path / "store", tmp_path, tdmrep=True, retries=0)
    assert more["fetched"] == 4, "the new site, and three tdmrep.json"
    assert "/.well-known/tdmrep.json" in good.requests
    assert fetch(both, tmp_path / "store", tmp_path, max_age=0.0, retries=0)["fetched"] == 2
    assert len(list(read_captures(tmp_path / "store"))) == 2 + 1 + 4 + 2


def test_polite(serve: Callable[[Answer], Site], tmp_path: Path) -> None:
    """One request per host at a time, a pause between them, however many are allowed at once."""
    sites = [serve(lambda request, n: (time.sleep(0.05), reply(200)(request, n))[1]) for _ in range(4)]
    fetch([site.authority for site in sites], tmp_path / "store", tmp_path, delay=0.15)
    times = sorted(span for site in sites for span in site.times)
    assert len(times) == 4
    for (_, ended), (began, _) in itertools.pairwise(times):
        assert began - ended > 0.1


def test_text_files_of_domains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "domains.txt").write_text("# sites\nexample.com\n\nhttp://Example.com/a\nexample.com\nnodot\n")
    config = RobotsFetchConfig(corpus=str(tmp_path / "domains.txt"), out=tmp_path / "store")
    assert corpus_sites(config) == ({"https://example.com", "http://example.com"}, 1)
    (tmp_path / "domains.txt").write_text("nodot\n")
    with pytest.raises(InputError, match="names no web site"):
        run_fetch(config)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped(number: signal.Signals, serve: Callable[[Answer], Site], tmp_path: Path) -> None:
    """Ctrl-C, SIGTERM and kill -9 leave a valid store; the same command ends the work."""
    slow = [serve(lambda request, n: (time.sleep(0.1), reply(200, b"x")(request, n))[1]) for _ in range(15)]
    source = write_jsonl(tmp_path / "c.jsonl", [{"url": site.authority} for site in slow])
    store = tmp_path / "store"
    code = (
        "import sys; from minitron_cli.data.consent import client; client.FLUSH_SECONDS = 0.0\n"
        f"sys.argv = ['minitron', 'data', 'robots', 'fetch', '--from', {str(source)!r}, '--out', {str(store)!r},"
        " '--delay', '0', '--json']\n"
        "from minitron_cli.cli import main; main()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not store.is_dir() or len(list(store.glob("*.parquet"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number], said
    before = len(captured(store))
    assert 2 <= before < 15
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True)
    result = json.loads(done.stdout)
    assert (result["fresh"], result["fetched"]) == (before, 15 - before)
    assert {capture.body for capture in captured(store).values()} == {b"x"} and len(captured(store)) == 15

"""A headless Chromium, driven by the DevTools protocol: open a page, ask it in JavaScript, take pictures."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import pytest

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-port=0"),
)
NAMES = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 60


def find_chromium() -> str | None:
    """The browser's command, where one is installed."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One process for many pages; `with Browser() as browser: page = browser.open(path)`."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.home = tempfile.mkdtemp()
        command = find_chromium()
        assert command is not None
        self.process = subprocess.Popen(
            [command, *FLAGS, f"--user-data-dir={self.home}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.base = f"http://127.0.0.1:{self._port()}"
        self.session = self.wait(_session())

    def _port(self) -> int:
        file, limit = Path(self.home) / "DevToolsActivePort", time.monotonic() + SECONDS
        while not (file.exists() and file.read_text().count("\n")):
            assert self.process.poll() is None, "the browser ended by itself"
            assert time.monotonic() < limit, "the browser does not start"
            time.sleep(0.05)
        return int(file.read_text().splitlines()[0])

    def wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The result of a coroutine."""
        return self.loop.run_until_complete(asyncio.wait_for(work, SECONDS))

    def open(self, path: Path | str, *, width: int = 1000, height: int = 800, dark: bool = False) -> Page:
        """A page of a file (or an address), loaded, in a window of this size, in the colours asked for."""
        return Page(self, path.resolve().as_uri() if isinstance(path, Path) else path, width, height, dark)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.wait(self.session.close())
        self.process.terminate()
        self.process.wait()
        self.loop.close()
        shutil.rmtree(self.home, ignore_errors=True)


async def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(trust_env=False)


class Page:
    """A tab. `console` holds what it logged or threw; `requests` every address it asked for."""

    def __init__(self, browser: Browser, address: str, width: int, height: int, dark: bool) -> None:
        self.browser, self.number = browser, 0
        self.console: list[str] = []
        self.requests: list[str] = []
        self.loaded = False
        browser.wait(self._begin())
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=address)
        browser.wait(self._until_loaded())

    async def _begin(self) -> None:
        async with self.browser.session.put(f"{self.browser.base}/json/new?about:blank") as answer:
            target = await answer.json()
        self.socket = await self.browser.session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol and its result."""
        found: dict[str, Any] = self.browser.wait(self._call(method, parameters))
        return found

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self.number += 1
        number = self.number
        await self.socket.send_str(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = await self._message()
            if message.get("id") == number:
                assert "error" not in message, message["error"]
                result: dict[str, Any] = message["result"]
                return result

    async def _until_loaded(self) -> None:
        while not self.loaded:
            await self._message()

    async def _message(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(await self.socket.receive_str())
        method, found = message.get("method"), message.get("params", {})
        if method == "Page.loadEventFired":
            self.loaded = True
        elif method == "Runtime.consoleAPICalled":
            self.console.append(" ".join(str(each.get("value", each)) for each in found["args"]))
        elif method == "Runtime.exceptionThrown":
            self.console.append(str(found["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.console.append(f"{found['entry']['level']}: {found['entry']['text']}")
        elif method == "Network.requestWillBeSent":
            self.requests.append(found["request"]["url"])
        return message

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression, promises awaited."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def picture(self, path: Path, *, top: float = 0, height: float | None = None) -> Path:
        """A PNG of the page, or of a part of it."""
        size = self.ask("[document.documentElement.clientWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": top, "width": size[0], "height": height or size[1] - top, "scale": 1}
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        path.write_bytes(base64.b64decode(data))
        return path


needs_chromium = pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed (apt install chromium)")

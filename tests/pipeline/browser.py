"""A headless Chromium for tests, driven over its DevTools protocol with what is installed."""

import asyncio
import base64
import json
import shutil
import subprocess
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from tornado.websocket import WebSocketClientConnection, websocket_connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_START_S, _ANSWER_S = 60, 60
_KEY_CODES = {"Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}


class Browser:
    """One page. `errors` are its console errors, uncaught exceptions and refused loads so far."""

    def __init__(self, profile: Path, width: int = 1280, height: int = 1600) -> None:
        assert CHROMIUM is not None
        self.errors: list[str] = []
        self._profile, self._id = profile, 0
        self._loop = asyncio.new_event_loop()
        self._process = subprocess.Popen(
            [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--disable-background-networking", "--disable-dev-shm-usage",
             "--remote-debugging-port=0", f"--user-data-dir={profile}",
             f"--window-size={width},{height}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            self._socket = self._connect()
            for domain in ("Page", "Runtime", "Log", "Performance", "Network"):
                self.call(f"{domain}.enable")
            self.resize(width, height)
        except BaseException:
            self._stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._stop()

    def _stop(self) -> None:
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._loop.close()

    def _connect(self) -> WebSocketClientConnection:
        port_file = self._profile / "DevToolsActivePort"
        until = time.monotonic() + _START_S
        while time.monotonic() < until:
            with suppress(OSError, IndexError, StopIteration):
                port = port_file.read_text().split()[0]
                listed = urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=5)
                targets = json.load(listed)
                page = next(one for one in targets if one["type"] == "page")
                return self._loop.run_until_complete(self._open(page["webSocketDebuggerUrl"]))
            time.sleep(0.1)
        raise TimeoutError(f"Chromium did not start within {_START_S} s")

    async def _open(self, address: str) -> WebSocketClientConnection:
        return await websocket_connect(address, max_message_size=1 << 28)

    def call(self, method: str, **parameters: Any) -> Any:
        """One command and its answer; events that come meanwhile are looked at for errors."""
        self._id += 1
        message = json.dumps({"id": self._id, "method": method, "params": parameters})
        return self._loop.run_until_complete(
            asyncio.wait_for(self._talk(message, self._id), _ANSWER_S)
        )

    async def _talk(self, message: str, wanted: int) -> Any:
        await self._socket.write_message(message)
        while True:
            text = await self._socket.read_message()
            assert text is not None, "Chromium closed the connection"
            answer = json.loads(text)
            if answer.get("id") == wanted:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        method, values = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(values["exceptionDetails"]))
        elif method == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
            self.errors.append(values["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and values["type"] in ("error", "assert"):
            self.errors.append(json.dumps(values["args"]))
        elif method == "Network.loadingFailed" and not values.get("canceled"):
            self.errors.append(f"{values.get('type')}: {values.get('errorText')}")

    def open(self, address: str) -> None:
        """Load an address anew and wait until it has loaded."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """The value of an expression on the page."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = 30) -> None:
        """Wait until an expression is true on the page."""
        until = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < until, f"not within {seconds} s: {condition}"
            time.sleep(0.02)

    def key(self, key: str) -> None:
        """Press and release a key."""
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind, key=key, code=key, windowsVirtualKeyCode=_KEY_CODES[key],
            )  # fmt: skip

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set the size of the window and the colour scheme that the person prefers."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path, *, whole: bool = False) -> None:
        """A screenshot as PNG: what the window shows, or the whole page."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))

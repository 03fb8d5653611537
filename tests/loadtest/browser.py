"""A headless Chromium, driven by its DevTools protocol."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websocket import WebSocket, create_connection

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT_S = 30.0
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")


def find_chromium() -> str | None:
    return next((path for name in PROGRAMS if (path := shutil.which(name))), None)


class Page:
    """One tab. `requested` and `complaints` are of the page that was opened last: what it asked for, itself included,
    and its exceptions, console errors and failed loads."""

    def __init__(self, browser: WebSocket) -> None:
        self.requested: list[str] = []
        self.complaints: list[str] = []
        self._browser = browser
        self._last_id = 0
        self._session: str | None = None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def open(self, path: Path, *, width: int, scheme: str) -> None:
        """As a file, with the width in pixels, and in `light` or `dark`."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600
        )
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.requested.clear()
        self.complaints.clear()
        self._call("Page.navigate", url=path.resolve().as_uri())
        while self._receive().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, expression: str) -> Any:
        """The value of JavaScript, by way of JSON."""
        result = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._browser.send(json.dumps(message))
        while (answer := self._receive()).get("id") != self._last_id:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._browser.recv())
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method: str | None, parameters: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requested.append(parameters["request"]["url"])
        is_complaint = {
            "Runtime.exceptionThrown": True,
            "Network.loadingFailed": True,
            "Log.entryAdded": parameters.get("entry", {}).get("level") == "error",
            "Runtime.consoleAPICalled": parameters.get("type") in ("error", "assert"),
        }
        if is_complaint.get(method or "", False):
            self.complaints.append(f"{method}: {parameters}")


@contextmanager
def chromium(program: str, profile: Path) -> Iterator[Page]:
    """A browser for as long as the context lasts. profile: a folder of its own, which need not be there."""
    process = subprocess.Popen(
        [program, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port, path = _devtools(profile, process)
        browser = create_connection(f"ws://127.0.0.1:{port}{path}", timeout=TIMEOUT_S, suppress_origin=True)
        try:
            yield Page(browser)
        finally:
            browser.close()
    finally:
        process.terminate()
        process.wait(timeout=TIMEOUT_S)


def _devtools(profile: Path, process: subprocess.Popen[bytes]) -> tuple[str, str]:
    """Port and path of the protocol, which the browser writes into its profile."""
    file = profile / "DevToolsActivePort"
    deadline_s = time.monotonic() + TIMEOUT_S
    while not file.exists() or len(lines := file.read_text().splitlines()) < 2:
        assert process.poll() is None, f"it has ended with {process.returncode}"
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    return lines[0], lines[1]

"""Headless Chromium by the DevTools protocol over a pipe: the standard library is enough."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    "--remote-debugging-pipe",
)
# Chromium reads commands from descriptor 3 and answers at 4.
CONNECTED = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3), os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One page of a browser of its own.

    Args:
        folder: An empty folder for its files.

    Attributes:
        messages: What the page logged or violated, and every address that it asked for.
    """

    def __init__(self, folder: Path) -> None:
        theirs, self.writing = os.pipe()
        self.reading, answers = os.pipe()
        command = [sys.executable, "-c", CONNECTED, str(theirs), str(answers)]
        command += [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder}"]
        self.process = subprocess.Popen(
            command, pass_fds=(theirs, answers), stderr=subprocess.DEVNULL
        )
        os.close(theirs), os.close(answers)
        self.buffer, self.count, self.session = b"", 0, ""
        self.messages: list[str] = []
        self.addresses: list[str] = []
        try:
            self._connect()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.writing), os.close(self.reading)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its result; events meanwhile are noted."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.writing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self._note(answer)

    def run(self, script: str) -> Any:
        """The value of an expression in the page; promises are awaited."""
        result = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"].get("description"))
        return result["result"].get("value")

    def open(self, path: Path) -> None:
        """Shows a file, and waits until its scripts say that they are done."""
        self.call("Page.navigate", url=path.resolve(strict=True).as_uri())
        waiting = """new Promise(done => { let left = 1500; const look = () => {
            const said = document.body && document.body.dataset;
            if (location.protocol === "file:" && said && (said.ready || said.failed))
                done(said.failed || "");
            else if (left--) setTimeout(look, 20); else done("not ready after 30 s"); };
            look(); })"""
        if failed := self.run(waiting):
            raise RuntimeError(failed)

    def mouse(self, kind: str, x: float, y: float, held: bool = True) -> None:
        """A "mousePressed", "mouseMoved" or "mouseReleased" at a place of the window."""
        button = {"button": "left", "buttons": int(held), "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def key(self, name: str) -> None:
        """One key, down and up."""
        text = {"text": name} if len(name) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=name, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=name)

    def picture(self, path: Path, width: int, scheme: str = "light") -> None:
        """A PNG of the whole page in a window of this width."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **screen)
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _connect(self) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            part = os.read(self.reading, 2**16)
            if not part:
                raise RuntimeError("the browser has ended")
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event["method"] == "Log.entryAdded":
            self.messages.append(params["entry"]["text"])
        elif event["method"] == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.messages.append(details.get("exception", {}).get("description", details["text"]))
        elif event["method"] == "Network.requestWillBeSent":
            self.addresses.append(params["request"]["url"])

"""Headless Chromium by its own protocol over two pipes: open a file, ask the page, take pictures. No driver needed."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-extensions --hide-scrollbars --remote-debugging-pipe"
)
PATIENCE_S = 60.0


def found() -> str | None:
    """The program, or None when there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page. `events`: everything the browser said unasked, (method, parameters)."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        ours, self._write = os.pipe()
        self._read, theirs = os.pipe()
        program = found()
        assert program
        # The browser reads from descriptor 3 and writes to 4.
        line = f'exec "$0" "$@" 3<&{ours} 4>&{theirs}'
        flags = [*FLAGS.split(), f"--user-data-dir={self._profile.name}", "about:blank"]
        environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
        self._process = subprocess.Popen(
            ["bash", "-c", line, program, *flags], pass_fds=(ours, theirs), env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(ours)
        os.close(theirs)
        os.set_blocking(self._read, False)
        self._number, self._rest, self._session = 0, b"", ""
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)
        self._profile.cleanup()

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command, wait for its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            for said in self._messages():
                if said.get("id") == self._number:
                    assert "result" in said, said
                    return said["result"]
        raise AssertionError(f"no answer to {method} in {PATIENCE_S:.0f} s")

    def _messages(self) -> list[dict[str, Any]]:
        try:
            self._rest += os.read(self._read, 1 << 20)
        except BlockingIOError:
            time.sleep(0.01)
        *whole, self._rest = self._rest.split(b"\0")
        said = [json.loads(message) for message in whole]
        self.events += [(m["method"], m.get("params", {})) for m in said if "method" in m]
        return said

    def open(self, page: Path, width: int, height: int = 900, dark: bool = False) -> None:
        """Load a file in a window of this size and wait until it is there."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self("Page.navigate", url=page.absolute().as_uri())
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until and not any(name == "Page.loadEventFired" for name, _ in self.events):
            self._messages()
        assert self.ask("document.readyState") == "complete"

    def ask(self, script: str) -> Any:
        """The value of a line of JavaScript in the page."""
        answer = self("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def picture(self, path: Path, whole: bool = True) -> None:
        """The page as a PNG, as far down as it goes, or what the window shows."""
        shot = self("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

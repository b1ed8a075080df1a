"""A headless Chromium that tests drive through its debugging pipe; nothing but Chromium itself is needed.

Commands and answers of the DevTools protocol go through two pipes (file descriptors 3 and 4 of the browser) as JSON
ended by a zero byte. Mouse, touch and keys go in as the browser's own input events, so a page meets what a reader does.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
_MISSING = "no Chromium is installed (Debian's package: chromium)"
# With SAEJAX_NEEDS_CHROMIUM set, as .ci/run sets it, such tests fail where there is none.
needs_chromium = pytest.mark.skipif(not (CHROMIUM or os.environ.get("SAEJAX_NEEDS_CHROMIUM")), reason=_MISSING)
_OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --disable-features=IsolateSandboxedIframes "
    "--remote-debugging-pipe about:blank"
)
# Makes the pipes' ends the descriptors 3 and 4, wherever they were, and becomes the browser.
_START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for number, end in zip((3, 4), ends):
    os.dup2(end, number)
    os.close(end)
os.execv(sys.argv[3], sys.argv[3:])
"""
_KEYS = {"Escape": 27, "Enter": 13, "Backspace": 8, "Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39}
_KEYS |= {"ArrowDown": 40, "End": 35, "Home": 36}


class Browser:
    """One page of a Chromium; ``errors`` collects the page's uncaught exceptions and console errors."""

    def __init__(self, profile: Path):
        read_commands, self._write = os.pipe()
        self._read, write_answers = os.pipe()
        assert CHROMIUM, _MISSING
        start = [sys.executable, "-c", _START, str(read_commands), str(write_answers), CHROMIUM]
        self._process = subprocess.Popen(
            [*start, f"--user-data-dir={profile}", *_OPTIONS.split()],
            pass_fds=(read_commands, write_answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read_commands)
        os.close(write_answers)
        self._left, self._last, self.errors = b"", 0, []
        targets = self.send("Target.getTargets", at_page=False)["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        attached = self.send("Target.attachToTarget", at_page=False, targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, *, at_page: bool = True, **params: Any) -> dict[str, Any]:
        """One command and its answer; events that come meanwhile are looked through for errors."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if at_page:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._last:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._note(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            more = os.read(self._read, 1 << 20)
            assert more, "Chromium has ended"
            self._left += more
        message, self._left = self._left.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"].get("exception", {}).get("description", "exception"))
        elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])

    def js(self, expression: str) -> Any:
        """The value of a JavaScript expression (promises are awaited), as JSON data."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def js_in_frame(self, expression: str) -> Any:
        """The value of an expression about the document of the page's first frame."""
        frame = self.send("Page.getFrameTree")["frameTree"]["childFrames"][0]["frame"]["id"]
        world = self.send("Page.createIsolatedWorld", frameId=frame)["executionContextId"]
        answer = self.send("Runtime.evaluate", expression=expression, contextId=world, returnByValue=True)
        return answer["result"]["value"]

    def wait(self, expression: str, in_frame: bool = False) -> None:
        """Waits until an expression is true; patiently, as the machine may be busy."""
        end, value = time.monotonic() + 300, self.js_in_frame if in_frame else self.js
        while not value(f"Boolean({expression})"):
            assert time.monotonic() < end, f"never became true: {expression}; errors: {self.errors}"
            time.sleep(0.02)

    def settle(self) -> None:
        """Waits until what was asked for is drawn, of the page that comes if this one is left meanwhile."""
        for _ in range(10):
            try:
                return self.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
            except AssertionError as error:
                if "navigated" not in str(error):
                    raise
        raise AssertionError("one page comes after the other")

    def view(self, width: int, height: int, *, dark: bool = False, still: bool = False, phone: bool = False) -> None:
        """Sets the size of the window, and what the reader prefers."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )  # fmt: skip
        self.send("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        motion = {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"}
        self.send("Emulation.setEmulatedMedia", features=[scheme, motion])

    def open(self, address: str) -> None:
        """Loads a page and waits until it is complete."""
        self.errors.clear()
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=address)
        self.wait("location.href !== 'about:blank' && document.readyState === 'complete'")

    def move(self, x: float, y: float) -> None:
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.settle()

    def click(self, x: float, y: float, modifiers: int = 0) -> None:
        """A click of the left button; modifiers: 1 Alt, 2 Control, 4 Meta, 8 Shift."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1, modifiers=modifiers)
        self.settle()

    def click_on(self, selector: str) -> None:
        """Clicks the middle of the first element that a selector names, scrolled into sight, once all is drawn."""
        self.settle()
        place = self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'nearest'});"
            " const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        self.click(*place)

    def tap(self, x: float, y: float) -> None:
        self.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        self.settle()

    def key(self, key: str) -> None:
        code, text = (_KEYS[key], "") if key in _KEYS else (ord(key.upper()), key)
        text = "\r" if key == "Enter" else text
        down = dict(key=key, windowsVirtualKeyCode=code, **(dict(text=text) if text else {}))
        self.send("Input.dispatchKeyEvent", type="keyDown", **down)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)
        self.settle()

    def type(self, text: str) -> None:
        self.send("Input.insertText", text=text)
        self.settle()

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.send("Browser.close", at_page=False)
        try:
            self._process.wait(timeout=600)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser with a profile of its own, closed at the end."""
    browser = Browser(profile)
    try:
        yield browser
    finally:
        browser.close()


def find_cut_off(page: Path, profile: Path, media: str, width: int) -> list[str]:
    """What stands out beyond a page of this width; on a screen tables, code and pictures may scroll, on paper none."""
    kept = "" if media == "print" else "!e.closest('.table, pre, svg') && "
    with chromium(profile) as browser:
        browser.view(width, 800)
        browser.send("Emulation.setEmulatedMedia", media=media)
        browser.open(page.resolve().as_uri())
        return browser.js(
            f"""[...document.querySelectorAll('html, body *')].filter(e => {kept}(e.getBoundingClientRect().right >
              {width + 1} || e === document.documentElement && e.scrollWidth > {width + 1})).map(
              e => e.outerHTML.slice(0, 90))"""
        )


def contrast(a: str, b: str) -> float:
    """WCAG 2 contrast ratio of two colours "#rrggbb"."""
    luminances = []
    for colour in (a, b):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        luminances.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    dark, light = sorted(luminances)
    return (light + 0.05) / (dark + 0.05)

"""Drive a headless Chromium by the DevTools protocol, as a person with a keyboard would.

    with browser(folder) as page:
        page.open("http://127.0.0.1:8808/console")
        page.press("Tab")
        page.type("p001-q1")
        page.until("document.activeElement.id == 'reason'")

Chromium's own sandbox is off, since root can't use it.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from websockets.sync.client import ClientConnection, connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE_S = 30.0
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "Space": 32, "ArrowUp": 38, "ArrowDown": 40}
TEXTS = {"Enter": "\r", "Space": " "}
MEASURE = """
(() => {
const channels = text => text.match(/[\\d.]+/g).map(Number);
const luminance = ([r, g, b]) => [r, g, b].map(c => c / 255)
  .map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
  .reduce((sum, c, n) => sum + c * [.2126, .7152, .0722][n], 0);
const behind = node => {
  for (; node; node = node.parentElement) {
    const found = channels(getComputedStyle(node).backgroundColor);
    if (found.length < 4 || found[3] > 0) return found;
  }
};
const contrast = node => {
  const style = getComputedStyle(node), text = node.closest("svg") ? style.fill : style.color;
  const [low, high] = [channels(text), behind(node)].map(luminance).sort((a, b) => a - b);
  return (high + .05) / (low + .05);
};
const all = [...document.body.querySelectorAll("*:not(script, title)")];
const texts = all.filter(e => [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()));
const scrolling = all.filter(e => /auto|scroll/.test(getComputedStyle(e).overflowX));
return {
  width: innerWidth,
  dark: matchMedia("(prefers-color-scheme: dark)").matches,
  overflow: document.documentElement.scrollWidth - innerWidth,
  contrast: Math.min(...texts.map(contrast)),
  texts: texts.length,
  hidden: texts.filter(e => e.checkVisibility() && e.getBoundingClientRect().width == 0).length,
  unreachable: scrolling.filter(e => e.tabIndex < 0 && !e.querySelector("button, a, input")).length,
  scrolling: scrolling.length,
  reordered: all.filter(e => e.tabIndex > 0).length,
  first: all.find(e => e.tabIndex == 0).className,
  loaded: performance.getEntriesByType("resource").length,
};
})()
"""


class Page:
    """A page of a browser; `events` are what the browser reported of it."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._numbers = itertools.count(1)
        self.events: list[dict[str, Any]] = []

    def send(self, method: str, **given: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        number = next(self._numbers)
        self._connection.send(json.dumps({"id": number, "method": method, "params": given}))
        while True:
            message = json.loads(self._connection.recv(timeout=PATIENCE_S))
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            self.events.append(message)

    def open(self, url: str) -> None:
        """Go to an address, and wait until its page is loaded."""
        assert "errorText" not in self.send("Page.navigate", url=url)
        self.until("document.readyState == 'complete'")

    def value(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        found = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until an expression is true."""
        wait(lambda: bool(self.value(f"Boolean({expression})")), expression)

    def press(self, key: str) -> None:
        """Press and release a key."""
        given = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        text = {"text": TEXTS[key]} if key in TEXTS else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **given, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **given)

    def type(self, text: str) -> None:
        """Enter a text where the focus is."""
        self.send("Input.insertText", text=text)

    def look(self, *, width: int = 1280, dark: bool = False) -> None:
        """Set the size of the window, and the scheme of colours that the person prefers."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        motion = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.send("Emulation.setEmulatedMedia", features=[scheme, motion])

    def measure(self) -> dict[str, Any]:
        """Return what can be measured of the layout: width, contrasts, what scrolls, what is focused."""
        found: dict[str, Any] = self.value(MEASURE)
        return found


def wait(happened: Callable[[], bool], what: str) -> None:
    """Wait until something has happened."""
    end = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.02)


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """Start Chromium with a profile in a folder, and yield its page."""
    profile = folder / "profile"
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--remote-debugging-port=0"]
    process = subprocess.Popen(
        [*command, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with connect(_address(profile), max_size=None, proxy=None) as connection:
            page = Page(connection)
            for domain in ("Page", "Runtime", "Log", "Network"):
                page.send(f"{domain}.enable")
            yield page
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def _address(profile: Path) -> str:
    """Return the address of the first page's DevTools, once Chromium has written its port."""
    port = profile / "DevToolsActivePort"
    wait(lambda: port.exists() and port.read_text().count("\n") > 0, "Chromium's start")
    with urlopen(f"http://127.0.0.1:{port.read_text().splitlines()[0]}/json") as answer:
        targets = json.load(answer)
    (found,) = (each["webSocketDebuggerUrl"] for each in targets if each["type"] == "page")
    return str(found)

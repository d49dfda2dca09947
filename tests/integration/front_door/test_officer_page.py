"""The officer's page in a real Chromium, in light and dark, at the width of a desk and of a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape
from pathlib import Path
from typing import Any

import pytest

from tests.unit.render.test_officer_report import HOSTILE, facts, html

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MEASURE = """
<script>
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
parent.document.title = JSON.stringify({
  width: innerWidth,
  dark: matchMedia("(prefers-color-scheme: dark)").matches,
  overflow: document.documentElement.scrollWidth - innerWidth,
  contrast: Math.min(...texts.map(contrast)),
  texts: texts.length,
  hidden: texts.filter(e => e.checkVisibility() && e.getBoundingClientRect().width == 0).length,
  unreachable: scrolling.filter(e => e.tabIndex < 0).length,
  scrolling: scrolling.length,
  reordered: all.filter(e => e.tabIndex > 0).length,
  first: all.find(e => e.tabIndex == 0).className,
  loaded: performance.getEntriesByType("resource").length,
});
</script>
"""


FRAME = """<!DOCTYPE html><meta name="color-scheme" content="light dark"><title></title>
<iframe srcdoc="{}" style="width: {}px; height: 900px; border: 0"></iframe>"""


def measured(folder: Path, page: str, width: int, *, dark: bool) -> dict[str, Any]:
    """Return what a script finds on a page, in a frame since Chromium's windows have a least width."""
    policy = r'<meta http-equiv="Content-Security-Policy"[^>]*>'  # would not let the script run
    text, count = re.subn(policy, "", page)
    assert count == 1
    frame = folder / "frame.html"
    inner = escape(text.replace("</body>", f"{MEASURE}</body>"))
    frame.write_text(FRAME.format(inner, width), encoding="utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000"]
    command += [*["--force-dark-mode"] * dark, frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    (title,) = re.findall(r"<title>(\{.*?\})</title>", done.stdout)
    found: dict[str, Any] = json.loads(title)
    return found


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_and_can_be_read(tmp_path: Path, width: int, dark: bool) -> None:
    page = html(facts(40, 12, words=max(HOSTILE, key=len) * 3))
    found = measured(tmp_path, page, width, dark=dark)
    assert (found["width"], found["dark"]) == (width, dark)
    assert found["overflow"] <= 0
    assert found["texts"] > 400
    assert found["contrast"] >= 4.5
    assert found["scrolling"] >= 4
    faults = ("unreachable", "reordered", "loaded", "hidden")
    assert {name: found[name] for name in faults} == dict.fromkeys(faults, 0)
    assert found["first"] == "skip"

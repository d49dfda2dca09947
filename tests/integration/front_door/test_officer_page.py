"""The officer's page in a real Chromium, in light and dark, at the width of a desk and of a phone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.models.programs.chromium import CHROMIUM, Page, browser
from tests.unit.render.officer_pages import HOSTILE, facts, html

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """Return a page that shows a report full of hostile words."""
    folder = tmp_path_factory.mktemp("officer")
    file = folder / "report.html"
    file.write_text(html(facts(40, 12, words=max(HOSTILE, key=len) * 3)), encoding="utf-8")
    with browser(folder) as page:
        page.open(file.as_uri())
        yield page


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_and_can_be_read(page: Page, width: int, dark: bool) -> None:
    page.look(width=width, dark=dark)
    found = page.measure()
    assert (found["width"], found["dark"]) == (width, dark)
    assert found["overflow"] <= 0
    assert found["texts"] > 400
    assert found["contrast"] >= 4.5
    assert found["scrolling"] >= 4
    faults = ("unreachable", "reordered", "loaded", "hidden")
    assert {name: found[name] for name in faults} == dict.fromkeys(faults, 0)
    assert found["first"] == "skip"

"""axe-core over the states of the chat page, in each of its looks: it finds nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browsing import LONG, NEEDS_BROWSER, Page
from serving import until

pytestmark = NEEDS_BROWSER
AXE = Path(__file__).parent / "axe_core" / "axe.min.js"
FIND = """
    const done = arguments[arguments.length - 1];
    const targets = (found) => found.nodes.map(({ target, any }) => `${target.join(' ')} ${any[0]?.message ?? ''}`);
    axe.run().then(({ violations }) => done(violations.map((found) => [found.id, ...targets(found)])));
"""
LOOKS = {
    "light": {},
    "dark": {"features": [{"name": "prefers-color-scheme", "value": "dark"}]},
    "phone": {"width": 390, "height": 780, "deviceScaleFactor": 1, "mobile": True},
}


@pytest.fixture(params=LOOKS)
def look(request: pytest.FixtureRequest, page: Page) -> Iterator[str]:
    name, settings = request.param, LOOKS[request.param]
    browser = page.browser
    reduced = {"name": "prefers-reduced-motion", "value": "reduce"}  # a colour in transition is no finding
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [reduced, *settings.get("features", [])]})
    if name == "phone":
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", settings)
    yield name
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_axe_finds_nothing_in_any_state(page: Page, look: str) -> None:
    on_phone = look == "phone"

    def press(selector: str) -> None:
        page.browser.execute_script("document.querySelector(arguments[0]).click()", selector)

    def drawer(opener: str) -> None:
        if on_phone:
            press(opener)

    def read_a_segment() -> None:
        drawer("#toggle-memory")
        press("#strip .compacted .choose")
        until(lambda: "…" not in page.text("#part-text"))

    def search() -> None:
        page.browser.find_element("css selector", "#look-query").send_keys("message\n")
        until(lambda: "the memory found" in page.text("#look-said"))

    def edit() -> None:
        drawer("#close-memory")
        press(".message.user .tools button:nth-child(2)")

    def lose_the_server() -> None:
        press(".edit .plain")
        page.browser.execute_script("window.fetch = async () => { throw new TypeError('Failed to fetch'); }")
        page.type("hello")
        until(lambda: page.all(".failure"))

    states: dict[str, Callable[[], object]] = {
        "empty": lambda: None,
        "long": lambda: page.say("# Title\n" + LONG * 5),
        "a segment": read_a_segment,
        "a search": search,
        "an edit": edit,
        "settings": lambda: press("#open-settings"),
        "settings closed": lambda: press("#settings .plain[value=cancel]"),
        "conversations": lambda: drawer("#open-side"),
        "an error": lambda: (drawer("#close-side"), lose_the_server()),
    }
    found = {}
    for name, reach in states.items():
        reach()
        page.browser.execute_script(f"if (!window.axe) {{ {AXE.read_text()} }}")
        if problems := page.browser.execute_async_script(FIND):
            found[name] = problems
    assert not found

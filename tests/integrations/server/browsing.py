"""The chat page in headless Chromium, for the tests that drive it."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
from serving import Server, until

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
NEEDS_BROWSER = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no Chromium with its driver on this machine"),
]
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1400,900"
)
LONG = "a message which is long enough that some of them fill the cache of this very small model. "


class Page:
    """What a person does with the page."""

    def __init__(self, browser: Any, server: Server) -> None:
        self.browser, self.server = browser, server
        browser.get(server.url)
        until(lambda: self.text("#model") == "tiny")

    def all(self, selector: str) -> list[Any]:
        return list(self.browser.find_elements("css selector", selector))

    def text(self, selector: str) -> str:
        return str(self.browser.execute_script("return document.querySelector(arguments[0])?.textContent", selector))

    def number(self, selector: str) -> int:
        return int(self.text(selector).replace(",", ""))

    def click(self, selector: str) -> None:
        self.browser.find_element("css selector", selector).click()

    def point_at(self, item: Any) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.browser).move_to_element(item).perform()

    def is_writing(self) -> bool:
        return bool(self.browser.execute_script("return document.querySelector('#send').hidden"))

    def type(self, text: str) -> None:
        """Paste a text: the driver would type it letter by letter."""
        paste = "const box = document.querySelector('#input'); box.value = arguments[0]; box.focus()"
        self.browser.execute_script(paste, text)
        self.browser.find_element("css selector", "#input").send_keys("\n")
        until(lambda: self.is_writing() or self.all(".message.assistant, .failure"))

    def say(self, text: str) -> None:
        """Ask, and wait for the whole answer."""
        count = len(self.all(".message.assistant"))
        self.type(text)
        until(lambda: len(self.all(".message.assistant")) > count and not self.is_writing())

    def set_longest_answer(self, num_tokens: int) -> None:
        self.click("#open-settings")
        field = self.browser.find_element("css selector", "#set-max")
        field.clear()
        field.send_keys(str(num_tokens))
        self.click("#settings .primary")
        kept = f'"maxTokens":"{num_tokens}"'
        until(lambda: kept in self.browser.execute_script("return localStorage.getItem('am-memory.settings')"))

    def reload(self) -> None:
        self.browser.refresh()
        until(lambda: self.text("#model") == "tiny")

    def messages(self) -> list[str]:
        found: list[str] = self.browser.execute_script(
            "return [...document.querySelectorAll('.message .body')].map(body => body.textContent)"
        )
        return found

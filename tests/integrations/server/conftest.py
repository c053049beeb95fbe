"""A client of the server, and its page in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from browsing import CHROMIUM, DRIVER, FLAGS, Page
from serving import NewServer, Server


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client()


@pytest.fixture
def http(new_server: NewServer, tmp_path: Path) -> Iterator[httpx.Client]:
    """A client of a server with a store of its own."""
    with new_server(store=tmp_path) as server, server.http() as http:
        yield http


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield browser
    browser.quit()


@pytest.fixture
def page(browser: Any, new_server: NewServer, tmp_path: Path) -> Iterator[Page]:
    """The page on a server of its own, so an origin without data of earlier tests."""
    with new_server(store=tmp_path, max_tokens=20) as server:
        page = Page(browser, server)
        yield page
        problems = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert not [problem for problem in problems if "404" not in problem]
        browser.get("about:blank")

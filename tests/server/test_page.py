"""The page at /, in a browser: a conversation that streams, and the engine beside it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect
from tests.server.conftest import Running

from nanoserve.server.settings import ApiKey

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[[str], Any]]:
    """opened(url) -> a page on which no error may happen."""
    errors: list[str] = []
    contexts = []

    def open_page(url: str) -> Any:
        context = browser.new_context(viewport={"width": 1280, "height": 800})
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "console",
            lambda line: (
                errors.append(line.text)
                if line.type == "error" and "Failed to load" not in line.text
                else None
            ),
        )
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors, errors


def test_a_conversation(served: Running, opened: Callable[[str], Any]) -> None:
    page = opened(served.url)
    expect(page.locator("#model")).to_have_text("tiny")
    page.fill("#input", "def main")
    page.fill("#temperature", "0")
    page.fill("#max-tokens", "40")
    page.click("#send")
    expect(page.locator("#timing")).to_contain_text("per second")
    said = page.locator(".message.assistant").last.inner_text()
    whole = served.post(
        "/v1/chat/completions",
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "def main"}],
            "temperature": 0,
            "max_tokens": 40,
        },
    ).json()
    assert said.strip() == whole["choices"][0]["message"]["content"].strip()
    page.fill("#input", "and then")
    page.press("#input", "Enter")
    expect(page.locator(".message.assistant")).to_have_count(2)
    expect(page.locator("#send")).to_be_enabled()
    assert "40 tokens" in page.inner_text("#timing")
    expect(page.locator("#status")).to_have_text("ready")
    if folder := os.environ.get("NANOSERVE_SCREENSHOTS"):
        page.wait_for_timeout(600)
        page.screenshot(path=str(Path(folder) / "page.png"))
    page.click("#clear")
    assert page.locator(".message").count() == 0


def test_what_the_engine_does_is_drawn(served: Running, opened: Callable[[str], Any]) -> None:
    page = opened(served.url)
    served.complete(prompt="a prompt of some pages, which stay in the tree " * 3, max_tokens=8)
    expect(page.locator("#counts")).to_contain_text("steps")
    for name, least in (("pages", 2), ("tree", 1)):
        page.wait_for_function(
            """([name, least]) => {
              const canvas = document.getElementById(name);
              const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
              const seen = new Set();
              for (let at = 0; at < data.length; at += 4) if (data[at + 3]) seen.add(data[at] + "," + data[at + 1] + "," + data[at + 2]);
              return seen.size >= least;
            }""",
            arg=[name, least],
        )


def test_stop_frees_the_request(
    start: Callable[..., Running], opened: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.server.test_ends import slow_down

    served = start()
    slow_down(served, monkeypatch, 0.01)
    page = opened(served.url)
    expect(page.locator("#model")).to_have_text("tiny")
    page.fill("#max-tokens", "400")
    page.fill("#input", "def main")
    page.click("#send")
    expect(page.locator(".message.assistant")).to_have_text(re.compile("...."))
    page.click("#stop")
    served.wait_until_idle()
    assert served.server.metrics.endings["abort"] == 1


def test_an_error_is_shown(served: Running, opened: Callable[[str], Any]) -> None:
    page = opened(served.url)
    expect(page.locator("#model")).to_have_text("tiny")
    page.fill("#max-tokens", "100000")
    page.fill("#input", "hello")
    page.evaluate("document.getElementById('form').noValidate = true")
    page.click("#send")
    page.wait_for_selector(".message.error")
    assert "max_tokens: 100000" in page.inner_text(".message.error")


def test_a_key_is_asked_for(start: Callable[..., Running], opened: Callable[[str], Any]) -> None:
    served = start(api_keys=(ApiKey("me", "my-secret-key"),))
    page = opened(served.url)
    page.wait_for_selector("#key", state="visible")
    page.fill("#key", "my-secret-key")
    page.press("#key", "Tab")
    expect(page.locator("#model")).to_have_text("tiny")
    expect(page.locator("#status")).to_have_text("ready")

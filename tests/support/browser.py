"""A page in headless Chromium, and what tests do there and read there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = Path("/usr/bin/chromium")
CHROMEDRIVER = Path("/usr/bin/chromedriver")
_ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1200,800", "--force-device-scale-factor=1",
]  # fmt: skip
_SECONDS = 30
_NOTE_WHAT_IS_WAITED_FOR = """
{
  const { setTimeout, clearTimeout, requestAnimationFrame } = window;
  const waiting = window.waiting = { for: new Set(), frame: (act) => requestAnimationFrame(act) };
  const noted = (ask, act, ...more) => {
    const key = {};
    waiting.for.add(key);
    key.id = ask((...values) => { waiting.for.delete(key); act(...values); }, ...more);
    return key;
  };
  window.setTimeout = (act, after) => noted(setTimeout, act, after);
  window.clearTimeout = (key) => { waiting.for.delete(key); clearTimeout(key?.id); };
  window.requestAnimationFrame = (act) => noted(requestAnimationFrame, act);
}
"""
"""Runs before the page: it notes timers and frames that the page has asked for."""


def missing_browser() -> str | None:
    """What of the browser is not there; None if it is."""
    return next((f"there is no {path}" for path in (CHROMIUM, CHROMEDRIVER) if not path.exists()), None)


def require_browser() -> None:
    """Skip the test where there is no browser; where CI is set, fail."""
    if missing := missing_browser():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{missing}: apt-get install chromium chromium-driver")


@contextlib.contextmanager
def browser(*arguments: str) -> Iterator[Any]:
    """A driver of a browser with a profile of its own, which records what is asked of networks and what goes wrong."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    profile = tempfile.mkdtemp(prefix="chromium-")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in (*_ARGUMENTS, f"--user-data-dir={profile}", *arguments):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(CHROMEDRIVER)))
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": _NOTE_WHAT_IS_WAITED_FOR})
    try:
        yield driver
    finally:
        driver.quit()
        shutil.rmtree(profile, ignore_errors=True)


@dataclass(frozen=True)
class Item:
    """One segment of the tree as the page shows it: where its box is, in pixels and rows."""

    node: int
    x: float
    width: float
    row: float
    words: str
    is_selected: bool


class PageInBrowser:
    """One page, and what somebody does there."""

    def __init__(self, driver: Any, path: Path) -> None:
        self.driver, self.url = driver, path.as_uri()
        driver.get("about:blank")  # what a new tab asks for is not the page's
        driver.get_log("browser")
        driver.get_log("performance")
        driver.get(self.url)

    def wait(self, condition: str) -> Any:
        """Wait until a JavaScript expression is true, and return its value."""
        from selenium.webdriver.support.wait import WebDriverWait

        return WebDriverWait(self.driver, _SECONDS, poll_frequency=0.05).until(lambda _: self.ask(condition))

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        return self.driver.execute_script(f"return ({expression})")

    def settle(self) -> None:
        """Wait until what was asked for is drawn and mirrored: until the page has waited for nothing in some frames."""
        self.wait("document.querySelector('canvas').dataset.isReady")
        self.driver.execute_async_script(
            "const done = arguments[0];"
            "const look = (num) => num > 3 ? done() : waiting.frame(() => look(waiting.for.size ? 0 : num + 1));"
            "look(0);"
        )

    def items(self) -> dict[int, Item]:
        """The segments that are drawn, by their number."""
        self.settle()
        found = self.ask(
            "[...document.querySelectorAll('canvas [role=treeitem]')]"
            ".map(each => [{...each.dataset}, each.textContent, each.ariaSelected])"
        )
        return {
            int(data["node"]): Item(
                int(data["node"]), float(data["x"]), float(data["width"]), float(data["row"]), words, selected == "true"
            )
            for data, words, selected in found
        }

    def state(self) -> dict[str, Any]:
        """What the canvas says that it shows."""
        self.settle()
        state: dict[str, Any] = self.ask("({...document.querySelector('canvas').dataset})")
        return state

    def element(self, selector: str) -> Any:
        """One element, by a CSS selector."""
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        """All the text of an element, whether or not it can be seen."""
        return str(self.element(selector).get_property("textContent"))

    def press(self, *keys: str) -> None:
        """Press keys, wherever the focus is."""
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def press_shifted(self, key: str) -> None:
        """Press a key together with Shift."""
        from selenium.webdriver import ActionChains
        from selenium.webdriver.common.keys import Keys

        ActionChains(self.driver).key_down(Keys.SHIFT).send_keys(key).key_up(Keys.SHIFT).perform()

    def click_box(self, item: Item) -> None:
        """Click into the middle of the box of a segment."""
        from selenium.webdriver import ActionChains

        canvas = self.element("canvas")
        x = item.x + item.width / 2 - canvas.size["width"] / 2
        y = (item.row + 0.5) * 24 - canvas.size["height"] / 2
        ActionChains(self.driver).move_to_element_with_offset(canvas, round(x), round(y)).click().perform()

    def choose(self, selector: str, value: str) -> None:
        """Choose from a list."""
        from selenium.webdriver.support.select import Select

        Select(self.element(selector)).select_by_value(value)

    def facts(self) -> dict[str, str]:
        """What the panel says of the selected segment."""
        names = self.ask("[...document.querySelectorAll('#facts dt')].map(each => each.textContent)")
        words = self.ask("[...document.querySelectorAll('#facts dd')].map(each => each.textContent)")
        return dict(zip(names, words, strict=True))

    def complaints(self) -> list[str]:
        """What the browser had to say: errors, refused requests, broken policies."""
        entries = self.driver.get_log("browser")
        # That a test reads pixels is no fault of the page.
        return [str(entry["message"]) for entry in entries if "getImageData" not in entry["message"]]

    def requests(self) -> set[str]:
        """Everything that was asked for since the page was opened."""
        messages = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        return {
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        }

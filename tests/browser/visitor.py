"""A person at the app: opens it, presses, waits; and what the browser had to say about it."""

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Locator, Request, Route, expect

SHOTS = Path(__file__).parent / "shots"
PATIENCE = 120_000
"""Milliseconds that a run may take on a busy machine."""
TABS = ("generate", "compare", "explore", "edit", "gallery", "methods")
PROMPT = "a red house left of two pine trees"
WATCH = """() => {
  window.seen = [];
  const look = () => {
    const text = document.querySelector("#progress")?.innerText ?? "";
    const picture = document.querySelector("#preview img");
    const size = picture ? [picture.naturalWidth, picture.naturalHeight] : null;
    window.seen.push({ text, size });
  };
  const options = { childList: true, characterData: true, attributes: true, subtree: true };
  new MutationObserver(look).observe(document.body, options);
}"""
"""Keeps what progress and preview show, at each change of the page."""
BEGINS = """(id) => {
  window.began = false;
  const look = () => { window.began ||= document.getElementById(id).disabled; };
  const options = { attributes: true, subtree: true, attributeFilter: ["disabled"] };
  new MutationObserver(look).observe(document.body, options);
}"""
"""Notes that a button was disabled once, however short."""
OVERFLOW = "() => document.documentElement.scrollWidth - window.innerWidth"


class Visitor:
    """A browser window without history, and what is done in it.

    Args:
        browser: Where the window opens.
        address: Of the app.
        options: Of the window: its size, the colours that are preferred, what is kept from before.
    """

    def __init__(self, browser: Browser, address: str, **options: Any) -> None:
        self.address = address
        self.wrong: list[str] = []
        window = {"viewport": {"width": 1280, "height": 900}, "locale": "en-GB", **options}
        self.context = browser.new_context(**window)
        self.context.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        self.context.route("**/*", self._pass)
        self.context.add_init_script(
            "addEventListener('securitypolicyviolation', (e) => console.error("
            "`blocked by policy: ${e.violatedDirective} ${e.blockedURI}`));"
        )
        self.page = self.context.new_page()
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.wrong.append(f"script: {error}"))
        self.page.on("requestfailed", self._failed)
        self.open()

    def _pass(self, route: Route) -> None:
        if urlsplit(route.request.url).netloc == urlsplit(self.address).netloc:
            route.continue_()
        else:
            self.wrong.append(f"leaves the machine: {route.request.url}")
            route.abort()

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.wrong.append(f"console: {message.text} ({message.location['url']})")

    def _failed(self, request: Request) -> None:
        if request.failure != "net::ERR_ABORTED":
            self.wrong.append(f"{request.url}: {request.failure}")

    def leave(self) -> None:
        """Close the window; nothing may have gone wrong in it."""
        self.context.close()
        assert not self.wrong, self.wrong

    def told(self) -> str:
        """What the page says at this moment: what a person sees where a test has failed."""
        shown = self.page.locator("body").inner_text(timeout=5_000)
        return f"{self.address} shows:\n{shown}\n{self.wrong}\n"

    def open(self) -> None:
        """Load the page (anew), and wait until it can be used."""
        heard = len(self.wrong)
        self.page.goto(self.address, wait_until="commit")
        del self.wrong[heard:]  # of the page that was left: its connections end
        expect(self.at("generate")).to_be_enabled(timeout=PATIENCE)
        expect(self.into("steps")).to_have_attribute("placeholder", re.compile(r"\d"))

    def at(self, id: str) -> Locator:
        """What carries an id of the page."""
        return self.page.locator(f"#{id}")

    def into(self, id: str) -> Locator:
        """The box of a field, to type into."""
        return self.page.locator(f"#{id} :is(input, textarea)").first

    def turn_to(self, tab: str) -> None:
        """Choose a tab; on a narrow screen some are in a menu."""
        wanted = self.page.get_by_role("tab", name=tab.capitalize(), exact=True).first
        if not wanted.is_visible():
            self.page.get_by_role("button", name="More tabs").click()
            wanted = self.page.locator(".overflow-menu button", has_text=tab.capitalize())
        wanted.click()
        expect(self.at(f"tab-{tab}")).to_be_visible()

    def ask(self, **settings: str) -> None:
        """Type settings into their boxes."""
        for name, value in settings.items():
            self.into(name.replace("_", "-")).fill(value)

    def choose(self, id: str, option: str) -> None:
        """Choose of a list, which is narrowed by typing."""
        self.into(id).click()
        self.into(id).select_text()
        self.into(id).press_sequentially(option)
        self.page.get_by_role("option", name=option, exact=False).first.click()

    def goal(self, name: str) -> None:
        """Choose a goal."""
        self.page.locator(f'#goal input[value="{name}"]').check()

    def lock(self, seed: int) -> None:
        """Keep a seed."""
        self.into("seed").fill(str(seed))
        self.page.locator("#seed-lock input").check()

    def generate(self) -> None:
        """Run, and wait for the end."""
        self.press("generate")
        self.ended()

    def press(self, id: str) -> None:
        """Begin something with a button that cannot be pressed while it runs."""
        self.page.evaluate(BEGINS, id)
        self.at(id).click()

    def ended(self, id: str = "generate") -> None:
        """Wait until what was begun has ended."""
        self.page.wait_for_function("() => window.began")
        expect(self.at(id)).to_be_enabled()

    def picture(self) -> bytes:
        """The file of the picture that is shown, as the browser gets it."""
        shown = self.page.locator("#result img").first
        expect(shown).to_be_visible(timeout=PATIENCE)
        found = self.context.request.get(shown.get_attribute("src") or "")
        assert found.ok, found.status
        return found.body()

    def jobs(self) -> list[dict[str, Any]]:
        """All jobs, the newest first, by the REST interface."""
        found = json.loads(self.context.request.get(f"{self.address}/api/v1/jobs").text())
        return [job for job in found if job["kind"] != "measure"]

    def shoot(self, name: str) -> None:
        """Keep a picture of the whole page."""
        SHOTS.mkdir(exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{name}.png", full_page=True)

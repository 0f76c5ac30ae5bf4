"""A login in a real browser: nothing without it, out again by a button."""

from pathlib import Path

from playwright.sync_api import Browser, expect

from app import accounts
from browser.conftest import served
from browser.visitor import PATIENCE


def test_a_person_logs_in_sees_the_name_and_logs_out(browser: Browser, tmp_path: Path) -> None:
    accounts.add(tmp_path / "people", "ada", "a password of length")
    with served(tmp_path, "--auth", "people") as address, browser.new_context() as context:
        page = context.new_page()
        page.goto(address)
        assert page.url.endswith("/login"), "nothing is shown without a login"
        page.get_by_label("Name").fill("ada")
        page.get_by_label("Password").fill("wrong")
        page.get_by_role("button", name="Log in").click()
        expect(page.get_by_role("alert")).to_be_visible(timeout=PATIENCE)
        page.get_by_label("Name").fill("ada")
        page.get_by_label("Password").fill("a password of length")
        page.get_by_role("button", name="Log in").click()
        expect(page.locator("#person")).to_contain_text("Logged in as ada", timeout=PATIENCE)
        page.get_by_role("button", name="Log out").click()
        expect(page.get_by_role("button", name="Log in")).to_be_visible(timeout=PATIENCE)
        page.goto(address)
        assert page.url.endswith("/login")

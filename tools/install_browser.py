"""Installs Debian's Chromium where no Chromium is found, and says where one is.

    python tools/install_browser.py

For the tests of the pages in a browser (``tests/browser``), which drive it with Playwright:
Playwright's own download of a browser is not needed, and not used.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
UPDATE = ("apt-get", "update", "-q")
INSTALL = ("apt-get", "install", "-q", "-y", "--no-install-recommends", "chromium", "fonts-dejavu")


def found() -> str | None:
    """The path of a Chromium, or ``None``."""
    return next((path for path in map(shutil.which, NAMES) if path is not None), None)


def main() -> None:
    """Install it if it is missing, and write its path to standard output."""
    if found() is None:
        if shutil.which("apt-get") is None:
            raise SystemExit("There is no apt-get here: install Chromium so that it is on PATH.")
        for command in (UPDATE, INSTALL):
            if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
                raise SystemExit(f"{' '.join(command)} failed: run it as root, then this again.")
    path = found()
    if path is None:
        raise SystemExit("The package chromium has no program of that name: put one on PATH.")
    print(path)


if __name__ == "__main__":
    main()

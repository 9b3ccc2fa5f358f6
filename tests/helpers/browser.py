"""Opens pages in Chromium without a window, where it is installed."""

import os
import shutil
import subprocess
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)


def open_page(page: Path, *options: str, dark: bool = False) -> str:
    """Open a file in a browser that reaches no network; return what it prints, and what pages log."""
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    profile = page.parent / f"profile-{os.getpid()}"
    words = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", "--enable-logging=stderr", "--v=0"),
        *(*scheme, *options, page.resolve().as_uri()),
    ]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    finally:
        shutil.rmtree(profile, ignore_errors=True)
    return done.stdout + "".join(line + "\n" for line in done.stderr.splitlines() if "CONSOLE" in line)

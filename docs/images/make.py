"""Takes the README's picture of a run's report: python docs/images/make.py runs/laptop (needs Chromium or Chrome)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

PICTURE = Path(__file__).with_name("report.png")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main(run: Path) -> None:
    """Photograph the top of RUN/report/index.html, in light colours."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"no browser found: install one of {', '.join(BROWSERS)}")
    flags = ["--headless=new", "--no-sandbox", "--hide-scrollbars", "--window-size=1240,1700"]
    page = (run / "report/index.html").resolve(strict=True).as_uri()
    subprocess.run([browser, *flags, f"--screenshot={PICTURE}", page], check=True, capture_output=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

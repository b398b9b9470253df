"""Take the picture of the report that the pages show: `python -m docs.screenshot runs/quickstart/report.html`.

It needs Chromium. Take it from a run on a machine with nothing else to do.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.browser import Browser

PICTURE = Path(__file__).parent / "images" / "report.png"
WIDTH, HEIGHT = 960, 1280


def main() -> None:
    """The first screen, in light colours."""
    with Browser() as browser:
        browser.open(Path(sys.argv[1]), width=WIDTH).picture(PICTURE, height=HEIGHT)
    print(f"{PICTURE}: {PICTURE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

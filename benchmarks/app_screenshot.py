"""The picture of ``toma-fx app`` in the documentation, taken in a headless Chromium.

    python -m benchmarks.app_screenshot docs/images/app.png

It draws with the small SDXL, in the repository's folder.
"""

import re
import shutil
import subprocess
import sys

from playwright.sync_api import sync_playwright

PROMPT = "a large green square on a striped brown ground under a blue sky"
SEED = "1"


def main() -> None:
    """Start the page, draw, and save a picture of it."""
    command = [sys.executable, "-m", "toma_fx", "app"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://\S+", server.stdout.readline())
            assert found is not None, "the page did not start"
            shoot(found[0], sys.argv[1])
        finally:
            server.terminate()


def shoot(url: str, file: str) -> None:
    """Fill in the page at ``url``, draw, and save a picture of it."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(url)
        page.get_by_label("Prompt").fill(PROMPT)
        page.get_by_label("Seed").fill(SEED)
        page.get_by_role("button", name="Draw both").click()
        page.wait_for_selector("#figures table", timeout=300_000)
        page.mouse.move(0, 0)
        page.wait_for_timeout(3000)  # until the pictures are there and the progress bar has faded
        page.screenshot(path=file, full_page=True)
        browser.close()


if __name__ == "__main__":
    main()

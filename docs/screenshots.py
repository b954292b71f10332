"""Makes docs/images/*.png: python docs/screenshots.py RUNS, a folder with the runs that are named below."""

from __future__ import annotations

import shutil
import sys
import threading
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from treegym.agents import Run
from treegym.envs import DeskEnv
from treegym.envs.desk.html import written
from treegym.scenarios.viewer.shelf import Shelf
from treegym.scenarios.viewer.site import serve

IMAGES = Path(__file__).parent / "images"
BROWSER = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
PAGES = {  # file: (address, theme, height)
    "runs": ("#runs?run=maze-arpo-0&with=maze-tree_grpo-0", "light", 780),
    "trees": ("#trees?run=maze-arpo-0&stage=improvement&success=mixed&order=-nodes", "light", 560),
    "tree": ("#tree?run=factsearch-arpo-0&tree=142&node=2", "dark", 640),
    "episode": ("#episode?run=factsearch-0&tree=847&rollout=1&turn=3", "light", 780),
    "compare": ("#compare?a=factsearch-0:847.0&b=factsearch-0:847.1", "light", 760),
}


def main(runs: Path) -> None:
    IMAGES.mkdir(exist_ok=True)
    with serve(Shelf(runs, lambda path: Run(path).trees)) as server, sync_playwright() as playwright:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=BROWSER)
        for name, (address, theme, height) in PAGES.items():
            page = browser.new_page(viewport={"width": 1280, "height": height}, color_scheme=theme)
            page.set_default_timeout(120_000)  # ms
            page.goto(server.url + address)
            page.wait_for_selector("main[aria-busy=false]:not(:has([aria-busy=true]))")
            page.screenshot(path=IMAGES / f"{name}.png")
            page.close()
        shop(browser)
        browser.close()
        server.shutdown()


def shop(browser: Browser) -> None:
    """A page of the desk as Chromium shows it; docs/gui.md has its text beside it."""
    env = DeskEnv()
    env.reset(seed=4, options={"template": "shop_order"})
    for _ in range(4):
        env.step(str(env.oracle()))
    page = browser.new_page(viewport={"width": 640, "height": 400})
    page.set_content(written(env.current))
    page.screenshot(path=IMAGES / "shop.png")
    page.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

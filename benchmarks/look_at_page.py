"""Does a page fit its window? Screenshots in Chromium at two widths, light and dark, with and without scripts.

Not in CI: it needs a browser (``chromium`` of Debian). Give pages that ``--html`` wrote. Prints one JSON line for each
screenshot, and ends with status 1 if something is wider than the window.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

WIDTHS = (1280, 390)
HEIGHT = 1500
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Chromium makes no window narrower than 500 pixels: the page is shown in a frame of the right width instead.
FRAME = """<!DOCTYPE html><html><head><meta charset="utf-8"><style>body {{ margin: 0; background: #888; }}
iframe {{ border: 0; display: block; width: {width}px; height: {height}px; background: #fff; }}</style></head>
<body><iframe src="page.html"{sandbox}></iframe></body></html>"""
# Asks a page how wide it is, and which elements outside of what scrolls reach beyond its window.
PROBE = """<script>addEventListener("load", () => {
const wide = document.documentElement.clientWidth, found = [];
for (const e of document.body.querySelectorAll("*")) {
  const box = e.getBoundingClientRect();
  const name = e.tagName + "." + (e.getAttribute("class") || "");
  if (box.width && box.right > wide + 1 && !e.closest(".scroll")) found.push(name);
}
const report = JSON.stringify({window: wide, page: document.documentElement.scrollWidth, beyond: found.slice(0, 8)});
(parent === window ? document : parent.document).documentElement.dataset.probe = report; });</script>"""


def browser() -> str:
    """Return the browser that is installed."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        sys.exit(f"no browser was found; looked for {', '.join(NAMES)}. Install one: apt-get install chromium")
    return found


def run(program: str, folder: Path, width: int, *arguments: str) -> str:
    """Run Chromium without a window, and return what it printed."""
    common = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    common += [
        "--disable-web-security",
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={max(width, 500)},{HEIGHT}",
    ]
    command = [program, *common, *arguments, (folder / "frame.html").as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


def look(program: str, page: Path, output: Path) -> bool:
    """Take the screenshots of a page, and return whether it fits."""
    text = page.read_text(encoding="utf-8")
    fits = True
    for width in WIDTHS:
        for scripts in (True, False):
            for theme in ("light", "dark"):
                with tempfile.TemporaryDirectory() as made:
                    folder = Path(made)
                    (folder / "page.html").write_text(text, encoding="utf-8")
                    sandbox = "" if scripts else ' sandbox="allow-same-origin"'
                    (folder / "frame.html").write_text(FRAME.format(width=width, height=HEIGHT, sandbox=sandbox))
                    name = f"{page.stem}-{width}-{'scripts' if scripts else 'plain'}-{theme}.png"
                    dark = ["--blink-settings=preferredColorScheme=0"] if theme == "dark" else []
                    run(program, folder, width, f"--screenshot={(output / name).resolve()}", *dark)
                    row = {"page": page.name, "width": width, "scripts": scripts, "theme": theme, "file": name}
                    row["written"] = (output / name).is_file()
                    fits &= bool(row["written"])
                    if scripts and theme == "light":  # the probe is a script of its own, which the page must allow
                        open_page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
                        (folder / "page.html").write_text(open_page.replace("</body>", PROBE + "</body>"))
                        dom = run(program, folder, width, "--dump-dom", "--virtual-time-budget=3000")
                        found = re.search(r"data-probe=\"([^\"]*)\"", dom)
                        probe = json.loads(found[1].replace("&quot;", '"')) if found else {"page": 1, "window": 0}
                        row["probe"] = probe
                        fits &= probe["page"] <= probe["window"] and not probe["beyond"]
                    print(json.dumps(row), flush=True)
    return fits


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="+", type=Path, help="HTML files")
    parser.add_argument("--output", type=Path, default=Path("build/pages"), help="folder of the screenshots")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    chromium = browser()
    results = [look(chromium, page, options.output) for page in options.pages]
    sys.exit(0 if all(results) else 1)

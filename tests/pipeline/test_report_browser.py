"""The report as a browser shows it, where there is one: Chromium or Chrome on the path, or named by PYROBC_BROWSER."""

import json
import os
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest

from pyrobc.report import write_report

BROWSER = os.environ.get("PYROBC_BROWSER") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium found; install one, or set PYROBC_BROWSER")

FRAME = """<iframe src="{page}" width="{width}" height="800"></iframe>"""
WRAPPER = """<!doctype html><body>{frames}<p id="seen"></p><script>
window.onload = () => {{
  const look = (frame) => {{
    const page = frame.contentDocument, style = getComputedStyle(page.body);
    const figures = [...page.querySelectorAll("figure svg")];
    return {{
      inner: page.documentElement.clientWidth, outer: page.documentElement.scrollWidth,
      loaded: frame.contentWindow.performance.getEntriesByType("resource").map((entry) => entry.name),
      figures: figures.length, narrowest: Math.min(...figures.map((svg) => svg.getBoundingClientRect().width)),
      paper: style.backgroundColor, ink: style.color,
      text: figures.length ? getComputedStyle(figures[0].querySelector("text")).fill : "",
    }};
  }};
  document.getElementById("seen").textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(look));
}};</script></body>"""


def browse(folder, *options, url):
    """What the browser prints and says; its profile lies in ``folder``."""
    command = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
        "--allow-file-access-from-files", "--hide-scrollbars", "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}", *options, url,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def look(folder, page, *options):
    """What two frames of a telephone's and a screen's width see of the page, and what the console said."""
    wrapper = folder / "wrapper.html"
    wrapper.write_text(WRAPPER.format(frames="".join(FRAME.format(page=page, width=w) for w in (390, 1280))))
    text, said = browse(folder, "--dump-dom", *options, url=wrapper.as_uri())
    seen = re.search(r'<p id="seen">(.*?)</p>', text)
    assert seen is not None, text
    return json.loads(seen[1]), [line for line in said.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def folder(compressed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    write_report(SimpleNamespace(**vars(compressed)), folder / "report.html")
    return folder


def channels(colour):
    return np.array([float(part) for part in re.findall(r"[\d.]+", colour)][:3])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_and_can_be_read(folder, scheme):
    """At both widths nothing sticks out, nothing is loaded, the console is silent, and the ink stands out."""
    dark = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    frames, console = look(folder, "report.html", *dark)
    assert console == []
    for frame, width in zip(frames, (390, 1280), strict=True):
        assert frame["loaded"] == []
        assert frame["outer"] <= frame["inner"] <= width
        assert frame["figures"] >= 6 and frame["narrowest"] > 300
        paper, ink = channels(frame["paper"]), channels(frame["ink"])
        assert (paper.mean() < 60) == (scheme == "dark")
        assert abs(paper - ink).min() > 150
        assert abs(channels(frame["text"]) - ink).max() == 0, "figures take the page's ink"


def test_the_look_would_see_what_it_looks_for(folder):
    (folder / "bad.html").write_text(
        '<!doctype html><body><img src="http://pyrobc.invalid/x.png"><div style="width:2000px">x</div>'
        "<script>console.error('broken')</script></body>"
    )
    (first, _), console = look(folder, "bad.html")
    assert first["loaded"] == ["http://pyrobc.invalid/x.png"]
    assert first["outer"] > first["inner"]
    assert any("broken" in line for line in console)


@pytest.mark.parametrize("width", [390, 1280])
def test_screenshots_are_pictures(folder, width):
    image = pytest.importorskip("matplotlib.image")
    picture = folder / f"{width}.png"
    browse(folder, f"--window-size={width},1600", f"--screenshot={picture}", url=(folder / "report.html").as_uri())
    pixels = image.imread(picture)[..., :3]
    assert pixels.shape[:2] == (1600, width)
    assert (pixels[0, 0] == 1).all() and 0.02 < (pixels.min(axis=2) < 0.9).mean() < 0.6

"""One small figure under a style of its own; matplotlib's settings are put back, and no backend is chosen."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from pyrobc.errors import MissingExtraError

__all__ = ["COLOURS", "INK", "POINTS_WIDE", "Canvas", "Drawing", "draw_on"]

COLOURS = {"keep": "#3f86c9", "prune": "#d27d2d", "abstain": "#9b63b8"}
"""By outcome; of middle lightness, so that they stand out from white and from near-black."""

INK = "#010203"
"""Stands for the page's text colour."""

POINTS_WIDE = 338
"""Width of a figure that the page shows whole on a telephone; wider ones are scrolled."""

_POINTS_PER_INCH = 72
_STYLE = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "axes.titlesize": 9.5,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "axes.linewidth": 0.7,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}  # fmt: skip


class Drawing(NamedTuple):
    """A finished figure.

    Attributes:
        name: prefix of all ids in it.
        svg: its markup, without a size of its own.
        words: what it shows, for those who cannot see it.
        width: in points.
    """

    name: str
    svg: str
    words: str
    width: int


class Canvas:
    """What ``draw_on`` hands out: axes to draw on, and the words to set; then ``drawing``."""

    def __init__(self, figure: Any, axes: Any) -> None:
        self.figure, self.axes = figure, axes
        self.words = ""
        self.drawing = Drawing("", "", "", 0)


@contextmanager
def draw_on(
    name: str, panels: int = 1, *, width: int = POINTS_WIDE, height: int = 216, **grid: Any
) -> Iterator[Canvas]:
    """A row of panels; sizes in points, ``grid`` for ``Figure.subplots``.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError.of("matplotlib", "plots", "figures") from error
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(width / _POINTS_PER_INCH, height / _POINTS_PER_INCH), layout="constrained")
        figure.patch.set_alpha(0.0)
        canvas = Canvas(figure, figure.subplots(1, panels, squeeze=False, **grid)[0])
        for ax in canvas.axes:
            ax.patch.set_alpha(0.0)
        yield canvas
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    canvas.drawing = Drawing(name, _make_inline(text.getvalue(), name, canvas.words), canvas.words, width)


def _make_inline(svg: str, name: str, words: str) -> str:
    """Drop the XML preamble and fixed size, take the ink from the page, and keep ids apart from other figures'."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    label = html.escape(words, quote=True).replace("\\", r"\\")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 role="img" aria-label="{label}"', svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)

"""The report's figures: SVG text that takes its ink from the page, be it light or dark (extra ``plots``)."""

from pyrobc.figures.canvas import COLOURS, Drawing
from pyrobc.figures.changes import draw_bits, draw_calibration, draw_shifts
from pyrobc.figures.checks import draw_candidates, draw_khats, draw_training
from pyrobc.figures.decisions import draw_odds_sensitivity, draw_rope_sensitivity, draw_scores
from pyrobc.figures.network import draw_network
from pyrobc.figures.posteriors import draw_forest

__all__ = [
    "COLOURS",
    "Drawing",
    "draw_bits",
    "draw_calibration",
    "draw_candidates",
    "draw_forest",
    "draw_khats",
    "draw_network",
    "draw_odds_sensitivity",
    "draw_rope_sensitivity",
    "draw_scores",
    "draw_shifts",
    "draw_training",
]

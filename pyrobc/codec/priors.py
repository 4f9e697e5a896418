"""Where the online models of ``codec.sparse`` start: weights fitted to pruned networks; they are part of the format."""

from __future__ import annotations

from pyrobc.codec.logistic import ln

__all__ = ["KINDS", "LEVELS", "MASK_WEIGHTS", "SIGN_WEIGHTS", "SIZE_WEIGHTS", "find_level"]

KINDS = ("image", "kernel", "map", "flat", "out", "pixels", "vector")
LEVELS = [-6.0 + 0.625 * i for i in range(16)]
"""Log odds of an entry that a matrix may start with."""
MASK_WEIGHTS: dict[str, list[float]] = {
    "image": [
        -1.19,
        0.71,
        0.61,
        0.27,
        0.07,
        0.99,
        0.0,
        -0.39,
        -0.83,
        0.81,
        0.0,
        -0.12,
        0.44,
        -1.47,
        -0.12,
        -0.13,
        0.03,
        -0.21,
        -0.41,
        0.13,
        -0.3,
        0.12,
        1.0,
    ],  # fmt: skip
    "kernel": [
        -0.56,
        0.98,
        0.24,
        -0.04,
        0.33,
        -0.65,
        1.72,
        0.0,
        -0.43,
        0.46,
        -0.05,
        -0.03,
        0.81,
        -0.12,
        0.37,
        0.16,
        0.0,
        -0.25,
        -0.2,
        0.09,
        0.04,
        -0.07,
        0.05,
    ],  # fmt: skip
    "map": [
        -0.26,
        0.9,
        0.94,
        0.48,
        0.08,
        -1.09,
        1.31,
        0.0,
        -0.14,
        0.22,
        -0.03,
        0.07,
        0.48,
        0.0,
        0.08,
        0.01,
        -0.14,
        -0.08,
        -0.06,
        -0.09,
        -0.07,
        -0.24,
        0.02,
    ],  # fmt: skip
    "flat": [-0.21, 0.96, 0.9, 0.37, 0.28, 0.03, 0.81, 0.0, 0.2, 0.0, 0.0, -0.05],
    "out": [0.26, 0.9, 0.12, -0.47, -0.13, 0.97, 1.68, 0.0, 0.01, 0.0, 0.0, -0.34],
    "pixels": [
        -0.62,
        0.68,
        0.0,
        0.0,
        -0.62,
        0.0,
        0.0,
        -0.61,
        -0.78,
        1.35,
        0.0,
        -2.04,
        0.1,
        -0.15,
        0.12,
        0.08,
        0.1,
        0.09,
        0.11,
        0.32,
        0.02,
        0.26,
        0.15,
    ],  # fmt: skip
    "vector": [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.6],
}
SIGN_WEIGHTS: dict[str, list[float]] = {
    "image": [0.11, -0.66, 0.07, 1.78, 3.7, 1.79, 2.87, 3.32, -0.2],
    "kernel": [-0.16, -0.08, 0.13, 0.69, 2.52, 0.55, 0.99, 1.06, -0.69],
    "map": [0.4, 0.01, 0.23, 0.23, 2.09, -0.44, 1.0, 0.74, -0.73],
    "flat": [0.77, -0.1, -0.48],
    "out": [-0.45, -0.21, -1.9],
    "pixels": [],
    "vector": [],
}
SIZE_WEIGHTS: dict[str, list[float]] = {
    "image": [1.02, -1.07, 2.09, 3.96],
    "kernel": [0.95, 0.01, 1.12, 2.09],
    "map": [1.0, 0.17, 2.3, 1.03],
    "flat": [1.06, 1.88, 2.97],
    "out": [0.93, 0.22, 1.42],
    "pixels": [1.0, 0.3],
    "vector": [1.0, 0.3],
}
"""By kind of geometry, in the order of the features; what is left out is zero."""


def find_level(ones: int, count: int) -> int:
    """The level nearest to the log odds of ``ones`` among ``count``, halves added."""
    odds = ln((ones + 0.5) / (count - ones + 0.5))
    return min(range(len(LEVELS)), key=lambda i: abs(LEVELS[i] - odds))

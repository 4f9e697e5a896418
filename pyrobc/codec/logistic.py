r"""Logarithms and the logistic function, the same to the last bit on every machine.

What a decoder predicts must be what the encoder predicted, and the last bit of ``exp`` and ``log`` differs between
libraries.  Here both are tables, made and looked up with additions, products and quotients alone, which IEEE machines
round alike.

* ``ln``: :math:`x = m 2^e, m \in [\tfrac12, 1)`; :math:`\ln x = e\ln 2 + \ln m`, with :math:`\ln m` at the middle of
  one of 2048 cells.  Neighbouring middles :math:`a < b` differ by :math:`\ln b - \ln a = 2\,\mathrm{artanh}\,y,\ y =
  (b-a)/(b+a)`, of which two terms of the series are exact to :math:`10^{-19}`.  The error is at most
  :math:`2.5\cdot10^{-4}`.
* ``squash``: :math:`1/(1 + e^{-x})` in multiples of :math:`2^{-16}` at the middle of cells of 1/128, for
  :math:`|x| < 11`; odds of neighbouring cells have the ratio :math:`e^{1/128}`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["CELLS", "LIMIT", "LN2", "LN_TABLE", "ONES", "ln", "ln_array", "squash"]

Floats = NDArray[np.float64]
LN2 = 0.6931471805599453
LIMIT, CELLS = 11.0, 128.0


def _make_ln() -> list[float]:
    table, log, last = [], 0.0, 1.0
    for i in range(2047, -1, -1):
        middle = 0.5 + (i + 0.5) / 4096.0
        y = (last - middle) / (last + middle)
        log -= 2.0 * (y + y * y * y / 3.0)
        table.append(log)
        last = middle
    return table[::-1]


def _make_squash() -> list[int]:
    odds, ratio, table = 1.003913889338348, 1.0078430972064480, []  # e^(1/256), e^(1/128)
    for _ in range(int(LIMIT * CELLS)):
        table.append(int(65536.0 * odds / (1.0 + odds) + 0.5))
        odds *= ratio
    return [65536 - q for q in reversed(table)] + table


LN_TABLE = _make_ln()
_LN_ARRAY = np.array(LN_TABLE)
ONES = _make_squash()
"""Probability of a one in 1/65536, by cell."""


def ln(x: float) -> float:
    """Natural logarithm of a positive number, to 2.5e-4."""
    mantissa, exponent = math.frexp(x)
    return LN_TABLE[int(mantissa * 4096.0) - 2048] + exponent * LN2


def ln_array(x: NDArray[Any]) -> Floats:
    """``ln`` of each."""
    mantissa, exponent = np.frexp(x)
    return np.asarray(_LN_ARRAY[(mantissa * 4096.0).astype(np.int64) - 2048] + exponent * LN2)


def squash(x: float) -> int:
    """The logistic function in 1/65536, from 1 to 65535."""
    return ONES[int((min(max(x, -10.99), 10.99) + LIMIT) * CELLS)]

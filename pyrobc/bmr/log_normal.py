r"""Log-normal posterior, prior and reduced prior: the Normal closed form for :math:`\ln\theta`.

Evidence does not depend on the parameterisation: the factors :math:`1/\theta` of the three densities cancel.
"""

from __future__ import annotations

from pyro.distributions import LogNormal as PyroLogNormal
from pyro.distributions import Normal
from torch.distributions import Distribution, LogNormal

from pyrobc.bmr.normal import reduce_normal
from pyrobc.bmr.registry import Reduction, register_reduction

__all__ = ["reduce_log_normal"]


@register_reduction(LogNormal, LogNormal, LogNormal)
def reduce_log_normal(q: LogNormal, p: LogNormal, reduced: LogNormal) -> Reduction:
    """LogNormal to LogNormal, elementwise."""
    normals = (Normal(law.loc, law.scale, validate_args=False) for law in (q, p, reduced))
    return reduce_normal(*normals).map(lambda part: part, posterior=_exponentiate)


def _exponentiate(law: Distribution) -> PyroLogNormal:
    assert isinstance(law, Normal)
    return PyroLogNormal(law.loc, law.scale, validate_args=False)

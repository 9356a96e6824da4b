"""Estimators of the hypergradient: how to differentiate the outer loss through a given inner solve.

Notation: inner variable w, outer variable o, inner loss f, outer loss g, ``v = d_w g``, ``H = d2_ww f``,
``J = d2_ow f``; the hypergradient is ``d_o g - J x`` with ``x ~ H^-1 v``. Costs are in fb, one forward and backward
pass of a batch, with the look-ahead of k inner steps included.
"""

from agwm_jax.core.estimators.base import Estimate as Estimate
from agwm_jax.core.estimators.base import Hypergradient as Hypergradient
from agwm_jax.core.estimators.finite_difference import finite_difference as finite_difference
from agwm_jax.core.estimators.first_order import first_order as first_order
from agwm_jax.core.estimators.implicit import implicit as implicit
from agwm_jax.core.estimators.penalty import penalty as penalty
from agwm_jax.core.estimators.unrolled import unrolled as unrolled
from agwm_jax.core.inner import InnerState as InnerState

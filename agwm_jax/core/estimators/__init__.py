"""Estimators of the hypergradient: how to differentiate the outer loss through a given inner solve; one file each.

Notation: inner variable w, outer variable o, inner loss f, outer loss g, ``v = d_w g``, ``H = d2_ww f``,
``J = d2_ow f``; the hypergradient is ``d_o g - J x`` with ``x ~ H^-1 v``. Costs are in fb, one forward and backward
pass of a batch, with the inner solve of k steps included.
"""

from agwm_jax.core.estimators.base import ESTIMATORS as ESTIMATORS
from agwm_jax.core.estimators.base import Estimate as Estimate
from agwm_jax.core.estimators.base import Estimator as Estimator

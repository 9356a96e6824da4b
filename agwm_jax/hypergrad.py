"""Estimators of the hypergradient, and what an author of one needs."""

from agwm_jax.core.adjoint import cotangent_of as cotangent_of
from agwm_jax.core.adjoint import update_jvp as update_jvp
from agwm_jax.core.adjoint import update_vjp as update_vjp
from agwm_jax.core.curvature import Curvature as Curvature
from agwm_jax.core.curvature import Hvp as Hvp
from agwm_jax.core.curvature import check_hvp as check_hvp
from agwm_jax.core.estimators.base import ESTIMATORS as ESTIMATORS
from agwm_jax.core.estimators.base import Estimate as Estimate
from agwm_jax.core.estimators.base import Estimator as Estimator
from agwm_jax.core.estimators.base import stateless as stateless
from agwm_jax.core.estimators.finite_difference import finite_difference as finite_difference
from agwm_jax.core.estimators.finite_difference import rms_scale as rms_scale
from agwm_jax.core.estimators.first_order import first_order as first_order
from agwm_jax.core.estimators.forward_mode import forward_mode as forward_mode
from agwm_jax.core.estimators.implicit import implicit as implicit
from agwm_jax.core.estimators.penalty import penalty as penalty
from agwm_jax.core.estimators.unrolled import unrolled as unrolled
from agwm_jax.core.inner import InnerSolve as InnerSolve
from agwm_jax.core.inner import InnerState as InnerState
from agwm_jax.core.inner import optimizer_steps as optimizer_steps
from agwm_jax.core.inner import solved_elsewhere as solved_elsewhere
from agwm_jax.core.precision import Precise as Precise
from agwm_jax.core.precision import precise as precise

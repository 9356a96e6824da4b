"""Attention-guided weights mixup (arXiv 2403.12918) in JAX: the pure functions, importable on their own."""

from agwm_jax.core import estimators as hypergrad
from agwm_jax.core import linear_solve as linear_solve
from agwm_jax.core.bilevel import BilevelSolver as BilevelSolver
from agwm_jax.core.bilevel import BilevelState as BilevelState
from agwm_jax.core.bilevel import bilevel as bilevel
from agwm_jax.core.estimators import Hypergradient as Hypergradient
from agwm_jax.core.linear_solve import LinearSolver as LinearSolver
from agwm_jax.core.mixup import alpha_statistics as alpha_statistics
from agwm_jax.core.mixup import gate as gate
from agwm_jax.core.mixup import init_alpha as init_alpha
from agwm_jax.core.mixup import mix as mix
from agwm_jax.core.mixup import mixup_problem as mixup_problem
from agwm_jax.core.mixup import project_alpha as project_alpha
from agwm_jax.core.partition import Partition as Partition
from agwm_jax.core.partition import partition as partition
from agwm_jax.core.types import Composite as Composite
from agwm_jax.core.types import LowRank as LowRank
from agwm_jax.core.types import Problem as Problem
from agwm_jax.errors import AgwmError as AgwmError

__version__ = "0.3.0"

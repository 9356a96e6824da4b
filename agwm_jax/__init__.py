"""Attention-guided weights mixup (arXiv 2403.12918) in JAX; importing it loads nothing until a name is used."""

# ruff: noqa: F401 (the imports below are what type checkers and editors read)

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agwm_jax import hypergrad, linear_solve
    from agwm_jax.core import trees
    from agwm_jax.core.bilevel import BilevelSolver, BilevelState, bilevel, hypergradient
    from agwm_jax.core.estimators.base import ESTIMATORS, Estimate, Estimator
    from agwm_jax.core.gates import bound_alpha, gate_shape, share_gates, spread_gate
    from agwm_jax.core.implicit_function import implicit_function
    from agwm_jax.core.inner import InnerSolve, InnerState, gradient_step, inner_steps
    from agwm_jax.core.mixup import alpha_statistics, gate, init_alpha, mix, mixup_problem, project_alpha
    from agwm_jax.core.partition import Partition, partition
    from agwm_jax.core.solvers.base import SOLVERS, LinearSolver, Solution
    from agwm_jax.core.types import Composite, LowRank, Problem
    from agwm_jax.data.sources.base import TASK_SOURCES
    from agwm_jax.errors import AgwmError
    from agwm_jax.methods.interface import METHODS
    from agwm_jax.metrics import METRICS
    from agwm_jax.models.family import FAMILIES
    from agwm_jax.models.functional import functionalize
    from agwm_jax.models.huggingface import load_pretrained, save_pretrained
    from agwm_jax.runs.finished import evaluate, export, predict
    from agwm_jax.runs.fitted import load_exported
    from agwm_jax.runs.fitting import fit
    from agwm_jax.runs.run import train
    from agwm_jax.selection.compare import Comparison, compare
    from agwm_jax.settings import load_config

_HOME = {
    "errors": "AgwmError",
    "core.types": "Composite LowRank Problem",
    "core.partition": "Partition partition",
    "core.gates": "bound_alpha gate_shape share_gates spread_gate",
    "core.mixup": "alpha_statistics gate init_alpha mix mixup_problem project_alpha",
    "core.inner": "InnerSolve InnerState gradient_step inner_steps",
    "core.bilevel": "BilevelSolver BilevelState bilevel hypergradient",
    "core.implicit_function": "implicit_function",
    "core.estimators.base": "ESTIMATORS Estimate Estimator",
    "core.solvers.base": "SOLVERS LinearSolver Solution",
    "methods.interface": "METHODS",
    "models.family": "FAMILIES",
    "models.functional": "functionalize",
    "models.huggingface": "load_pretrained save_pretrained",
    "data.sources.base": "TASK_SOURCES",
    "metrics": "METRICS",
    "settings": "load_config",
    "runs.finished": "evaluate export predict",
    "runs.fitted": "load_exported",
    "runs.fitting": "fit",
    "runs.run": "train",
    "selection.compare": "Comparison compare",
}
"""Which module gives which public names."""

_MODULES = {"hypergrad": "hypergrad", "linear_solve": "linear_solve", "trees": "core.trees"}
_NAMES = {name: module for module, names in _HOME.items() for name in names.split()}

__version__ = "0.10.0"
__all__ = sorted([*_NAMES, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    elif name in _NAMES:
        value = getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

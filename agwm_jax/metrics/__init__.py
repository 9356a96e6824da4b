"""The scores of predictions, by the names that tasks and configs use."""

from agwm_jax.metrics.base import METRICS, check, compute

__all__ = ["METRICS", "check", "compute"]

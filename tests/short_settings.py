"""Settings of methods that fit a model of two layers and a run of a few steps; all else is at its default."""

from typing import Any

_FIRST = {"epochs": 1, "validation_fraction": 0.4}
SHORT: dict[str, dict[str, Any]] = {
    "agwm": {"search": {"num_splits": 2, **_FIRST}},
    "recadam": {"gamma": 50.0, "t0": 2.0},
    "top_k": {"k": 1},
    "restart": {"first": _FIRST},
    "soup": {"num_splits": 2, "first": _FIRST},
    "model_stock": {"num_runs": 2},
}


def section(method: str) -> dict[str, Any]:
    """A method's section of settings."""
    return {"name": method, **SHORT.get(method, {})}


def options(method: str) -> dict[str, Any]:
    """The same as on the command line: ``method.first.epochs`` and so on, without the name."""

    def flat(values: dict[str, Any], prefix: str) -> dict[str, Any]:
        parts = (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
            for key, value in values.items()
        )
        return {key: value for part in parts for key, value in part.items()}

    return flat(SHORT.get(method, {}), "method.")

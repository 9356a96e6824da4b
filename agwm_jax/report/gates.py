"""Statistics of a saved gate: mean A per layer and module, and the histogram of all its entries."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from agwm_jax.errors import AgwmError
from agwm_jax.report.runs import Run

COLLECTION = "alpha"
BINS = 1000


class Gates(NamedTuple):
    """Mean A: `layers` module -> [l], `single` module without layers (pooler) -> mean; `counts` [BINS] over [0, 1].

    A gate of fewer numbers than its kernel (one a row, one a head) counts each number once. One that kernels share is
    a module of its own.
    """

    layers: dict[str, np.ndarray]
    single: dict[str, float]
    counts: np.ndarray

    @property
    def mean(self) -> float:
        """Mean of all entries of A, from the histogram (to half a bin)."""
        centres = (np.arange(BINS) + 0.5) / BINS
        return float((self.counts * centres).sum() / self.counts.sum())

    def share(self, low: float, high: float) -> float:
        """Share of the entries of A with low <= A < high (1 counts as below 1)."""
        first, last = round(low * BINS), round(high * BINS)
        return float(self.counts[first:last].sum() / self.counts.sum())


def read_gates(run: Run) -> Gates | None:
    """Statistics of the collection "alpha" of the variables that a run learnt; None where it learnt none.

    Raises:
        AgwmError: a file that is no safetensors file, is cut off, or holds a factor without its partner.
    """
    path = run.folder / "variables.safetensors"
    if not path.exists():
        return None
    layers: dict[str, np.ndarray] = {}
    single: dict[str, float] = {}
    counts = np.zeros(BINS)
    try:
        for name, stacked, matrices in _matrices(path):
            means = []
            for matrix in matrices:
                means.append(float(matrix.mean(dtype=np.float64)))
                counts += np.histogram(np.clip(matrix, 0.0, 1.0), bins=BINS, range=(0.0, 1.0))[0]
            if stacked:
                layers[name] = np.array(means)
            else:
                single[name] = means[0]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise AgwmError(f"{path} cannot be read ({error}): remove the run folder or train it again.") from error
    return Gates(layers, single, counts) if counts.sum() else None


def mean_gates(gates: Sequence[Gates]) -> Gates:
    """Mean over seeds of the means, sum of the histograms."""
    first = gates[0]
    layers = {name: np.mean([each.layers[name] for each in gates], axis=0) for name in first.layers}
    single = {name: float(np.mean([each.single[name] for each in gates])) for name in first.single}
    return Gates(layers, single, np.sum([each.counts for each in gates], axis=0))


def _matrices(path: Path) -> Iterator[tuple[str, bool, Iterator[np.ndarray]]]:
    """(module name, has a layer axis, the matrices A): one layer at a time, for a large model needs the memory."""
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        order = json.loads(metadata.get("weights", "[]"))
        mixup = json.loads(metadata.get("method", "{}")).get("mixup") or {}
        sigmoid, shared = mixup.get("parametrisation") == "sigmoid", mixup.get("gate") in ("layer", "one")
        keys = {tuple(key.split("/")) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        weights = {weight for collection, weight, *_ in keys if collection == COLLECTION}
        for weight in sorted(weights, key=lambda name: order.index(name) if name in order else len(order)):
            whole = (COLLECTION, weight)
            parts = [whole] if whole in keys else [(*whole, "left"), (*whole, "right")]
            left, *right = (np.asarray(file.get_tensor("/".join(part)), dtype=np.float32) for part in parts)
            if sigmoid:  # by a tanh, which does not overflow
                left, *right = (0.5 + 0.5 * np.tanh(0.5 * x, dtype=np.float32) for x in (left, *right))
            names = weight.split(".")
            name = names[-2] if names[-1] == "kernel" and len(names) > 1 else names[-1]
            if shared and (left.ndim == 3 or mixup["gate"] == "one"):  # kept under the first weight that shares it
                name = "all kernels"
            yield name, left.ndim == 3, _layers(left, *right)


def _layers(left: np.ndarray, right: np.ndarray | None = None) -> Iterator[np.ndarray]:
    for index in range(len(left)) if left.ndim == 3 else (...,):
        yield left[index] if right is None else left[index] @ right[index] / right.shape[-2]

"""Statistics of a saved alpha against the matrices computed whole."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from agwm_jax.errors import AgwmError
from agwm_jax.report.gates import BINS, mean_gates, read_gates
from agwm_jax.report.runs import read_run


@pytest.mark.parametrize("rank", [1, 3, "full"])
def test_mean_per_layer_and_histogram(write_run, rank):
    folder = write_run("agwm", 0, rank=rank, layers=3, width=16, moved=0.3)
    gates = read_gates(read_run(folder))
    tensors = load_file(folder / "variables.safetensors")
    matrices = {}
    for key, value in tensors.items():
        collection, path, *factor = key.split("/")
        if factor == ["left"]:
            matrices[path] = value @ tensors[f"alpha/{path}/right"] / rank
        elif collection == "alpha" and not factor:
            matrices[path] = value
    assert list(gates.layers) == ["query", "key", "value", "attention_output", "intermediate", "output"]
    for name, means in gates.layers.items():
        np.testing.assert_allclose(means, matrices[f"encoder.layers.{name}.kernel"].mean(axis=(1, 2)), rtol=1e-5)
    assert gates.single == {"pooler": pytest.approx(matrices["pooler.kernel"].mean(), rel=1e-5)}
    entries = np.concatenate([matrix.ravel() for matrix in matrices.values()])
    assert gates.counts.sum() == entries.size
    assert gates.mean == pytest.approx(entries.mean(), abs=1 / BINS)
    assert gates.share(0.95, 1.0) == pytest.approx((entries >= 0.95).mean(), abs=1e-3)
    assert gates.share(0.0, 0.05) == pytest.approx((entries < 0.05).mean(), abs=1e-3)


def test_mean_over_seeds(write_run):
    first, second = (read_gates(read_run(write_run("agwm", seed))) for seed in (0, 1))
    both = mean_gates([first, second])
    np.testing.assert_allclose(both.layers["key"], (first.layers["key"] + second.layers["key"]) / 2)
    assert both.counts.sum() == 2 * first.counts.sum()


def test_no_alpha(write_run):
    assert read_gates(read_run(write_run("vanilla", 0))) is None


def test_damaged_alpha_is_named(write_run):
    folder = write_run("agwm", 0)
    path = folder / "variables.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AgwmError, match=r"variables\.safetensors cannot be read"):
        read_gates(read_run(folder))
    save_file({"alpha/pooler.kernel/left": np.ones((4, 1), np.float32)}, path)
    with pytest.raises(AgwmError, match=r"cannot be read.*pooler\.kernel/right"):
        read_gates(read_run(folder))
    save_file({"alpha/pooler.kernel/right": np.ones((1, 4), np.float32)}, path)
    with pytest.raises(AgwmError, match=r"cannot be read.*pooler\.kernel"):
        read_gates(read_run(folder))

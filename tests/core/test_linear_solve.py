"""The solvers of H x = b against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agwm_jax import AgwmError
from agwm_jax.core.linear_solve import dense, neumann

H = np.array([0.2, 1.0, 3.0])
B = np.array([1.0, -2.0, 0.5])


@pytest.mark.parametrize("num_terms", [1, 2, 3, 10])
def test_neumann_has_exactly_k_terms(x64, num_terms):
    eta = 0.4  # 1 - 0.4 * 3 < 0: a sign error shows
    expected = sum((1 - eta * H) ** k * eta * B for k in range(num_terms))
    x = neumann(num_terms=num_terms, step_size=eta).solve(lambda p, i: H * p, jnp.asarray(B), ()).x
    np.testing.assert_allclose(x, expected, rtol=1e-13)


def test_neumann_takes_one_product_less_than_terms():
    jaxpr = jax.make_jaxpr(lambda b: neumann(num_terms=5, step_size=0.1).solve(lambda p, i: jnp.sin(p), b, ()).x)(jnp.ones(2))
    (scan,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    assert scan.params["length"] == 4


def test_dense_is_exact_on_a_pytree_and_needs_no_symmetry(x64):
    matrix = np.random.default_rng(0).normal(size=(5, 5)) + 3 * np.eye(5)
    b = {"a": jnp.arange(3.0), "b": jnp.ones((2, 1))}

    def matvec(p, i):
        out = jnp.asarray(matrix) @ jnp.concatenate([p["a"], p["b"][:, 0]])
        return {"a": out[:3], "b": out[3:, None]}

    x = dense().solve(matvec, b, ()).x
    expected = np.linalg.solve(matrix, np.array([0.0, 1, 2, 1, 1]))
    np.testing.assert_allclose(x["a"], expected[:3], rtol=1e-12)
    np.testing.assert_allclose(x["b"], expected[3:, None], rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_neumann_keeps_structure_shape_and_dtype(dtype):
    b = {"a": jnp.ones((2, 3), dtype), "b": [jnp.zeros((), dtype)]}
    x = neumann(num_terms=3, step_size=0.1).solve(lambda p, i: p, b, ()).x
    assert jax.tree.structure(x) == jax.tree.structure(b)
    assert all(a.shape == c.shape and a.dtype == c.dtype for a, c in zip(*map(jax.tree.leaves, (x, b)), strict=True))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_terms": 0, "step_size": 0.1}, r"neumann\(num_terms=0\): expected 1 term or more"),
        ({"num_terms": 3, "step_size": 0.0}, r"neumann\(step_size=0.0\): expected a step size above 0"),
        ({"num_terms": 3, "step_size": -0.1}, r"step_size=-0.1"),
        ({"num_terms": 3, "step_size": float("nan")}, r"step_size=nan"),
    ],
)
def test_neumann_refuses(kwargs, message):
    with pytest.raises(AgwmError, match=message):
        neumann(**kwargs)

"""Inner losses whose second derivatives are not symmetric: which products are right there, and who says so."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agwm_jax import AgwmError, Problem, hypergrad, hypergradient, linear_solve
from agwm_jax.core.inner import InnerState, inner_steps

RNG = np.random.default_rng(0)
X, Y, BATCHES = RNG.normal(size=(12, 3)), RNG.normal(size=12), RNG.uniform(0.5, 1.5, (5, 12))


@jax.custom_vjp
def clipped(x):
    """The identity, whose gradient is cut at 0.1 of its norm."""
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (g * jnp.minimum(1, 0.1 / jnp.linalg.norm(g)),))


def stopped(w, o, batch):
    """A term that pulls at w by a strength which it takes for a constant."""
    strength = jax.lax.stop_gradient(jnp.exp(o[0] + 3 * w[1]))
    return jnp.mean(batch * (jnp.tanh(X @ w) - Y) ** 2) + strength * jnp.sum(w**2) + o[1] * w[0]


def clip(w, o, batch):
    return jnp.mean(batch * (jnp.tanh(jnp.asarray(X) @ clipped(w * jnp.exp(o[0]))) - o[1] * Y) ** 2)


@jax.custom_vjp
def turned(x):
    """The identity, whose gradient is turned a little: that of no function."""
    return x


turned.defvjp(lambda x: (x, x), lambda x, g: (g + 0.3 * jnp.tanh(jnp.roll(x, 1)) * g,))


def bent(w, o, batch):
    w = turned(w)
    return jnp.mean(batch * (jnp.tanh(jnp.asarray(X) @ w) - Y) ** 2) + jnp.exp(o[0]) * jnp.sum(w**2) + o[1] * w[0]


def plain(w, o, batch):
    return jnp.mean(batch * (jnp.tanh(X @ w) - Y) ** 2) + jnp.exp(o[0]) * jnp.sum(w**2) + o[1] * w[0]


def outer_loss(w, o, batch):
    return jnp.mean((X @ w - batch) ** 2) + 0.1 * o[0] ** 2


W, OUTER = np.array([0.3, -0.5, 0.8]), np.array([0.2, 0.7])


def estimated(loss, estimator, *, tx, w=W, batches=BATCHES):
    w, outer, batches = (jnp.asarray(x) for x in (w, OUTER, batches))
    return hypergradient(Problem(loss, outer_loss), estimator, w, outer, batches, Y, inner_tx=tx).hypergradient


@pytest.mark.parametrize("loss", [stopped, clip], ids=["stop_gradient", "custom_vjp"])
def test_reverse_is_reverse_mode_where_the_others_are_not(x64, loss):
    tx, start = optax.sgd(0.1, momentum=0.9), jnp.asarray(W)

    def through(o):
        return outer_loss(
            inner_steps(loss, tx, InnerState(start, tx.init(start)), o, jnp.asarray(BATCHES))[0].params, o, Y
        )

    exact = jax.grad(through)(jnp.asarray(OUTER))
    np.testing.assert_allclose(estimated(loss, hypergrad.unrolled(hvp="reverse"), tx=tx), exact, rtol=1e-8)
    for hvp in ("finite_difference", *(("linearize", "jvp") if loss is clip else ())):
        assert np.abs(estimated(loss, hypergrad.unrolled(hvp=hvp), tx=tx) - exact).max() > 1e-3 * np.abs(exact).max()


def test_implicit_by_reverse_solves_the_transposed_system(x64):
    """Where the gradient field F is zero, dw/do = -(d_w F)^-1 d_o F; written out by NumPy."""
    batch = BATCHES[0]
    field = jax.grad(bent)
    w = jnp.asarray(W)
    for _ in range(30):  # Newton
        w = w - jnp.linalg.solve(jax.jacrev(field)(w, OUTER, batch), field(w, OUTER, batch))
    assert np.abs(field(w, OUTER, batch)).max() < 1e-12
    of_w, of_o = (np.asarray(jax.jacrev(field, argnums=i)(w, OUTER, batch)) for i in (0, 1))
    v, direct = (np.asarray(x) for x in jax.grad(outer_loss, argnums=(0, 1))(w, OUTER, Y))
    exact = direct - of_o.T @ np.linalg.solve(of_w.T, v)
    options = {"tx": None, "w": w, "batches": batch[None]}
    dense = linear_solve.dense()
    np.testing.assert_allclose(estimated(bent, hypergrad.implicit(dense, hvp="reverse"), **options), exact, rtol=1e-8)
    assert np.abs(estimated(bent, hypergrad.implicit(dense), **options) - exact).max() > 1e-3


def test_the_check_warns_where_a_product_is_not_the_transposed_one(x64):
    """Finite differences see what is behind a stop_gradient; the other ways do not, no more than reverse mode does."""
    point = [jnp.asarray(x) for x in (W, OUTER, BATCHES[0])]
    for loss, wrong in ((stopped, {"finite_difference"}), (clip, {"linearize", "finite_difference"})):
        with pytest.warns(UserWarning, match=r"by .* of their norm\).* Take hypergrad.unrolled\(hvp='reverse'\)"):
            errors = hypergrad.check_hvp(Problem(loss, outer_loss), *point)
        assert {hvp for hvp, error in errors.items() if error > 0.03} == wrong
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        errors = hypergrad.check_hvp(Problem(plain, outer_loss), *point)
    assert errors["linearize"] < 1e-12
    assert errors["finite_difference"] < 1e-5


def test_the_check_leaves_out_differences_below_float32():
    def narrow(w, o, batch):
        return plain(*(jnp.asarray(x, jnp.bfloat16) for x in (w, o, batch))).astype(jnp.float32)

    point = [jnp.asarray(x, jnp.float32) for x in (W, OUTER, BATCHES[0])]
    assert hypergrad.check_hvp(Problem(narrow, outer_loss), *point).keys() == {"linearize"}


def test_gauss_newton_has_no_transpose_to_take():
    with pytest.raises(AgwmError, match="a Gauss-Newton matrix is its own transpose"):
        hypergrad.implicit(linear_solve.dense(), hvp="reverse", curvature="gauss_newton")

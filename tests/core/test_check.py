"""What the core refuses, and in which words."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import optax
import pytest

from agwm_jax import (
    ESTIMATORS,
    AgwmError,
    Composite,
    Estimate,
    Estimator,
    Problem,
    bilevel,
    hypergrad,
    init_alpha,
    linear_solve,
)
from tests.core.problems import NO_BATCH, darts_toy, estimate_at

NEUMANN = linear_solve.neumann(num_terms=2, step_size=0.1)
CG = linear_solve.conjugate_gradient(num_steps=2)

OPTIONS = {
    "neumann(num_terms=0): expected 1 term or more": lambda: linear_solve.neumann(num_terms=0, step_size=0.1),
    "neumann(num_terms=2.5): expected 1 term or more": lambda: linear_solve.neumann(num_terms=2.5, step_size=0.1),
    "nystrom(rank=1.5): expected a rank of 1 or more": lambda: linear_solve.nystrom(rank=1.5, rho=1.0),
    "neumann(step_size=0.0): expected a step size above 0, or 'auto'": lambda: linear_solve.neumann(
        num_terms=3, step_size=0.0
    ),
    "neumann(step_size=-0.1): expected": lambda: linear_solve.neumann(num_terms=3, step_size=-0.1),
    "neumann(step_size=nan): expected": lambda: linear_solve.neumann(num_terms=3, step_size=float("nan")),
    "neumann(step_size='big'): expected": lambda: linear_solve.neumann(num_terms=3, step_size="big"),
    "neumann(power_iterations=0): expected 1 or more": lambda: linear_solve.neumann(
        num_terms=3, step_size="auto", power_iterations=0
    ),
    "gradient_descent(num_steps=0): expected 1 step or more": lambda: linear_solve.gradient_descent(
        num_steps=0, step_size=0.1
    ),
    "gradient_descent(step_size=0): expected a step size above 0": lambda: linear_solve.gradient_descent(step_size=0),
    "gradient_descent(power_iterations=-1): expected 1 or more": lambda: linear_solve.gradient_descent(
        step_size="auto", power_iterations=-1
    ),
    "conjugate_gradient(num_steps=0): expected 1 step or more": lambda: linear_solve.conjugate_gradient(num_steps=0),
    "conjugate_gradient(damping=-0.1): expected a damping of 0 or more": lambda: linear_solve.conjugate_gradient(
        num_steps=1, damping=-0.1
    ),
    "conjugate_gradient(damping=nan): expected": lambda: linear_solve.conjugate_gradient(
        num_steps=1, damping=float("nan")
    ),
    "nystrom(rank=0): expected a rank of 1 or more": lambda: linear_solve.nystrom(rank=0, rho=1.0),
    "nystrom(rho=0.0): expected a rho above 0": lambda: linear_solve.nystrom(rank=1, rho=0.0),
    "nystrom(rho=nan): expected a rho above 0": lambda: linear_solve.nystrom(rank=1, rho=float("nan")),
    "nystrom(rank=7): the inner variable has 6 entries; lower the rank": lambda: linear_solve.nystrom(
        rank=7, rho=1.0
    ).init({"a": jnp.ones((2, 2)), "b": jnp.ones(2)}),
    "unrolled(num_steps=0): expected 1 step or more": lambda: hypergrad.unrolled(num_steps=0),
    "unrolled(states=0): expected 1 state or more": lambda: hypergrad.unrolled(states=0),
    "unrolled(hvp='vjp'): expected one of 'linearize', 'jvp', 'finite_difference'": lambda: hypergrad.unrolled(
        hvp="vjp"
    ),
    "implicit(hvp='vjp'): expected one of": lambda: hypergrad.implicit(NEUMANN, hvp="vjp"),
    "implicit(curvature='fisher'): expected one of 'hessian', 'gauss_newton'": lambda: hypergrad.implicit(
        NEUMANN, curvature="fisher"
    ),
    "implicit(resample=True): this solver needs one and the same matrix": lambda: hypergrad.implicit(
        CG, hvp="jvp", resample=True
    ),
    "implicit(resample=True, hvp='linearize'): what is linearised once serves one batch only": lambda: (
        hypergrad.implicit(NEUMANN, resample=True)
    ),
    "finite_difference(radius=0.0): expected a radius above 0": lambda: hypergrad.finite_difference(radius=0.0),
    "finite_difference(radius=nan): expected": lambda: hypergrad.finite_difference(radius=float("nan")),
    "finite_difference(step_size=-1.0): expected a step size above 0": lambda: hypergrad.finite_difference(
        step_size=-1.0
    ),
    "finite_difference(step_size=0.5, precondition='adjoint'): the optimiser's own update sets the scale": lambda: (
        hypergrad.finite_difference(step_size=0.5, precondition="adjoint")
    ),
    "penalty(weight=0.0): expected a weight above 0": lambda: hypergrad.penalty(weight=0.0),
    "penalty(growth=-1.0): expected a growth of 0 or more": lambda: hypergrad.penalty(weight=1.0, growth=-1.0),
}


@pytest.mark.parametrize(("message", "make"), OPTIONS.items(), ids=OPTIONS)
def test_options_are_refused(without_type_checks, message, make):
    with pytest.raises(AgwmError, match=re.escape(message)):
        make()


def test_what_only_the_trace_can_tell():
    one = jnp.float32(1)
    with pytest.raises(AgwmError, match=r"unrolled\(num_steps=3\): the look-ahead has 2 inner steps; lower num_steps"):
        estimate_at(darts_toy(), hypergrad.unrolled(num_steps=3), one, one, tx=optax.sgd(0.1), num_steps=2)
    for hvp in ("linearize", "jvp", "finite_difference"):
        estimator = hypergrad.implicit(NEUMANN, hvp=hvp, curvature="gauss_newton")
        with pytest.raises(AgwmError, match=r"expected the inner loss as agwm_jax.Composite\(outputs, criterion\)"):
            estimate_at(darts_toy(), estimator, one, one)


def solver_of(problem=None, estimator=None, **options):
    options = {"inner_tx": optax.sgd(0.1), "outer_tx": optax.sgd(0.1), **options}
    return bilevel(problem or quadratic(), estimator or hypergrad.first_order(), **options)


def quadratic(outer_loss=lambda w, o, _: jnp.sum(w["a"] ** 2) + o["b"][0].sum()):
    return Problem(lambda w, o, _: jnp.sum((w["a"] - o["b"][0]) ** 2), outer_loss)


def variables(dtype="float32"):
    return {"a": jnp.ones(3, dtype)}, {"b": [jnp.ones(3, dtype)]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, o: ({"a": w["a"], "n": [jnp.arange(2)]}, o), "inner['n'][0] is int32: expected float arrays only"),
        (lambda w, o: (w, {"b": [o["b"][0], jnp.ones(2, bool)]}), "outer['b'][1] is bool: expected float arrays only"),
        (lambda w, o: (w, {"b": [o["b"][0], 2.0]}), "outer['b'][1] is float: expected float arrays only"),
        (lambda w, o: ({"a": w["a"], "k": jax.random.key(0)}, o), "inner['k'] is key<fry>: expected float arrays only"),
        (lambda w, o: ({}, o), "the inner variable has no leaves: expected a pytree of float arrays"),
        (lambda w, o: (w, {"b": []}), "the outer variable has no leaves"),
    ],
)
def test_variables_must_be_float_arrays(change, message):
    with pytest.raises(AgwmError, match=re.escape(message)):
        solver_of().init(*change(*variables()))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_any_float_will_do(dtype):
    solver = solver_of()
    state, _ = jax.jit(solver.step)(solver.init(*variables(dtype)), jnp.zeros(1), NO_BATCH)
    assert state.inner.params["a"].dtype == dtype
    assert state.outer["b"][0].dtype == "float32"


@pytest.mark.parametrize(
    ("project", "message"),
    [
        (lambda o: {"b": o["b"][0]}, "project(outer)['b'][0] is nothing where the outer variable has float32[3]"),
        (
            lambda o: {"b": [o["b"][0][:2]]},
            "project(outer)['b'][0] is float32[2] where the outer variable has float32[3]",
        ),
        (
            lambda o: {"b": [o["b"][0].astype("bfloat16")]},
            "['b'][0] is bfloat16[3] where the outer variable has float32[3]",
        ),
        (lambda o: {**o, "c": jnp.ones(1)}, "project(outer)['c'] is float32[1] where the outer variable has nothing"),
        (lambda o: {"b": tuple(o["b"])}, "expected the same tree"),  # the same paths, another structure
    ],
)
def test_a_projection_must_keep_the_tree(project, message):
    with pytest.raises(AgwmError, match=re.escape(message)):
        solver_of(project=project).init(*variables())


@pytest.mark.parametrize(
    ("hypergradient", "got"),
    [
        (lambda o: {"b": [o["b"][0][None]]}, "['b'][0] is float32[1,3]"),
        (lambda o: {"b": [o["b"][0].astype("float16")]}, "['b'][0] is float16[3]"),
        (lambda o: o["b"], "is nothing where the outer variable has float32[3]"),
        (lambda o: {"b": tuple(o["b"])}, "the estimator's hypergradient is a PyTreeDef("),
    ],
)
def test_an_estimator_of_the_users_must_keep_the_tree(hypergradient, got):
    def estimate(problem, solve, inner, outer, inner_batches, outer_batch, state):
        return Estimate(hypergradient(outer), inner, state, {})

    solver = solver_of(estimator=Estimator(lambda inner, outer: (), estimate, forward_mode=False))
    with pytest.raises(AgwmError, match="the estimator's hypergradient") as error:
        jax.eval_shape(solver.step, solver.init(*variables()), jnp.zeros(1), NO_BATCH)
    assert got in str(error.value)
    assert str(error.value).endswith("expected the same tree.")


LOSSES = {
    "float32[3]: expected a float scalar": lambda w, o, _: w["a"] ** 2,
    "float32[1]: expected a float scalar": lambda w, o, _: jnp.sum(w["a"], keepdims=True),
    "int32[]: expected a float scalar": lambda w, o, _: jnp.sum(w["a"] > 0),
    "nothing: expected a float scalar": lambda w, o, _: None,
}


@pytest.mark.parametrize("side", ["inner", "outer"])
@pytest.mark.parametrize(("message", "loss"), LOSSES.items(), ids=LOSSES)
def test_losses_must_be_scalars(side, message, loss):
    problem = quadratic()._replace(**{f"{side}_loss": loss})
    solver = solver_of(problem)
    with pytest.raises(AgwmError, match=re.escape(f"the {side} loss returns {message}; take the mean over the batch")):
        jax.eval_shape(solver.step, solver.init(*variables()), jnp.zeros(2), NO_BATCH)


@pytest.mark.parametrize(
    ("outer_loss", "depends"),
    [
        (lambda w, o, _: jnp.sum(o["b"][0] ** 2), False),
        (lambda w, o, _: jnp.zeros(()), False),
        (lambda w, o, b: jnp.sum(o["b"][0]) + b, False),
        (lambda w, o, _: jnp.sum(o["b"][0] ** 2) + 0 * jnp.sum(w["a"]), True),
        (lambda w, o, _: jax.jit(lambda w: jnp.sum(w["a"]))(w), True),  # the inner loss uses o
        (Composite(lambda w, o, _: w["a"] - o["b"][0], lambda z, _: jnp.sum(z**2)), True),
    ],
)
def test_the_outer_loss_must_use_the_inner_variable(outer_loss, depends):
    solver = solver_of(quadratic(outer_loss))

    def trace():
        jax.eval_shape(solver.step, solver.init(*variables()), jnp.zeros(2), NO_BATCH)

    if depends:
        trace()
    else:
        with pytest.raises(AgwmError, match="the outer loss does not depend on the inner variable"):
            trace()


@pytest.mark.parametrize(
    ("batches", "found"),
    [
        ({"x": jnp.zeros((2, 4)), "y": jnp.zeros((3, 4))}, "(2, 4), (3, 4)"),
        ({"x": jnp.zeros((2, 4)), "key": jnp.zeros(())}, "(), (2, 4)"),
        (jnp.zeros(()), "()"),
        (jnp.zeros(0), "(0,)"),
        (jnp.zeros((0, 4)), "(0, 4)"),
        ({}, "no arrays"),
    ],
)
def test_inner_batches_share_a_leading_axis(batches, found):
    solver = solver_of()
    message = f"inner_batches has leaves of shape {found}: expected a leading axis [k, ...]"
    with pytest.raises(AgwmError, match=re.escape(message)):
        jax.eval_shape(solver.step, solver.init(*variables()), batches, NO_BATCH)


@pytest.mark.parametrize(
    ("inner", "outer", "message"),
    [
        (jnp.zeros(4), jnp.zeros(4), "inner_batches has shape (4,) and outer_batch (4,): expected one axis more"),
        (
            {"x": jnp.zeros((2, 4, 3)), "y": jnp.zeros((2,))},
            {"x": jnp.zeros((4, 3)), "y": jnp.zeros((4,))},
            "inner_batches['y'] has shape (2,) and outer_batch (4,)",
        ),
    ],
)
def test_a_missing_axis_of_inner_steps_is_seen_by_the_ranks(inner, outer, message):
    solver = solver_of()
    with pytest.raises(AgwmError, match=re.escape(message)):
        jax.eval_shape(solver.step, solver.init(*variables()), inner, outer)


def test_an_outer_variable_that_nothing_depends_on():
    unused = Problem(lambda w, o, _: jnp.sum(w["a"] ** 2), lambda w, o, _: jnp.sum(w["a"]))
    solver = solver_of(unused)
    message = r"nothing depends on the outer variable, so its gradient is zero: .* \(MAML\), .* inner variable at zeros"
    with pytest.raises(AgwmError, match=message):
        jax.eval_shape(solver.step, solver.init(*variables()), jnp.zeros(1), NO_BATCH)


def test_factories_that_were_not_called(without_type_checks):
    with pytest.raises(AgwmError, match=r"the estimator is unrolled: .* is it called\?"):
        solver_of(estimator=hypergrad.unrolled)
    with pytest.raises(AgwmError, match=r"implicit\(neumann\): expected a linear solver, .* is it called\?"):
        hypergrad.implicit(linear_solve.neumann)


@pytest.mark.parametrize(
    ("name", "settings", "inner_steps", "message"),
    [
        ("unrolled", {"num_steps": 3, "states": None}, 2, "the look-ahead has 2 inner steps"),
        ("unrolled", {"num_steps": None, "states": 2}, 7, "7 steps need 6 states or more"),
        ("implicit", {"resample": True}, 1, "the look-ahead has 1 inner step"),
    ],
)
def test_settings_that_do_not_fit_the_look_ahead(name, settings, inner_steps, message):
    check = ESTIMATORS[name].facts["check"]
    with pytest.raises(AgwmError, match=message):
        check(SimpleNamespace(**settings), inner_steps=inner_steps)
    check(SimpleNamespace(**settings), inner_steps=3 if settings.get("states") is None else 2)


@pytest.mark.parametrize("estimator", [hypergrad.first_order(), hypergrad.unrolled(), hypergrad.finite_difference()])
def test_each_loss_is_traced_for_the_checks_once_at_most(estimator):
    """The outer loss once to see what it depends on, the inner one not at all where that is enough."""
    calls = []

    def counted(name, loss):
        return lambda *args: (calls.append(name), loss(*args))[1]

    problem = quadratic()
    problem = Problem(counted("inner", problem.inner_loss), counted("outer", problem.outer_loss))
    solver = solver_of(problem, estimator)
    state = solver.init(*variables())
    jax.eval_shape(solver.step, state, jnp.zeros(2), NO_BATCH)
    with_checks = sorted(calls)
    calls.clear()
    start = state.inner
    jax.eval_shape(
        lambda: estimator.estimate(
            problem, hypergrad.optimizer_steps(optax.sgd(0.1)), start, state.outer, jnp.zeros(2), NO_BATCH, ()
        )
    )
    assert with_checks == sorted([*calls, "outer"])


def test_checks_cost_nothing_in_the_program():
    """The same program as without them, whatever they look at."""
    solver, state = solver_of(), solver_of().init(*variables())
    text = jax.jit(solver.step).lower(state, jnp.zeros(1), NO_BATCH).as_text()
    assert "callback" not in text
    assert text.count("stablehlo.while") <= 2  # two scans: the look-ahead and the kept steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_tx": optax.adam}, "inner_tx is the function adam, which makes no optimiser of the outer variable"),
        ({"inner_tx": None}, "inner_tx is None: expected an optax optimiser, such as optax.adam(1e-3)"),
        ({"outer_tx": optax.sgd}, "outer_tx is sgd: expected an optax optimiser"),
        ({"inner_tx": optax.lbfgs()}, "inner_tx wants more than the gradient"),
        ({"outer_tx": optax.polyak_sgd()}, "outer_tx wants more than the gradient"),
    ],
)
def test_optimisers_that_do_with_a_gradient(without_type_checks, options, message):
    with pytest.raises(AgwmError, match=re.escape(message)):
        solver_of(**options).init(*variables())


def test_an_outer_leaf_that_no_loss_reads():
    w, o = variables()
    with pytest.raises(AgwmError, match=re.escape("nothing depends on outer['b'][1], so its gradient is zero")):
        estimate_at(quadratic(), hypergrad.first_order(), w, {"b": [*o["b"], jnp.ones(2)]})
    read_by_one = Problem(lambda w, o, _: jnp.sum((w - o[0]) ** 2), lambda w, o, _: jnp.sum(w * o[1]))
    estimate_at(read_by_one, hypergrad.first_order(), jnp.ones(3), [jnp.ones(3), jnp.ones(3)])


def test_a_loss_with_aux():
    with_aux = Problem(lambda w, o, _: (jnp.sum(w * o), {"logits": w}), lambda w, o, _: jnp.sum(w * o))
    with pytest.raises(AgwmError, match=r"the inner loss returns float32\[\], float32\[3\]: .* return the loss alone"):
        estimate_at(with_aux, hypergrad.first_order(), jnp.ones(3), jnp.ones(3))


def test_a_gate_without_a_partition(without_type_checks):
    with pytest.raises(AgwmError, match="init_alpha: partition is a dict, expected what partition"):
        init_alpha(jax.random.key(0), {"kernel": jnp.ones((2, 2))})

"""What an outer step costs in forward-backward passes: counted, not clocked, on BERT of MiniLM's shape."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

from agwm_jax import AgwmError, bilevel, hypergrad, init_alpha, linear_solve, mixup_problem, partition, project_alpha
from agwm_jax.core.cost import matmul_flops
from agwm_jax.models.family import FAMILIES, build_model
from agwm_jax.models.loss import batch_loss
from tests.core.problems import conjugate_gradient, neumann

F32 = jax.ShapeDtypeStruct
A, B, C = (F32(shape, jnp.float32) for shape in ((3, 4), (4, 5), (5, 5)))
AB, BC = 2 * 3 * 4 * 5, 2 * 3 * 5 * 5


def test_flops_of_products():
    assert matmul_flops(lambda a, b: a @ b, A, B) == AB
    assert matmul_flops(lambda a, b, c: jnp.tanh(a @ b) @ c + 1, A, B, C) == AB + BC
    stacked = F32((7, 3, 4), jnp.float32), F32((7, 4, 5), jnp.float32)
    assert matmul_flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), *stacked) == 7 * AB
    assert matmul_flops(lambda a, b: jnp.einsum("bij,bjk->ik", a, b), *stacked) == 7 * AB
    assert matmul_flops(lambda a: a + a * 2, A) == 0
    # A gradient: the forward product, and one for each of its two arguments.
    assert matmul_flops(jax.value_and_grad(lambda a, b: jnp.sum(jnp.tanh(a @ b)), argnums=(0, 1)), A, B) == 3 * AB
    assert matmul_flops(jax.jit(jax.checkpoint(lambda a, b: a @ b)), A, B) == AB


def test_dead_code_is_dropped():
    def fn(a, b, c):
        jnp.exp(a @ b @ c)
        return a @ b

    assert matmul_flops(fn, A, B, C) == AB

    def scanned(a, b, c):
        def turn(carry, _):
            return (carry[0] + 1, carry[1] @ c), None

        return jax.lax.scan(turn, (a, a @ b), length=4)[0][0]

    assert matmul_flops(scanned, A, B, C) == 0


@pytest.mark.parametrize("length", [0, 1, 6])
def test_a_scan_counts_its_turns(length):
    def fn(a, b, c):
        return jax.lax.scan(
            lambda carry, _: (jax.lax.scan(lambda y, _: (y @ c, None), carry, length=2)[0], None), a @ b, length=length
        )

    assert matmul_flops(fn, A, B, C) == AB + length * 2 * BC
    stack = F32((length, 3, 5), jnp.float32)
    assert matmul_flops(lambda xs, c: jax.lax.map(lambda x: x @ c, xs), stack, C) == length * BC


def test_of_two_branches_the_dearest_counts():
    def fn(a, b, c):
        return jax.lax.cond(a[0, 0] > 0, lambda: a @ b @ c, lambda: a @ b)

    assert matmul_flops(fn, A, B, C) == AB + BC


def test_a_while_loop_is_counted_where_it_counts_to_a_number():
    def turns(count, first=0):
        return lambda c: jax.lax.while_loop(lambda i: i[0] < count, lambda i: (i[0] + 1, i[1] @ c), (first, c))[1]

    assert matmul_flops(turns(3), C) == 3 * matmul_flops(lambda c: c @ c, C)
    unknown = "how often a while loop turns is not known"
    with pytest.raises(AgwmError, match=unknown):
        matmul_flops(turns(3, first=1), C)
    with pytest.raises(AgwmError, match=unknown):
        matmul_flops(lambda n, c: turns(n)(c), 3, C)
    with pytest.raises(AgwmError, match=unknown):
        matmul_flops(lambda c: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ c, c), C)


@pytest.fixture(scope="module")
def search():
    """``cost(estimator, k=1, **options)`` of an outer step, in passes of the plain fine-tuning loss; nothing is run."""
    family = FAMILIES["bert"].value()
    sizes = {"vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}
    config = family.read_config({**sizes, "intermediate_size": 1536}).with_dropout(0.0)
    model, shapes = build_model(family, config, num_labels=2, pooling="mean")
    params = {path: jnp.zeros(w.shape, w.dtype) for path, w in shapes.items()}
    mixed = r"encoder\.layers\.(query|key|value|attention_output|intermediate|output)\.kernel"
    parts, loss = partition(params, mixed=mixed), batch_loss(model.apply, "classification")
    assert len(parts.mixed) == 6

    def batch(*lead):
        tokens = {name: F32((*lead, 16, 128), jnp.int32) for name in ("input_ids", "token_type_ids", "attention_mask")}
        return {**tokens, "labels": F32((*lead, 16), jnp.int32), "weight": F32((*lead, 16), jnp.float32)}

    plain = matmul_flops(jax.value_and_grad(loss), parts.task, batch())
    assert plain == pytest.approx(3 * 2 * 16 * 128 * 6 * (12 * 384**2 + 2 * 128 * 384), rel=0.01)
    problem = mixup_problem(loss, parts, anchor=0.1)

    def cost(estimator, k=1, rollback=False):
        solver = bilevel(
            problem,
            estimator,
            inner_tx=optax.adamw(1e-3),
            outer_tx=optax.adamw(1e-3),
            project=project_alpha,
            rollback=rollback,
        )
        state = jax.eval_shape(solver.init, parts.task, init_alpha(jax.random.key(0), parts))
        return matmul_flops(solver.step, state, batch(k), batch()) / plain

    return cost


def series(num_terms, **options):
    return hypergrad.implicit(linear_solve.neumann(num_terms=num_terms, step_size=0.1), **options)


TABLE = {
    "first_order": (hypergrad.first_order(), 2),
    "unrolled": (hypergrad.unrolled(), 4),
    "unrolled, jvp": (hypergrad.unrolled(hvp="jvp"), 5),
    "unrolled, reverse": (hypergrad.unrolled(hvp="reverse"), 4),
    "unrolled, finite_difference": (hypergrad.unrolled(hvp="finite_difference"), 3),
    "forward_mode, 2 directions": (hypergrad.forward_mode(directions=2), 6),
    "finite_difference": (hypergrad.finite_difference(), 4),
    "finite_difference, preconditioned": (hypergrad.finite_difference(precondition="adjoint"), 4),
    "finite_difference, as in Betty": (
        hypergrad.finite_difference(precondition="rms", at="after", restore=False),
        4,
    ),
    "penalty": (hypergrad.penalty(weight=10.0), 6),
    **{f"neumann {k}": (neumann(k, 0.1), 2 * k + 3) for k in (1, 3, 5)},
    **{f"neumann {k}, finite_difference": (series(k, hvp="finite_difference"), k + 3) for k in (1, 3, 5)},
    **{f"conjugate_gradient {k}": (conjugate_gradient(k), 2 * k + 5) for k in (1, 5)},
    "nystrom 3": (hypergrad.implicit(linear_solve.nystrom(rank=3, rho=1.0)), 2 * 3 + 5),
}
"""The table of the README: look-ahead of one step, kept."""


@pytest.mark.parametrize(("estimator", "passes"), TABLE.values(), ids=TABLE)
def test_the_table_of_costs(search, estimator, passes):
    assert search(estimator) == pytest.approx(passes, rel=0.02)


FORMULAS = {
    # n products: neumann of K terms has K - 1.
    **{f"jvp {k}": (series(k, hvp="jvp"), 1, 1 + 8 / 3 * (k - 1) + 4) for k in (1, 3, 5)},
    **{
        f"gauss_newton {k}": (series(k, curvature="gauss_newton"), 1, 1 + 4 / 3 * (k - 1) + 5 + 2 / 3)
        for k in (1, 3, 5)
    },
    "reverse 3": (series(3, hvp="reverse"), 1, 1 + 2 * 2 + 4),
    # In every product 1/3 to linearise the model anew; J and the residual then cost a joint and a Gauss-Newton product.
    "gauss_newton 3, jvp": (series(3, hvp="jvp", curvature="gauss_newton"), 1, 1 + 1 + 5 / 3 * 3 + 3),
    "gauss_newton 3, finite_difference": (
        series(3, hvp="finite_difference", curvature="gauss_newton"),
        1,
        1 + 1 + 4 / 3 * 3 + 2,
    ),
    "resample 3, jvp": (series(3, hvp="jvp", resample=True), 1, 1 + 8 / 3 * 2 + 4),
    "resample 3, finite_difference": (series(3, hvp="finite_difference", resample=True), 1, 1 + 2 * 2 + 3),
    "warm start": (conjugate_gradient(2, warm_start=True), 1, 1 + 2 * 3 + 4),
    "single loop": (hypergrad.implicit(linear_solve.gradient_descent(step_size=0.1)), 1, 1 + 2 + 4),
    "automatic step size": (
        hypergrad.implicit(linear_solve.neumann(num_terms=3, step_size="auto", power_iterations=2)),
        1,
        1 + 2 * 4 + 4,
    ),
    # k = 3 inner steps.
    "first_order, k": (hypergrad.first_order(), 3, 3 + 1),
    "unrolled, k": (hypergrad.unrolled(), 3, 3 * 3 + 1),
    "unrolled the last, k": (hypergrad.unrolled(num_steps=1), 3, 2 + 3 + 1),
    "unrolled, jvp, k": (hypergrad.unrolled(hvp="jvp"), 3, 4 * 3 + 1),
    "unrolled, finite_difference, k": (hypergrad.unrolled(hvp="finite_difference"), 3, 2 * 3 + 1),
    "finite_difference, k": (hypergrad.finite_difference(), 3, 3 + 3),
    "penalty, k": (hypergrad.penalty(weight=10.0), 3, 3 * 3 + 3),
    "neumann 3, k": (neumann(3, 0.1), 3, 3 + 2 * 2 + 4),
}
"""The formulas of the docstrings: estimator, k, passes."""


@pytest.mark.parametrize(("estimator", "k", "passes"), FORMULAS.values(), ids=FORMULAS)
def test_the_formulas_of_the_docstrings(search, estimator, k, passes):
    assert search(estimator, k) == pytest.approx(passes, rel=0.02)


@pytest.mark.parametrize("k", [1, 3])
def test_rollback_adds_its_inner_steps(search, k):
    # The penalty's copy is taken back too, at 2 passes a step.
    for estimator, steps in (
        (hypergrad.first_order(), k),
        (neumann(1, 0.1), k),
        (hypergrad.penalty(weight=10.0), 3 * k),
    ):
        for rollback in (True, "from_look_ahead"):
            assert search(estimator, k, rollback=rollback) == pytest.approx(search(estimator, k) + steps, rel=0.01)


DEPTH, WIDTH = 4, 8


def products_in(hlo):
    """Matrix products of a compiled program, the body of a loop as often as it turns."""
    computations = dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", hlo, flags=re.M | re.S))
    entry = re.search(r"^ENTRY %?([\w.\-]+)", hlo, flags=re.M).group(1)

    def count(name):
        total = 0
        for line in computations[name].splitlines():
            total += bool(re.search(r"= \S+ (dot|custom-call)\(", line)) and ("dot(" in line or "matmul" in line)
            turns = int(re.search(r'known_trip_count":\{"n":"(\d+)"', line).group(1)) if " while(" in line else 1
            called = re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", line)
            total += turns * sum(count(other) for other in called)
        return total

    return count(entry)


@pytest.mark.parametrize(
    "estimator",
    [
        hypergrad.first_order(),
        hypergrad.unrolled(),
        hypergrad.unrolled(hvp="jvp"),
        hypergrad.finite_difference(),
        hypergrad.penalty(weight=10.0),
        neumann(4, 0.1),
        series(4, hvp="jvp"),
        conjugate_gradient(3),
    ],
    ids=["first_order", "unrolled", "unrolled_jvp", "finite_difference", "penalty", "neumann", "neumann_jvp", "cg"],
)
def test_the_compiled_program_holds_what_is_counted(full_optimization, estimator):
    """The compiler neither brings back dead code nor computes anything twice."""
    params = {f"{i}.kernel": jnp.eye(WIDTH) for i in range(DEPTH)}
    parts = partition(params, mixed=".*")

    def loss(params, batch):
        for i in range(DEPTH):
            batch = jnp.tanh(batch @ params[f"{i}.kernel"])
        return jnp.mean(batch**2)

    solver = bilevel(
        mixup_problem(loss, parts, anchor=0.1),
        estimator,
        inner_tx=optax.sgd(0.1),
        outer_tx=optax.sgd(0.1),
        rollback=False,
    )
    args = (
        solver.init(parts.task, init_alpha(jax.random.key(0), parts)),
        jnp.ones((2, WIDTH, WIDTH)),
        jnp.ones((WIDTH, WIDTH)),
    )
    counted = matmul_flops(solver.step, *args) / (2 * WIDTH**3)
    compiled = products_in(jax.jit(solver.step).lower(*args).compile().as_text())
    # Counted are also inner products of vectors, a small part of one each, which are compiled into sums.
    assert 0.95 * counted <= compiled <= counted

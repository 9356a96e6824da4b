"""Weights computed within the scan: the same function and derivatives as computed before it, in less memory."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import SMALL, Small, batch_of, build, loss_of, num_products

import agwm_jax.core.deferred
from agwm_jax.core.deferred import Deferred
from agwm_jax.models.bert import BertConfig
from agwm_jax.models.weights import of_role


def mixture(pretrained, task, left, right):
    gate = left * right
    return gate * task + (1 - gate) * pretrained


def mixed(model, params):
    """Operands of the mixture for every kernel, the pooler's among them."""
    rng = np.random.default_rng(0)

    def operands(value):
        *stack, rows, columns = value.shape
        factors = rng.uniform(0.2, 1, (*stack, rows, 1)), rng.uniform(0.2, 1, (*stack, 1, columns))
        task = value + 0.1 * rng.normal(size=value.shape)
        return tuple(x.astype(value.dtype) for x in (value, task, *factors))

    return {path: operands(params[path]) for path in of_role(model.weights, "kernel")}


def losses(model, params, batch):
    """The loss as a function of the operands, mixed before the model and within it."""
    loss = loss_of(model.apply, batch, key=jax.random.key(1))
    return (
        lambda operands: loss(params | {path: mixture(*own) for path, own in operands.items()}),
        lambda operands: loss(params | {path: Deferred(mixture, own) for path, own in operands.items()}),
    )


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_same_function_and_derivatives(remat):
    """Loss, gradient of every operand and a Hessian-vector product, with dropout, in float64."""
    small = SMALL["gelu"]
    with jax.enable_x64(True):
        model, params = build(small, dtype=np.float64, remat=remat)
        operands = mixed(model, params)
        assert "pooler.kernel" in operands
        tangent = jax.tree.map(lambda x: np.cos(np.arange(x.size)).reshape(x.shape), operands)

        def outputs(loss):
            step = jax.jit(lambda x, v: (loss(x), *jax.jvp(jax.grad(loss), (x,), (v,))))
            return step(operands, tangent)

        eager, deferred = (outputs(loss) for loss in losses(model, params, batch_of(small)))
    for first, second in zip(jax.tree.leaves(eager), jax.tree.leaves(deferred), strict=True):
        np.testing.assert_allclose(first, second, rtol=0, atol=1e-12 * max(1, np.abs(first).max()))


def wide():
    """Twenty layers whose kernels are much larger than the batch."""
    small = Small(BertConfig(20, 64, 20, 2, 256, max_position_embeddings=8), 2, (4, 3), 9)
    return *build(small), batch_of(small)


def test_products_are_not_computed_again():
    model, params, batch = wide()
    operands = mixed(model, params)
    eager, deferred = (num_products(jax.make_jaxpr(jax.grad(loss))(operands)) for loss in losses(model, params, batch))
    assert eager == deferred


def test_only_one_layers_weights_live():
    """Temporaries of the compiled gradient fall by more than one copy of all mixed kernels."""
    model, params, batch = wide()
    operands = mixed(model, params)
    kernels = sum(own[0].nbytes for own in operands.values())

    def temporaries(loss):
        return jax.jit(jax.grad(loss)).lower(operands).compile().memory_analysis().temp_size_in_bytes

    eager, deferred = (temporaries(loss) for loss in losses(model, params, batch))
    print(f"kernels {kernels}, temporaries {eager} mixed before, {deferred} mixed within")
    assert eager - deferred > kernels
    assert deferred < 0.5 * kernels


def test_example_in_the_docstring():
    results = doctest.testmod(agwm_jax.core.deferred)
    assert results.attempted > 0
    assert results.failed == 0


def test_a_deferred_weight_is_a_pytree():
    weight = Deferred(mixture, (jnp.zeros(2), jnp.ones(2), jnp.ones(2), jnp.ones(2)))
    doubled = jax.jit(lambda x: jax.tree.map(lambda leaf: 2 * leaf, x))(weight)
    assert isinstance(doubled, Deferred)
    np.testing.assert_array_equal(doubled.materialise(), [8, 8])
    mapped = jax.vmap(lambda x: x.materialise())(jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), weight))
    np.testing.assert_array_equal(mapped, np.ones((2, 2)))

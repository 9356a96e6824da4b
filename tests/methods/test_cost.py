"""The counted matrix products of a step, in forward-backwards of the model: what each method says it costs."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import pytest
from harness import setup_of, shapes_of

from agwm_jax.core.cost import matmul_flops
from agwm_jax.methods.interface import METHODS, Context

WIDTH, TOKENS = 256, 256
SETTINGS = {"agwm": {"search": {"validation_fraction": 0.4}}}
# Where the registry names another table: unrolled through one step (4), and the step taken anew.
ELSEWHERE = {("agwm", "search"): "5"}


def batch_specs():
    spec = jax.ShapeDtypeStruct
    return {
        "input_ids": spec((4, TOKENS), jnp.int32),
        "labels": spec((4,), jnp.int32),
        "weight": spec((4,), jnp.float32),
        "key": jax.eval_shape(lambda: jax.random.key(0)),
    }


def forward_backward(setup):
    """Matrix products of the gradient in all weights."""
    loss = setup.loss(reverse_only=True)
    return matmul_flops(jax.value_and_grad(loss), shapes_of(width=WIDTH), batch_specs())


def step_flops(phase, variables):
    spec = jax.ShapeDtypeStruct
    key, context = jax.eval_shape(lambda: jax.random.key(0)), Context(shapes_of(width=WIDTH), variables, variables)
    batches = {
        name: jax.tree.map(lambda x, plan=plan: spec((*plan.shape[1:-1], *x.shape), x.dtype), batch_specs())
        for name, plan in phase.plan.items()
    }
    return matmul_flops(
        phase.step, jax.eval_shape(phase.start, context, key), context, batches, key, spec((), jnp.int32)
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_step_costs_what_the_registry_says(name):
    """In forward-backwards of the model: "1", "2/3 to 1", or one of these for each phase, "fisher: 1; finetune: 1"."""
    entry, setup = METHODS[name], setup_of()
    method = entry.value.model_validate({"name": name, **SETTINGS.get(name, {})}).build(setup)
    whole = forward_backward(setup)
    stated = dict(part.rpartition(": ")[::2] for part in entry.facts["cost"].split("; "))
    for number, phase in enumerate(method.phases):
        kind = phase.name.split("-")[0]
        text = ELSEWHERE.get((name, kind)) or stated.get(kind, stated.get(""))
        low, high = (float(Fraction(end)) for end in (text.split(" to ") * 2)[:2])
        cost = step_flops(phase, method.learnt_shapes(shapes_of(width=WIDTH), number)) / whole
        assert low - 0.02 <= cost <= high + 0.02, (phase.name, cost)

"""The counted matrix products of a step, in forward-backwards of the model: what each method says it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import pretrained_weights, setup_of, shapes_of

from agwm_jax.core.cost import matmul_flops
from agwm_jax.methods.interface import METHODS, Context

WIDTH, TOKENS = 256, 64
PHASES = {
    "child_tuning_d": {"fisher": 1.0, "finetune": 1.0},
    "frozen_alpha": {"finetune": 1.0},
    "l2_sp": {"finetune": 1.0},
    "mixout": {"finetune": 1.0},
    "vanilla": {"finetune": 1.0},
    "agwm": {"finetune": 1.0},
}


def batch_specs():
    spec = jax.ShapeDtypeStruct
    return {
        "input_ids": spec((4, TOKENS), jnp.int32),
        "labels": spec((4,), jnp.int32),
        "weight": spec((4,), jnp.float32),
        "key": jax.eval_shape(lambda: jax.random.key(0)),
    }


def forward_backward(setup, paths):
    """Of the gradient in some weights."""
    shapes = shapes_of(width=WIDTH)

    def loss(trained, rest, batch):
        return setup.loss(reverse_only=True)({**rest, **trained}, batch)

    trained = {path: shapes[path] for path in paths}
    rest = {path: spec for path, spec in shapes.items() if path not in trained}
    return matmul_flops(jax.value_and_grad(loss), trained, rest, batch_specs())


def step_cost(method, phase, variables):
    key = jax.eval_shape(lambda: jax.random.key(0))
    context = Context(shapes_of(width=WIDTH), variables, variables)
    state = jax.eval_shape(phase.start, context, key)
    return matmul_flops(phase.step, state, context, {"train": batch_specs()}, key, jax.ShapeDtypeStruct((), jnp.int32))


@pytest.mark.parametrize("name", PHASES)
def test_a_step_costs_what_the_registry_says(name):
    setup = setup_of()
    entry = METHODS[name]
    method = entry.value().build(setup)
    whole = forward_backward(setup, shapes_of())
    shapes = shapes_of(width=WIDTH)
    for phase in method.phases:
        if phase.name in PHASES[name]:
            variables = method.learnt_shapes(shapes, method.phases.index(phase))
            print(name, phase.name, step_cost(method, phase, variables) / whole)

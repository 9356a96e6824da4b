"""What the gate is worth, against losses that are computed one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import Runner, batch_of, pretrained_weights, setup_of, training_set

from agwm_jax.core.types import LowRank
from agwm_jax.methods.agwm import Agwm
from agwm_jax.methods.interface import Context
from agwm_jax.methods.leverage import agreement

SEARCH = {"epochs": 1, "validation_fraction": 0.4, "num_splits": 2}
PRETRAINED = pretrained_weights()


def method_of(**search):
    settings = {"name": "agwm", "mixup": {"noise": 0.3, "start": 0.5}, "search": {**SEARCH, **search}}
    return Agwm.model_validate(settings).build(setup_of(epochs=1))


def test_the_losses_are_those_of_the_merged_weights():
    setup, method = setup_of(epochs=1), method_of()
    searches, (phase,), _ = method.stages
    initial = method.init(PRETRAINED, jax.random.key(0))
    moved = {path: x + 0.3 * jnp.cos(jnp.arange(1.0 * x.size)).reshape(x.shape) for path, x in initial["task"].items()}
    alphas = {str(i): method.init(PRETRAINED, jax.random.key(i))["alpha"] for i in range(2)}
    learnt = {"task": moved, "alpha": initial["alpha"], "alphas": alphas}
    context, data = Context(PRETRAINED, initial, learnt), training_set()
    state, step = phase.start(context, jax.random.key(0)), jax.jit(phase.step)
    for number, rows in enumerate(phase.plan["outer"]):
        batch = batch_of(data, rows, jax.random.key(7))
        state, _ = step(state, context, {"outer": batch}, jax.random.key(0), jnp.int32(number))
    found = {name: float(x) for name, x in phase.monitor(state).items()}

    read = np.sort(phase.plan["outer"][phase.plan["outer"] >= 0])
    fitted = np.unique(np.concatenate([each.plan["outer"].ravel() for each in searches]))
    np.testing.assert_array_equal(read, fitted[fitted >= 0])  # each once
    whole = batch_of(data, read, jax.random.key(0))
    del whole["key"]
    loss = jax.jit(setup.loss(reverse_only=True))

    def mixed(a):
        kernels = {path: a * moved[path] + (1 - a) * PRETRAINED[path] for path in initial["alpha"]}
        return float(loss({**PRETRAINED, **moved, **kernels}, whole))

    numbers = [mixed(a) for a in np.linspace(0, 1, 11)]
    np.testing.assert_allclose(found["validation_loss"], loss(method.merge(PRETRAINED, learnt), whole), rtol=1e-5)
    np.testing.assert_allclose(found["open_loss"], numbers[-1], rtol=1e-5)
    np.testing.assert_allclose(found["number_loss"], min(numbers), rtol=1e-5)
    np.testing.assert_allclose(found["best_number"], np.argmin(numbers) / 10, rtol=1e-6)
    gates = [np.concatenate([(x.left @ x.right).ravel() for x in alpha.values()]) for alpha in alphas.values()]
    np.testing.assert_allclose(found["alpha_agreement"], np.corrcoef(gates)[0, 1], atol=1e-5)


def test_agreement_is_1_of_a_gate_with_itself_and_0_of_a_constant_one():
    gates = {"a": LowRank(jnp.linspace(0.1, 1, 6).reshape(6, 1), jnp.linspace(1, 0.5, 4).reshape(1, 4))}
    np.testing.assert_allclose(agreement([gates, gates, gates]), 1, rtol=1e-5)
    assert agreement([gates, {"a": jnp.full((6, 4), 0.5)}]) == 0


@pytest.mark.parametrize("search", [{"average": "alpha"}, {"leverage": False}])
def test_nothing_is_read_where_it_tells_nothing(search):
    method = method_of(**search)
    assert [phase.name for phase in method.phases] == ["search-0", "search-1", "finetune"]
    assert method.learnt_shapes(PRETRAINED).keys() == {"task", "alpha"}


def test_reading_changes_nothing_that_is_learnt():
    found = [Runner(method_of(leverage=on)).run(PRETRAINED, jax.random.key(3)).weights for on in (True, False)]
    for path, weight in found[0].items():
        np.testing.assert_array_equal(weight, found[1][path])

"""The controls of agwm and model_stock, held to NumPy on the problem of three encoder weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import pretrained_weights, run, setup_of
from three_weights import DATA, PRETRAINED, by_path, flat, gradient, setup, take_step

from agwm_jax.errors import AgwmError
from agwm_jax.methods.fixed_gate import FixedGate
from agwm_jax.methods.interface import Context
from agwm_jax.methods.joint import Joint
from agwm_jax.methods.model_stock import ModelStock
from agwm_jax.methods.restart import Restart
from agwm_jax.methods.soup import Soup

W0 = flat(PRETRAINED)
MOVED = by_path(W0 + np.array([0.3, -0.2, 0.4, 0.1, -0.5]))
COLUMNS = {name: jnp.asarray(column) for name, column in DATA.items()}
STEADY = {"schedule": "constant", "warmup_fraction": 0.0, "weight_decay": 0.0, "eps": 1.0}


def as_arrays(weights) -> dict:
    return {path: jnp.asarray(weight, jnp.float32) for path, weight in weights.items()}


def adam(vector, plan, *, rate, clip=np.inf):
    """Bias-corrected steps with eps 1 over the rows of a plan; the vector after them and the losses before each."""
    first, second, losses = np.zeros(5), np.zeros(5), []
    for step, rows in enumerate(plan, start=1):
        real = rows[rows >= 0]
        losses.append(0.5 * np.mean((DATA["x"][real] @ vector - DATA["y"][real]) ** 2))
        g = gradient(vector, rows)
        g = g * min(1, clip / np.linalg.norm(g))
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        vector = vector - rate * first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1)
    return vector, losses


@pytest.mark.parametrize("name", ["restart", "soup"])
def test_the_first_stage_trains_parts_of_the_data_and_finetune_starts_anew_at_their_mean(name):
    first = {"epochs": 2, "validation_fraction": 0.3, "optimizer": {**STEADY, "learning_rate": 0.3}}
    count = {"restart": 1, "soup": 3}[name]
    settings = Restart if name == "restart" else Soup
    own = {} if name == "restart" else {"num_splits": count}
    method = settings.model_validate({"name": name, "first": {**first}, **own}).build(
        setup(eps=1.0, gradient_clip=0.2, learning_rate=0.1)
    )
    trained = run(method, PRETRAINED, jax.random.key(0), data=COLUMNS)
    ends, parts = [], []
    for phase in method.stages[0]:
        plan = phase.plan["inner"]
        assert plan.shape == (4, 1, 4)  # two passes over seven of ten examples
        for a_pass in (plan[:2], plan[2:]):
            parts.append(np.sort(a_pass[a_pass >= 0]).tolist())
            assert len(set(parts[-1])) == 7
        end, losses = adam(W0, plan[:, 0], rate=0.3, clip=5.0)
        np.testing.assert_allclose(trained.infos[phase.name]["loss"], losses, rtol=1e-5)
        ends.append(end)
    assert parts[::2] == parts[1::2]
    assert len(set(map(tuple, parts))) == count, "splits of their own"
    (finetune,) = method.stages[1]
    found, losses = adam(np.mean(ends, axis=0), finetune.plan["train"], rate=0.1, clip=0.2)
    np.testing.assert_allclose(trained.losses, losses, rtol=1e-4)
    np.testing.assert_allclose(flat(trained.weights), found, rtol=1e-4, atol=1e-5)


def test_a_joint_step_trains_w_through_the_gate_and_alpha_by_an_optimiser_of_its_own():
    outer = {**STEADY, "learning_rate": 0.5}
    settings = {"name": "joint", "mixup": {"rank": "full", "noise": 0.0}, "outer": outer}
    (phase,) = Joint.model_validate(settings).build(setup(eps=1.0, gradient_clip=0.1)).phases
    gate = np.array([[0.2], [0.95]])
    learnt = {"task": as_arrays(MOVED), "alpha": {"encoder.query.kernel": jnp.asarray(gate, jnp.float32)}}
    after, info, rows = take_step(phase, learnt)

    a = np.array([1, *gate.ravel(), 1, 1])
    moved = flat(MOVED)
    effective = a * moved + (1 - a) * W0
    g = gradient(effective, rows)
    of_task, of_gate = a * g, (g * (moved - W0))[1:3]
    of_task *= min(1, 0.1 / np.linalg.norm(of_task))  # alpha's gradient has no part in the clip of W's
    np.testing.assert_allclose(flat(after.params["task"]), moved - 0.01 * of_task / (abs(of_task) + 1), rtol=1e-5)
    stepped = gate.ravel() - 0.5 * of_gate / (abs(of_gate) + 1)
    assert (stepped > 1).any() or (stepped < 0).any(), "the projection has something to do"
    np.testing.assert_allclose(
        after.params["alpha"]["encoder.query.kernel"].ravel(), np.clip(stepped, 0, 1), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        info["loss"], 0.5 * np.mean((DATA["x"][rows] @ effective - DATA["y"][rows]) ** 2), rtol=1e-5
    )


@pytest.mark.parametrize("roles", [("kernel",), ("kernel", "bias", "norm", "embedding")])
def test_a_fixed_gate_is_in_the_forward_pass_the_gradient_and_the_merge(roles):
    method = FixedGate(gate=0.3, roles=roles).build(setup(eps=1.0))
    (phase,) = method.phases
    after, info, rows = take_step(phase, {"task": as_arrays(MOVED)})
    a = np.array([0.3 if len(roles) > 1 else 1, 0.3, 0.3, 0.3 if len(roles) > 1 else 1, 1])  # the head is W
    moved = flat(MOVED)
    effective = a * moved + (1 - a) * W0
    g = a * gradient(effective, rows)
    np.testing.assert_allclose(flat(after.params["task"]), moved - 0.01 * g / (abs(g) + 1), rtol=1e-5)
    loss = 0.5 * np.mean((DATA["x"][rows] @ effective - DATA["y"][rows]) ** 2)
    np.testing.assert_allclose(info["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(flat(method.merge(PRETRAINED, {"task": as_arrays(MOVED)})), effective, rtol=1e-6)


def finished(method, pretrained, ends):
    """What is left where the runs end with these weights."""
    initial = learnt = method.init(pretrained, jax.random.key(0))
    for phase, end in zip(method.phases, ends, strict=True):
        context = Context(pretrained, initial, learnt)
        state = phase.start(context, jax.random.key(0))
        for path, weight in state.params["task"].items():
            np.testing.assert_array_equal(weight, pretrained[path])  # every run starts there
        learnt = phase.finish(context, state._replace(params={"task": end}))
    return learnt


def stocked(ends, start):
    """The rule for one tensor, from the cosines of all pairs, in float64."""
    changes = [np.asarray(end, np.float64) - np.asarray(start, np.float64) for end in ends]
    pairs = [(x, y) for i, x in enumerate(changes) for y in changes[:i]]
    cosine = np.mean([np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y) for x, y in pairs])
    k = len(ends)
    t = k * cosine / (1 + (k - 1) * cosine) if cosine > 0 else 0.0
    return t * np.mean(ends, axis=0) + (1 - t) * np.asarray(start), t


def test_model_stock_is_the_mean_pulled_back_by_tensor_and_layer():
    pretrained = pretrained_weights()
    method = ModelStock(num_runs=3).build(setup_of(batch_size=3))
    rng = np.random.default_rng(4)
    common = {path: rng.normal(size=x.shape) for path, x in pretrained.items()}
    ends = [
        {path: x + jnp.asarray(common[path] + rng.normal(size=x.shape), x.dtype) for path, x in pretrained.items()}
        for _ in range(3)
    ]
    learnt = finished(method, pretrained, ends)
    assert learnt.keys() == {"task"}
    found = method.merge(pretrained, learnt)
    shares = []
    for path, start in pretrained.items():
        layers = range(2) if path.startswith("encoder.layers") else [...]
        for layer in layers:
            expected, t = stocked([end[path][layer] for end in ends], start[layer])
            shares.append(t)
            np.testing.assert_allclose(found[path][layer], expected, rtol=1e-4, atol=1e-5, err_msg=path)
    assert min(shares) < 0.65 < 0.8 < max(shares)


def test_model_stock_of_identical_runs_is_that_run_and_of_runs_that_disagree_w0():
    method = ModelStock(num_runs=4).build(setup(batch_size=2))
    alike = finished(method, PRETRAINED, [as_arrays(MOVED)] * 4)
    np.testing.assert_allclose(flat(alike["task"]), flat(MOVED), rtol=1e-6)
    unmoved = finished(method, PRETRAINED, [PRETRAINED] * 4)
    np.testing.assert_array_equal(flat(unmoved["task"]), W0)  # no direction, no NaN
    signs = [1, -1, 1, -1]
    apart = finished(method, PRETRAINED, [as_arrays(by_path(W0 + sign * (flat(MOVED) - W0))) for sign in signs])
    np.testing.assert_array_equal(flat(apart["task"]), W0)


def test_model_stocks_runs_see_disjoint_parts_of_one_size():
    method = ModelStock(num_runs=3).build(setup(batch_size=2, epochs=2))
    rows = [np.unique(phase.plan["train"][phase.plan["train"] >= 0]) for phase in method.phases]
    assert [len(part) for part in rows] == [3, 3, 3]
    assert len(set(np.concatenate(rows))) == 9
    assert all(phase.plan["train"].shape == (4, 2) for phase in method.phases)
    trained = run(method, PRETRAINED, jax.random.key(0), data=COLUMNS)
    assert np.any(flat(trained.weights) != W0)


def test_parts_that_are_smaller_than_a_batch_are_refused():
    with pytest.raises(AgwmError, match=r"num_runs is 4: a part of 10 training examples would have 2, fewer than one"):
        ModelStock().build(setup())

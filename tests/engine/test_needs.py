"""What no function reads is held nowhere: not on the devices, not among a program's arguments, not in a checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agwm_jax.engine.checkpoint import Checkpoints
from agwm_jax.engine.group import Group
from agwm_jax.engine.lanes import Lanes
from agwm_jax.engine.liveness import dependence
from agwm_jax.engine.needs import stages_as_run
from agwm_jax.engine.observer import Observer
from agwm_jax.errors import AgwmError
from agwm_jax.methods.interface import Method
from tests.engine.methods import DOWN, HEAD, UP, WEIGHTS, build_members, layout, mixed, plain, train

X = jax.ShapeDtypeStruct((3,), jnp.float32)


def test_what_a_function_reads():
    def fn(a, b, c, d):
        return {"sum": a + b, "same": c, "dead": (b * c * d, a)[1]}

    found = dependence(fn, X, X, X, X)
    assert found.reads == (True, True, True, False)
    assert found.passes == (0, 2, None)  # dead, same, sum
    assert found.result["sum"].shape == (3,)
    assert dependence(fn, X, X, X, X, by_name=True).reads == (True, True, False, False)


def test_dead_code_reads_nothing_also_inside_of_a_jitted_function():
    inner = jax.jit(lambda a, b: (2 * a, 3 * b))
    assert dependence(lambda a, b: inner(a, b)[0], X, X).reads == (True, False)
    assert dependence(lambda a, b: inner(a, b)[1] * 0 + a, X, X).reads == (True, True)


def test_dead_code_reads_nothing_inside_of_a_loop():
    def fn(a, b):
        return jax.lax.scan(lambda carry, x: (carry + x, b.sum()), a.sum(), a)

    assert dependence(lambda a, b: fn(a, b)[0], X, X).reads == (True, False)
    assert dependence(fn, X, X).reads == (True, True)


def test_a_traced_function_is_the_function():
    def fn(tree, key):
        return {"y": tree["x"] * jax.random.normal(key, (3,)), "x": tree["x"]}

    found, args = (
        dependence(fn, {"x": X}, jax.eval_shape(lambda: jax.random.key(0))),
        ({"x": jnp.ones(3)}, jax.random.key(1)),
    )
    for name, value in fn(*args).items():
        np.testing.assert_array_equal(found(*args)[name], value)


@pytest.fixture(scope="module")
def groups():
    return {make.__name__: Group(build_members(make, (3, 5)), layout(), WEIGHTS) for make in (plain, mixed)}


ENCODER = {f"pretrained/{path}" for path in (UP, DOWN)}
ALL = ENCODER | {f"pretrained/{HEAD}"}


def test_plain_training_holds_no_pretrained_copy(groups):
    needs = groups["plain"].needs
    assert needs.held(0, started=False) == ALL, "training starts there"
    assert needs.held(0, started=True) == frozenset()
    assert needs.held(1, started=False) == {f"0/task/{path}" for path in (UP, DOWN, HEAD)}


def test_a_mixture_holds_the_pretrained_side_of_what_is_mixed(groups):
    needs, gate = groups["mixed"].needs, {f"1/gate/{UP}/{side}" for side in ("left", "right")}
    assert needs.held(0, started=True) == ALL, "the second search starts there"
    first = {f"0/task/{path}" for path in (UP, DOWN, HEAD)} | {f"0/gate/{UP}/{side}" for side in ("left", "right")}
    assert needs.held(1, started=True) == first | {f"pretrained/{UP}"}, "its mean needs the first"
    assert needs.held(2, started=True) == gate | {f"pretrained/{UP}"}
    assert needs.held(3, started=False) == gate | {f"2/task/{path}" for path in (UP, DOWN, HEAD)}, (
        "the gate passes through"
    )


def test_weights_that_start_as_the_pretrained_ones_share_their_buffer(groups):
    group = groups["mixed"]
    assert group.needs.initial["task"] == {path: f"pretrained/{path}" for path in (UP, DOWN, HEAD)}
    assert group.shared == ENCODER, "heads differ by member"
    held = group.place(group.needs.held(0, started=False))
    assert held.keys() == ALL, "no search reads the gate of the start"
    assert {key: x.shape[0] for key, x in held.items() if key not in ENCODER} == {f"pretrained/{HEAD}": 2}


def test_only_what_a_step_reads_goes_into_its_program(groups):
    for name, keys in (("plain", []), ("mixed", [f"pretrained/{UP}"])):
        group = groups[name]
        held, *_ = Lanes(group, 0)._abstract_arguments
        assert [x.shape for x in held] == [group.needs.shapes[key].shape for key in keys]


class Watch(Observer):
    """Counts the bytes of all arrays on the devices while steps run."""

    def __init__(self):
        self.most = 0

    def chunk(self, member, phase, infos, *, step, offset):
        self.most = max(self.most, sum(x.nbytes for x in jax.live_arrays()))


def test_live_buffers_of_plain_training_are_its_state(groups):
    """Weights and two moments: three times the weights, and less than four with the training set and the curves."""
    members = groups["plain"].members
    before = sum(x.nbytes for x in jax.live_arrays())
    watch = Watch()
    train(members, observer=watch)
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(Lanes(groups["plain"], 0).state))
    weights = sum(x.nbytes for x in members[0].pretrained.values())
    data = sum(x.nbytes for member in members for x in member.data.values())
    assert state >= 6 * weights
    assert watch.most - before - data - state < weights / 2


def test_a_checkpoint_holds_what_is_still_needed(tmp_path, monkeypatch):
    saved = []
    save = Checkpoints.save

    def spy(self, step, position, state):
        saved.append((position.stage, set(state["held"])))
        save(self, step, position, state)

    monkeypatch.setattr(Checkpoints, "save", spy)
    checkpoints = Checkpoints(tmp_path, keep=1, fingerprint="toy")
    train(build_members(mixed, (3,)), checkpoints=checkpoints)
    checkpoints.close()
    first = {f"0/task/{path}" for path in (UP, DOWN, HEAD)} | {f"0/gate/{UP}/{side}" for side in ("left", "right")}
    assert saved == [(0, set()), (1, first), (2, {f"1/gate/{UP}/{side}" for side in ("left", "right")})]


def test_phases_that_differ_do_not_go_side_by_side():
    (search, other), finetune = mixed(0).stages
    longer = {name: rows[:-1] for name, rows in other.plan.items()}
    method = Method(lambda w0, key: {}, ((search, other._replace(plan=longer)), finetune), lambda w0, own: w0)
    with pytest.raises(AgwmError, match="phases search-0 and search-1 are one stage and differ in their step or"):
        stages_as_run(method, together=True)
    assert len(stages_as_run(method, together=False)) == 3

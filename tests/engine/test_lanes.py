"""Seeds and phases side by side learn what they would alone, on any mesh, and one that diverges takes nobody along."""

import os
import signal
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agwm_jax.engine.batches import step_batches, stream
from agwm_jax.engine.checkpoint import Checkpoints
from agwm_jax.engine.group import Group
from agwm_jax.engine.lanes import Programs
from agwm_jax.engine.loop import Interrupted
from agwm_jax.engine.observer import InMemory
from agwm_jax.errors import AgwmError, Diverged
from tests.engine.methods import (
    EXAMPLES,
    HEAD,
    UP,
    WEIGHTS,
    build_members,
    layout,
    loss,
    mixed,
    plain,
    pretrained,
    train,
)

SEEDS = (3, 5)


@pytest.fixture(scope="module")
def members():
    """Two seeds that share the pretrained encoder, as whole runs do."""
    return build_members(mixed, SEEDS)


@pytest.fixture(scope="module")
def programs():
    """What was compiled for the members by the tests before."""
    return Programs()


@pytest.fixture(scope="module")
def alone(members):
    """Each seed by itself, its searches one after the other, on one device: what all else is held to."""
    programs = Programs()
    runs = [train([member], programs=programs) for member in members]
    assert len(programs.compiled) == 2, "one program serves all searches, and one all seeds"
    return [outcome.learnt[0] for outcome, _ in runs], [observer.records[0] for _, observer in runs]


def assert_same(found, alone, members=(0, 1), rtol=1e-5):
    """Losses by phase and step, and what was learnt."""
    outcome, observer = found
    for place, member in enumerate(members):
        ours, theirs = (_by_step(own) for own in (observer.records[place], alone[1][member]))
        assert ours.keys() == theirs.keys()
        assert len(ours) == len(observer.records[place]), "a step is recorded once"
        for key, record in theirs.items():
            assert ours[key] == pytest.approx(record, rel=rtol, abs=1e-6), key
        chex.assert_trees_all_close(outcome.learnt[place], alone[0][member], rtol=rtol, atol=1e-5)


def _by_step(records):
    return {(r["phase"], r["step"]): {name: x for name, x in r.items() if name != "phase"} for r in records}


def test_what_is_learnt_differs_by_seed_phase_and_start(alone):
    first, second = alone[1]
    assert all(abs(a["loss"] - b["loss"]) > 1e-4 for a, b in zip(first, second, strict=True))
    searches = [[r["gate_mean"] for r in first if r["phase"] == f"search-{i}" and "gate_mean" in r] for i in (0, 1)]
    assert len(searches[0]) == 2, "the monitor looks once a chunk"
    assert abs(searches[0][0] - searches[1][0]) > 1e-3, "each search starts at a gate of its own"
    assert np.abs(np.asarray(alone[0][0]["task"][UP]) - pretrained()[UP]).max() > 1e-2


def test_it_is_the_loop_that_one_would_write_by_hand():
    """Gradient descent from the pretrained weights, with the random streams of version 0.3."""
    (member,) = build_members(lambda seed: plain(seed, tx=optax.sgd(0.05)), [4])
    _, observer = train([member])
    params, (phase,) = dict(member.pretrained), member.method.phases
    key = jax.random.fold_in(member.key, zlib.crc32(b"finetune"))
    for step, rows in enumerate(phase.plan["train"]):
        batch = {name: column[np.maximum(rows, 0)] for name, column in member.data.items()}
        (own,) = jax.random.split(jax.random.fold_in(key, step), 1)
        value, grads = jax.value_and_grad(loss)(params, {**batch, "weight": jnp.float32(rows >= 0), "key": own})
        assert observer.records[0][step]["loss"] == pytest.approx(float(value), rel=1e-5)
        params = jax.tree.map(lambda w, g: w - 0.05 * g, params, grads)
    assert observer.records[0][0]["global_step"] == 0
    assert len(observer.records[0]) == len(phase.plan["train"])


@pytest.mark.parametrize(
    ("together", "mesh", "fully_sharded"),
    [
        (False, (1, 1, 1), False),
        (True, (1, 1, 1), False),
        (True, (2, 2, 2), False),
        (False, (1, 8, 1), True),
        (False, (1, 4, 2), True),
        (False, (1, 2, 4), False),
    ],
    ids=["seeds", "seeds and phases", "mesh of all axes", "8x1 fully sharded", "4x2 fully sharded", "2x4"],
)
def test_side_by_side_equals_one_by_one(members, alone, programs, together, mesh, fully_sharded):
    where = layout(*mesh, fully_sharded=fully_sharded, together=together)
    outcome, observer = train(members, where, programs=programs)
    assert_same((outcome, observer), alone)
    assert ("search-0..1" in outcome.seconds) == together
    if fully_sharded:
        kernel = outcome.learnt[0]["task"][UP]
        assert kernel.addressable_shards[0].data.size == kernel.size // 8


class StopAfter(InMemory):
    """Presses Ctrl-C when so many steps of the first member are recorded."""

    def __init__(self, num_members, steps):
        super().__init__(num_members)
        self.steps, self.pressed = steps, False

    def chunk(self, member, phase, infos, *, step, offset):
        super().chunk(member, phase, infos, step=step, offset=offset)
        if len(self.records[0]) >= self.steps and not self.pressed:
            self.pressed = True
            os.kill(os.getpid(), signal.SIGINT)


def stopped(members, where, checkpoints, observer, steps, programs):
    """Go on from where `observer` stands and be stopped at a step of the first member; the observer after that."""
    stopping = StopAfter(len(members), steps)
    stopping.records = observer.records
    with pytest.raises(Interrupted, match="the state is saved: run the same command again"):
        train(members, where, observer=stopping, checkpoints=checkpoints, programs=programs)
    return stopping


@pytest.mark.parametrize("steps", [2, 9, 16], ids=["in search-0", "in search-1", "in finetune"])
def test_a_checkpoint_goes_from_mesh_to_mesh(members, alone, programs, tmp_path, steps):
    checkpoints = Checkpoints(tmp_path, keep=1, fingerprint="toy")
    observer = stopped(members, layout(1, 4, 2, fully_sharded=True), checkpoints, InMemory(2), steps, programs)
    found = train(members, layout(1, 2, 4), observer=_plain(observer), checkpoints=checkpoints, programs=programs)
    checkpoints.close()
    assert_same(found, alone)
    assert any("continuing in" in line for line in found[1].said)


def _plain(observer):
    """The records so far, without the finger on Ctrl-C."""
    found = InMemory(len(observer.records))
    found.records = observer.records
    return found


def test_a_checkpoint_of_other_lanes_is_refused(members, programs, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, fingerprint="toy")
    stopped(members, layout(together=True), checkpoints, InMemory(2), 2, programs)
    with pytest.raises(
        AgwmError, match=r"of seeds \[3, 5\] side by side, all splits at once, this run would train seeds"
    ):
        train(members, checkpoints=checkpoints, programs=programs)
    with pytest.raises(AgwmError, match="this run would train seed 3, all splits at once; continue with"):
        train(members[:1], layout(together=True), checkpoints=checkpoints)
    checkpoints.close()


def test_a_seed_that_diverges_is_given_up_and_stays_so_and_the_other_goes_on(members, alone, programs, tmp_path):
    broken = members[1]._replace(data={**members[1].data, "labels": np.full(EXAMPLES, np.inf, np.float32)})
    checkpoints = Checkpoints(tmp_path, keep=1, fingerprint="toy")
    observer = stopped([members[0], broken], layout(), checkpoints, InMemory(2), 9, programs)
    observer = _plain(observer)
    outcome, _ = train([members[0], broken], observer=observer, checkpoints=checkpoints, programs=programs)
    assert_same((outcome, observer), alone, members=(0,))
    assert outcome.learnt[1] is None
    assert outcome.diverged[1].startswith("search-0: loss became inf at step 0; lower the learning rate")
    assert len(observer.records[1]) == 4, "its curve ends with the chunk that it diverged in"
    checkpoints.close()
    with pytest.raises(Diverged, match=r"all that went side by side diverged, .*: loss became inf .*no checkpoint\)"):
        train([member._replace(data=broken.data) for member in members], programs=programs)


def test_a_bad_state_does_not_replace_a_good_checkpoint(tmp_path):
    """The learning rate of the second phase is too high: the end of the first is what is kept."""
    (member,) = build_members(plain, [0])
    good, bad = member.method.phases[0], plain(0, tx=optax.sgd(float("inf"))).phases[0]._replace(name="second")
    member = member._replace(method=member.method._replace(stages=((good,), (bad,))))
    checkpoints = Checkpoints(tmp_path, keep=1, fingerprint="toy")
    observer = InMemory(1)
    with pytest.raises(
        Diverged, match=r"second: a weight is not finite after step 0; .*\(the checkpoint of step 6 is kept\)"
    ):
        train([member], observer=observer, checkpoints=checkpoints, checkpoint_minutes=1e-9, chunk_steps=1)
    assert checkpoints.position().stage == 0
    assert len([r for r in observer.records[0] if r["phase"] == "second"]) <= 2, "noticed at most one chunk later"
    checkpoints.close()


def test_the_training_set_lies_on_the_devices_once_where_it_is_one(members):
    same = [members[0], members[1]._replace(data=members[0].data)]
    for own, first in ((same, (0, 0)), (members, (0, EXAMPLES))):
        group = Group(own, layout(), WEIGHTS)
        assert group.first_rows == first
        placed = group.place_data()
        assert {name: x.shape for name, x in placed.items()} == {name: x.shape for name, x in group.data.items()}
        rows = np.asarray(placed["x"])[first[1] :][:EXAMPLES]
        np.testing.assert_array_equal(rows, own[1].data["x"])


def test_batches_are_drawn_as_in_version_0_3(members):
    """The dropout keys of a step: a member's key, folded with the phase's name and the step, split over the batches."""
    key = jax.random.key(7)
    phase = jax.random.fold_in(key, zlib.crc32(b"search-0"))
    assert stream(key, "search-0") == phase
    own = jax.random.fold_in(phase, 5)
    rows = jnp.zeros((6, 4), jnp.int32)
    batches = step_batches(jax.tree.map(jnp.asarray, members[0].data), {"b": rows, "a": rows}, own, 5)
    assert [batches[name]["key"] for name in ("a", "b")] == list(jax.random.split(own, 2))


def test_heads_differ_and_the_encoder_is_shared(members):
    assert members[0].pretrained[UP] is members[1].pretrained[UP]
    assert members[0].pretrained[HEAD] is not members[1].pretrained[HEAD]

"""What the engine does with a method, of every registered one: cut short and continued, and on a mesh of two devices."""

import chex
import jax
import numpy as np
import pytest
from harness import pretrained_weights, setup_of, training_set, weights_of
from test_conformance import build

from agwm_jax.engine.checkpoint import Checkpoints
from agwm_jax.engine.group import Layout, Member
from agwm_jax.engine.lanes import Programs
from agwm_jax.engine.loop import fit
from agwm_jax.engine.observer import InMemory
from agwm_jax.engine.sharding import make_placement
from agwm_jax.methods.interface import METHODS

pytestmark = pytest.mark.usefixtures("quick_compilation")

CHUNK = 2


class Cut(Exception):
    """Ends a run where it stands."""


class CutAt(InMemory):
    """Ends it after so many chunks."""

    def __init__(self, chunks):
        super().__init__(1)
        self.left = chunks

    def chunk(self, member, phase, infos, *, step, offset):
        super().chunk(member, phase, infos, step=step, offset=offset)
        self.left -= 1
        if not self.left:
            raise Cut


def member_of(name):
    # A large eps: else Adam's first step is the sign of a gradient that may be nothing but rounding.
    method = build(name, setup_of(epochs=1, eps=1e-2))
    pretrained, data = jax.tree.map(np.asarray, (pretrained_weights(), training_set()))
    return Member(0, method, pretrained, data, jax.random.key(5))


def train(member, observer, *, devices=1, **options):
    placement = make_placement(seed=1, data=devices, model=1, fully_sharded=devices > 1)
    layout = Layout(placement, together=True)
    outcome = fit([member], weights=weights_of(), layout=layout, observer=observer, chunk_steps=CHUNK, **options)
    return jax.device_get(outcome.learnt[0])


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_is_cut_short_or_spread_over_devices_learns_the_same(name, tmp_path):
    member, programs, whole = member_of(name), Programs(), InMemory(1)
    learnt = train(member, whole, programs=programs)
    chunks = sum(-(-stage[0].num_steps // CHUNK) * len(stage) for stage in member.method.stages)

    first = CutAt(max(1, chunks // 2))
    saving = {"programs": programs, "checkpoint_minutes": 1e-9}
    checkpoints = Checkpoints(tmp_path, keep=1, fingerprint="")
    with pytest.raises(Cut):
        train(member, first, checkpoints=checkpoints, **saving)
    checkpoints.close()
    second = InMemory(1)
    second.records = first.records
    checkpoints = Checkpoints(tmp_path, keep=1, fingerprint="")
    continued = train(member, second, checkpoints=checkpoints, **saving)
    checkpoints.close()
    chex.assert_trees_all_equal(continued, learnt)
    assert second.records == whole.records

    spread = InMemory(1)
    chex.assert_trees_all_close(train(member, spread, devices=2), learnt, atol=2e-5, rtol=2e-5)
    for ours, theirs in zip(spread.records[0], whole.records[0], strict=True):
        assert ours.keys() == theirs.keys()
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=2e-5)

"""What goes side by side, by what the compiler counts."""

import math

import jax
import pytest

from agwm_jax.engine import memory
from agwm_jax.engine.group import Group
from agwm_jax.engine.lanes import Lanes, Programs
from agwm_jax.errors import AgwmError
from tests.engine.methods import WEIGHTS, build_members, layout, mixed, plain, train

SEEDS = (3, 5, 7, 9)


@pytest.fixture(scope="module")
def programs():
    return Programs()


@pytest.fixture(scope="module")
def choose(programs):
    """``choose(vectorize, available) -> Choice`` for four seeds of two searches."""
    members = build_members(mixed, SEEDS)

    def choice(vectorize, available, *, seed=1, of=members):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "limit", lambda members, placement: math.ceil(available / memory.USABLE))
            return memory.choose(
                of,
                weights=WEIGHTS,
                placement=layout(seed).placement,
                vectorize=vectorize,
                chunk_steps=4,
                programs=programs,
            )

    return choice


def test_most_lanes_that_fit_go_side_by_side(choose, programs):
    most = choose("auto", 1e12)
    assert most[:2] == (4, True)
    assert most.advice is None
    known = len(programs.compiled)
    assert choose("auto", most.num_bytes) == most, "what just fits fits"
    assert len(programs.compiled) == known
    fewer = choose("auto", most.num_bytes - 1)
    assert fewer[:2] in ((3, True), (4, False)), "the next smaller"
    assert fewer.num_bytes < most.num_bytes
    assert len(programs.compiled) <= known + 2, "a search and a finetune, compiled once"


def test_the_program_that_was_chosen_is_the_one_that_runs(choose, programs):
    choose("auto", 1e12)
    known = len(programs.compiled)
    outcome, _ = train(build_members(mixed, SEEDS), layout(together=True), programs=programs)
    assert len(programs.compiled) == known
    assert "compile" not in outcome.seconds


def test_what_is_said_is_done_and_nothing_is_refused(choose):
    assert choose("all", 1000)[:2] == (4, True)
    alone = choose("auto", 1000)
    assert alone[:2] == (1, False)
    assert alone.advice == (
        f"one run alone needs {alone.num_bytes / 1e9:.3g} GB of a device by the compiler's count, and 1.11e-06 GB are "
        "there; if it fails, take a smaller data.batch_size, or more devices (mesh.data with mesh.fully_sharded, or "
        "mesh.model)."
    )
    assert "4 runs side by side need" in choose("seeds", 1000).advice
    assert "say run.vectorize auto" in choose("seeds", 1000).advice
    assert choose("none", 1e12)[:2] == (1, False)


def test_devices_share_the_seeds_evenly(choose):
    one, two = choose("seeds", 1e12), choose("seeds", 1e12, seed=2)
    assert two[:2] == (4, False)
    assert two.num_bytes < 0.7 * one.num_bytes
    three = build_members(plain, SEEDS[:3])
    with pytest.raises(AgwmError, match=r"mesh\.seed 2 does not divide the 3 seeds .* multiple of 2"):
        choose("seeds", 1e12, seed=2, of=three)
    with pytest.raises(AgwmError, match=r"mesh\.seed 2 does not divide one seed, all that run\.vectorize none"):
        choose("none", 1e12, seed=2)


def test_what_is_counted_is_what_the_program_takes_and_gives(programs):
    """More than its arguments, less than twice of them: the state is donated, not copied."""
    group = Group(build_members(plain, (3,)), layout(), WEIGHTS)
    lanes = Lanes(group, 0)
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((lanes.state, group.data)))
    assert state < lanes.compile(programs, 4).num_bytes < 2 * state + 20_000


def test_a_cpu_s_devices_share_its_memory(monkeypatch):
    monkeypatch.setattr(memory, "_container_limit", lambda: 10e9)
    monkeypatch.setattr(memory.os, "sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 4_000_000)
    members = build_members(plain, SEEDS)
    alone, shared = (memory.limit(members, layout(1, data).placement) for data in (1, 4))
    assert 9.3e9 < alone < 9.41e9
    assert shared == pytest.approx(alone / 4, abs=2**20)

"""Seeds that were stopped side by side go on so, whatever would be chosen now."""

import pytest

from agwm_jax.errors import AgwmError
from agwm_jax.runs.groups import checkpoint_folder, note, plan_groups, remove_left_over


@pytest.fixture
def plan(tmp_path):
    """``plan(seeds, at_once, ...) -> groups`` in a folder where `stop` leaves checkpoints."""

    def make(seeds, at_once, *, finished=(), mesh_seed=1):
        folders = {seed: tmp_path / f"seed-{seed}" for seed in seeds}
        return plan_groups(tmp_path, folders, finished=finished, at_once=at_once, mesh_seed=mesh_seed)

    def stop(*group):
        folder = checkpoint_folder(tmp_path, {seed: tmp_path / f"seed-{seed}" for seed in group}, group)
        note(folder, group)
        (folder / "4").mkdir(parents=True)

    make.stop = stop
    return make


def test_as_many_as_go_at_once(plan):
    assert plan(range(5), 2) == [(0, 1), (2, 3), (4,)]
    assert plan(range(5), 2, finished=[0, 3]) == [(1, 2), (4,)]
    assert plan([3, 1], 8) == [(3, 1)]


def test_a_group_that_was_stopped_goes_on_as_it_was(plan):
    plan.stop(1, 2)
    assert plan(range(5), 3) == [(1, 2), (0, 3, 4)]
    # The first of them was written before the run was stopped; and others have a result by now.
    assert plan(range(5), 3, finished=[0, 1, 3]) == [(1, 2), (4,)]
    assert plan(range(5), 3, finished=[1, 2]) == [(0, 3, 4)]
    assert plan([5, 6], 3) == [(5, 6)]


def test_a_seed_that_was_stopped_alone_goes_on_alone(plan):
    plan.stop(2)
    assert plan(range(4), 4) == [(2,), (0, 1, 3)]


def test_a_group_that_cannot_go_on_is_not_begun_anew(plan):
    plan.stop(0, 1, 2)
    with pytest.raises(
        AgwmError, match=r"checkpoints-0 holds checkpoints of seeds \[0, 1, 2\], .* run\.seeds lacks \[2\]"
    ):
        plan([0, 1], 3)
    with pytest.raises(AgwmError, match=r"or the memory here allows 1 at once: continue with run\.vectorize auto"):
        plan(range(3), 1)


def test_a_mesh_of_seeds_divides_what_is_left(plan):
    assert plan(range(4), 2, mesh_seed=2) == [(0, 1), (2, 3)]
    with pytest.raises(AgwmError, match=r"mesh\.seed 2 does not divide the seeds \[1, 2, 3\], which are left"):
        plan(range(4), 4, finished=[0], mesh_seed=2)


def test_checkpoints_of_finished_seeds_are_removed_and_those_of_others_stay(tmp_path):
    """A process may be killed after the last result and before it has removed them."""
    folders = {seed: tmp_path / f"seed-{seed}" for seed in range(5)}
    for group in ((0, 1), (2, 3)):
        folder = checkpoint_folder(tmp_path, folders, group)
        note(folder, group)
        (folder / "4.orbax-checkpoint-tmp").mkdir()
    (folders[4] / "checkpoints" / "4").mkdir(parents=True)
    (folders[4] / "checkpoints" / "4.checkpoint.json").write_text("{}")
    for seed in (0, 1, 2, 4):
        folders[seed].mkdir(exist_ok=True)
        (folders[seed] / "result.json").write_text("{}")
    remove_left_over(tmp_path, folders.values())
    assert sorted(path.name for path in tmp_path.glob("checkpoints-*")) == ["checkpoints-2"]
    assert not (folders[4] / "checkpoints").exists()
